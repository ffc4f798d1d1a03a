"""The walk: each distinct build once, and every cell covered by one.

But for one slow test nothing is built here.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kdscale import Distill, Sweep, Vlm, choose
from kdscale.cli import app, load_sweep
from kdscale.core.eval_config import BenchmarkImages, Cka
from kdscale.core.storage import Storage
from kdscale.sweep.plan import make_plan
from kdscale.sweep.walk import WALK, Walk, walk_of

SWEEPS = Path(__file__).parent.parent / "sweeps"


def walk(folder: Path, *sweeps: Sweep) -> Walk:
    return walk_of(make_plan(sweeps, Storage(str(folder)), WALK, {"max_steps": 1}))


def kinds(found: Walk) -> list[str]:
    return [stage.kind for stage in found.plan.stages.values()]


def test_what_changes_numbers_alone_is_built_once(tmp_path: Path) -> None:
    distill = Distill(
        student="vit_t16", teacher="clip_b16", loss="kl", lr=choose(1e-3, 5e-4), epochs=choose(8, 9)
    )
    found = walk(tmp_path, Sweep(name="x", stages=[distill], seeds=(0, 1)))
    assert (len(found.cells), kinds(found)) == (8, ["distill"])
    other = Distill(student="vit_t16", teacher=choose("clip_b16", "dfn_b16"), loss="kl")
    # Both are the same architecture, and here both are random.
    assert kinds(walk(tmp_path, Sweep(name="x", stages=[other]))) == ["distill"]
    wider = other.replace(teacher=choose("clip_b16", "clip_l14"))
    assert kinds(walk(tmp_path, Sweep(name="x", stages=[wider]))) == ["distill"] * 2


def test_every_build_is_asked_each_benchmark(tmp_path: Path) -> None:
    vlm = Vlm(
        vision=choose("vit_t16", "swin_t"), recipe=choose("tinyllava", "bunny"), suite="paper16"
    )
    found = walk(tmp_path, Sweep(name="x", stages=[vlm]))
    assert [kinds(found).count(kind) for kind in ("pretrain", "finetune", "answers")] == [4, 4, 64]
    for trial in found.plan.trials:
        assert [found.plan.stages[key].kind for key in trial.path[:2]] == ["pretrain", "finetune"]


def test_comparisons_are_walked_on_images_that_are_enough(tmp_path: Path) -> None:
    vlm = Vlm(vision="vit_t16", suite="paper16", cka_with="clip_b16")
    found = walk(tmp_path, Sweep(name="x", stages=[vlm]))
    (compared,) = [s.recipe for s in found.plan.stages.values() if isinstance(s.recipe, Cka)]
    assert not isinstance(compared.images, BenchmarkImages)


def test_every_cell_of_the_paper_is_covered(tmp_path: Path) -> None:
    """Counted: tables, figures and controls as they stand in `sweeps/`."""
    files = [file for kind in ("table", "figure", "control") for file in SWEEPS.glob(f"{kind}*.py")]
    found = walk(tmp_path, *map(load_sweep, sorted(files)))
    assert len(found.cells) == sum(len(load_sweep(file).trials({"max_steps": 1})) for file in files)
    built = {stage.key for stage in found.plan.stages.values()}
    assert all(cell.is_covered(built) for cell in found.cells)
    assert not any(cell.is_covered(found.done()) for cell in found.cells)
    # Table 1's four architectures by 2 x 2, and Table 2's other three students by two.
    assert kinds(found).count("finetune") == 16 + 6


def test_the_command_tells_what_covers_what(tmp_path: Path) -> None:
    """Also of sweeps whose own scales differ: it has one of its own."""
    files = [str(SWEEPS / f"{name}.py") for name in ("figure2_gap", "quickstart")]
    options = ["walk", *files, "--storage", str(tmp_path), "--json"]
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["covered"] == 0 < document["cells"] == len(document["builds"])


@pytest.mark.slow
@pytest.mark.timeout(2 * 3600)
def test_every_cell_is_walked(tmp_path: Path) -> None:
    """At true size: an hour on two cores, and 24 GB of memory."""
    files = [file for kind in ("table", "figure", "control") for file in SWEEPS.glob(f"{kind}*.py")]
    command = [str(Path(sys.executable).parent / "kdscale"), "walk", *map(str, sorted(files))]
    subprocess.run([*command, "--storage", str(tmp_path)], check=True)
    document = json.loads((tmp_path / "walk" / "summary.json").read_text())
    assert document["covered"] == document["cells"] > 0
