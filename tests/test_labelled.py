"""ImageNet as people have it, in a plan at the paper's scale: read by gate and student."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import jpeg
from typer.testing import CliRunner
from zero_shot_world import tiny, tower, write_folders, write_parquet

from kdscale.cli import app
from kdscale.core.config import DataSpec, Distill, Execution, TowerFacts, ZeroShotSpec
from kdscale.core.scale import MINI, PAPER
from kdscale.core.storage import Storage
from kdscale.core.types import EmptyShard, TooManyBadSamples
from kdscale.data.labels import UnknownLabel
from kdscale.data.samples import decode
from kdscale.data.shards import read_labelled
from kdscale.stages.evaluate import Evaluator
from kdscale.stages.inputs import find_source
from kdscale.stages.loop import World
from kdscale.sweep.grid import Sweep
from kdscale.sweep.plan import Plan, make_plan
from kdscale.sweep.prepare import prepare

WNIDS = ("n01440764", "n01484850", "n02119022")  # of classes 0, 2 and 277
LABELS = [0, 2, 277]
WriteTar = Callable[[Path, list[tuple[str, bytes]]], Path]


def labelled(urls: Path, bad: float = 0.0) -> DataSpec:
    """A set of a few of ImageNet's pictures."""
    return DataSpec(name="imagenet_val", urls=str(urls), num_samples=3, max_bad_fraction=bad)


def written(kind: str, root: Path, write_tar: WriteTar) -> Path:
    """Writes three pictures in one of the formats."""
    if kind == "folders":
        return write_folders(root / "val", WNIDS)
    if kind == "numbered folders":
        return write_folders(root / "val", [str(label) for label in LABELS])
    if kind == "parquet":
        images = [jpeg(place) for place in range(3)]
        return write_parquet(root / "val.parquet", images, label=LABELS)
    parts: list[tuple[str, bytes]] = []
    for place, (wnid, label) in enumerate(zip(WNIDS, LABELS, strict=True)):
        told = {
            "cls": ("cls", str(label).encode()),
            "cls of ids": ("cls", wnid.encode()),
            "wnid": ("json", json.dumps({"wnid": wnid}).encode()),
            "label": ("json", json.dumps({"label": label}).encode()),
        }[kind]
        parts += [(f"{place}.jpg", jpeg(place)), (f"{place}.{told[0]}", told[1])]
    return write_tar(root / "val.tar", parts)


def plan_of(storage: Storage, place: Path) -> Plan:
    """A student whose teacher has a gate, at the paper's scale."""
    data = DataSpec(name="imagenet_val", num_samples=3, max_bad_fraction=0.0)
    scale = PAPER.replace(
        zero_shot={"imagenet": ZeroShotSpec(name="ImageNet", data=data, templates="simple")},
        data_paths={"imagenet_val": str(place)},
        run=Execution(num_workers=0),
        precision="fp32",
    )
    taught: dict[str, Any] = {"student": "vit_t16", "data": MINI.data["cc12m"]}
    teacher = tiny(name="claimed", weights="x", facts=TowerFacts(zero_shot_top1=50.0))
    one = Distill(teacher=teacher, zero_shot="imagenet", **taught)
    return make_plan([Sweep(name="x", stages=[one])], storage, scale, {})


@pytest.mark.parametrize(
    "kind", ["folders", "numbered folders", "cls", "cls of ids", "wnid", "label", "parquet"]
)
def test_gate_and_student_read_every_format(kind: str, tmp_path: Path, write_tar: WriteTar) -> None:
    storage, place = Storage(str(tmp_path / "runs")), written(kind, tmp_path, write_tar)
    plan = plan_of(storage, place)
    assert plan.missing == []
    stages = {stage.kind: stage for stage in plan.stages.values()}
    assert sorted(stages) == ["distill", "gate"]
    assert stages["gate"].num_samples == 3
    benchmark: Any = stages["distill"].training.zero_shot
    source = find_source(benchmark.data, storage, content="labels")
    read = list(read_labelled(source.manifest()))
    assert [label for _, label, _ in read] == LABELS
    assert all(np.array_equal(image, decode(jpeg(n))) for n, (_, _, image) in enumerate(read))
    spec = ZeroShotSpec(name="ImageNet", data=benchmark.data, templates="simple")
    scores = Evaluator(spec, source.manifest(), World(), "fp32").run(tower(), None)
    assert scores.labels == LABELS
    again = plan_of(storage, place)
    assert again.stages.keys() == plan.stages.keys()
    prepare(Plan(scale=plan.scale, storage=storage, stages={"g": stages["gate"]}), print)


def test_the_same_pictures_elsewhere_have_the_same_hash(tmp_path: Path) -> None:
    hashes = [
        find_source(
            labelled(write_folders(tmp_path / name / "val", WNIDS)),
            Storage(str(tmp_path / name / "runs")),
            content="labels",
        ).hash
        for name in ("a", "b")
    ]
    assert hashes[0] == hashes[1]


def test_a_storage_that_was_moved_has_its_shards_with_it(tmp_path: Path) -> None:
    place = write_folders(tmp_path / "val", WNIDS)
    find_source(labelled(place), Storage(str(tmp_path / "runs")), content="labels")
    (tmp_path / "runs").rename(tmp_path / "moved")
    source = find_source(labelled(place), Storage(str(tmp_path / "moved")), content="labels")
    assert [label for _, label, _ in read_labelled(source.manifest())] == LABELS


def test_what_is_no_label_is_named(tmp_path: Path, write_tar: WriteTar) -> None:
    storage = Storage(str(tmp_path / "runs"))
    folders = write_folders(tmp_path / "val", ["n01440764", "kitchen things"])
    with pytest.raises(UnknownLabel, match="kitchen things"):
        find_source(labelled(folders), storage, content="labels")
    parts = [("a.jpg", jpeg(0)), ("a.cls", b"0"), ("b.jpg", jpeg(1)), ("b.cls", b"1000")]
    tar = write_tar(tmp_path / "val.tar", parts)
    with pytest.raises(UnknownLabel, match=r"'b' of .*val\.tar is labelled '1000', outside 0 to"):
        find_source(labelled(tar), storage, content="labels")
    bare = write_tar(tmp_path / "bare.tar", [("a.jpg", jpeg(0)), ("a.txt", b"a dog")])
    with pytest.raises(EmptyShard, match="missing_label"):
        find_source(labelled(bare), storage, content="labels")


def test_a_damaged_picture_is_counted_by_cause(tmp_path: Path) -> None:
    storage, place = Storage(str(tmp_path / "runs")), write_folders(tmp_path / "val", WNIDS)
    (place / WNIDS[1] / "picture1.JPEG").write_bytes(b"no picture")
    with pytest.raises(TooManyBadSamples, match="1 of 3 samples are unusable"):
        find_source(labelled(place), storage, content="labels")
    source = find_source(labelled(place, bad=0.5), storage, content="labels")
    assert [label for _, label, _ in read_labelled(source.manifest())] == [0, 277]


def test_verified_beforehand(tmp_path: Path) -> None:
    place = write_folders(tmp_path / "val", WNIDS)
    command = ["data", "verify", str(place), "--labelled", "--storage", str(tmp_path / "runs")]
    found = CliRunner().invoke(app, command)
    assert found.exit_code == 0, found.output
    told: list[str] = []
    storage = Storage(str(tmp_path / "runs"))
    source = find_source(labelled(place), storage, content="labels", progress=told.append)
    assert (source.num_samples, told) == (3, [])
