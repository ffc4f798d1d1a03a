"""What is not there: storages that no run has made, and inputs that nobody has named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from kdscale import Distill, Sweep, Vlm
from kdscale.cli import app
from kdscale.cli_request import parse_data
from kdscale.core.config import DataSpec
from kdscale.core.scale import PAPER
from kdscale.core.storage import Storage
from kdscale.core.types import StorageError
from kdscale.sweep.plan import make_plan

OWN = """
from kdscale import Distill, Sweep
distill = Distill(student="vit_t16", teacher="clip_b16", loss="kl", zero_shot=None)
sweep = Sweep(name="own", stages=[distill], scale="mini")
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    """A sweep file."""
    (tmp_path / "own.py").write_text(OWN)
    return str(tmp_path / "own.py")


def said(*line: str) -> Result:
    return CliRunner().invoke(app, list(line), env={"COLUMNS": "200"})


def flat(result: Result) -> str:
    return " ".join(result.output.split())


@pytest.mark.parametrize(
    "line",
    [
        ["report", "FILE"],
        ["report", "FILE", "--paper", "--out", "OUT"],
        ["findings", "FILE"],
        ["status", "FILE", "--json"],
        ["gc", "FILE", "--dry-run"],
        ["logs", "3fa9"],
    ],
    ids=" ".join,
)
def test_what_only_reads_makes_no_storage(line: list[str], own: str, tmp_path: Path) -> None:
    place = tmp_path / "typo"
    line = [{"FILE": own, "OUT": str(tmp_path / "out")}.get(word, word) for word in line]
    result = said(*line, "--storage", str(place))
    assert result.exit_code == 2
    assert re.search(rf"StorageError: storage {place} does not exist: .*makes it", flat(result))
    place.mkdir()
    result = said(*line, "--storage", str(place))
    assert (result.exit_code, "is empty" in flat(result)) == (2, True)
    assert list(place.iterdir()) == []
    assert not (tmp_path / "out").exists()


def test_a_prefix_of_an_object_store_is_made_when_anything_lies_below_it() -> None:
    storage = Storage("memory://absent/runs")
    with pytest.raises(StorageError, match="does not exist"):
        storage.check_made("`kdscale run`")
    storage.write(b"", "stages", "distill", "k", "DONE")
    storage.check_made("`kdscale run`")
    Storage("memory://absent").check_made("`kdscale run`")


def test_a_storage_of_other_sweeps_is_said_first(own: str, tmp_path: Path) -> None:
    Storage(str(tmp_path)).write(b"", "stages", "distill", "0" * 16, "DONE")
    for command in ("report", "status"):
        result = said(command, own, "--storage", str(tmp_path))
        assert result.exit_code == 0
        assert result.output.startswith(f"{tmp_path} holds nothing of these sweeps. Run: ")
    other = said("status", own, "--storage", str(tmp_path), "--json")
    assert other.stdout.startswith("{")


def test_young_garbage_is_counted(own: str, tmp_path: Path) -> None:
    root = str(tmp_path / "runs")
    for key in ("0" * 16, "1" * 16):
        Storage(root).write(b"12", "stages", "distill", key, "DONE")
    text = flat(said("gc", own, "--storage", root))
    assert "nothing to remove" in text
    assert "2 unneeded stages (0.0 MB) written within 7 days stay: --older-than" in text
    text = flat(said("gc", own, "--storage", root, "--older-than", "0", "--dry-run"))
    assert "0 to remove" in text
    assert "no plan names 2 finished stages (0.0 MB); only --finished removes such" in text
    assert "written within" not in text


def test_inputs_are_missing_once_by_a_name_that_is_taken(tmp_path: Path) -> None:
    student = Distill(student="vit_t16", teacher="clip_b16", loss="kl")
    sweep = Sweep(name="x", stages=[Vlm(vision=student, recipe="tinyllava", suite="paper16")])
    storage = Storage(str(tmp_path))
    plan = make_plan([sweep], storage, PAPER, {})
    assert sorted(plan.missing) == [
        "benchmarks of paper16: say --data paper16=DIR",
        "data set 'cc12m' has no path: say --data cc12m='DIR/*.tar'",
        "data set 'imagenet_val' has no path: say --data imagenet_val=DIR",
        "data set 'llava_mix_665k' has no path: say --data llava_mix_665k='DIR/*.tar'",
        "data set 'llava_pretrain_558k' has no path: say --data llava_pretrain_558k='DIR/*.tar'",
    ]
    named = [note.partition("--data ")[2].partition("=")[0] for note in plan.missing]
    paths = parse_data([f"{name}={tmp_path}/{name}" for name in named if name != "paper16"])
    missing = make_plan([sweep], storage, PAPER.replace(data_paths=paths), {}).missing
    assert sorted(note.partition(":")[0] for note in missing) == sorted(
        ["benchmarks of paper16", *(f"no shards for '{path}'" for path in paths.values())]
    )


def test_a_set_of_ones_own_is_called_by_its_name(tmp_path: Path) -> None:
    data = DataSpec(name="my set")
    sweep = Sweep(name="x", stages=[Distill(student="vit_t16", loss="clip", data=data)])
    plan = make_plan([sweep], Storage(str(tmp_path)), PAPER, {"zero_shot": None})
    assert plan.missing == ["data set 'my set' has no path: say --data 'my set'='DIR/*.tar'"]
