"""The gate in plans and as a stage: a drawn teacher, a few pictures, and what is published."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import jpeg
from rich.console import Console
from typer.testing import CliRunner
from zero_shot_world import tiny, tower, write_folders

from kdscale.cli import app
from kdscale.core.config import DataSpec, Distill, Execution, TowerFacts, TowerSpec, ZeroShotSpec
from kdscale.core.journal import read_steps
from kdscale.core.scale import MINI, PAPER, Scale
from kdscale.core.storage import StageStore, Storage
from kdscale.core.zero_shot_config import Gate
from kdscale.models.towers import save_clip
from kdscale.stages.gate import GateFailed, GateUndecided
from kdscale.stages.gate_run import GateRun
from kdscale.stages.jobs import GateJob
from kdscale.stages.loop import World
from kdscale.stages.worker import _work
from kdscale.stages.zeroshot import evaluate
from kdscale.sweep.grid import Sweep, choose
from kdscale.sweep.grids import teacher_grid
from kdscale.sweep.orders import group_job
from kdscale.sweep.plan import Plan, Stage, make_plan
from kdscale.sweep.prepare import prepare
from kdscale.sweep.progress import print_plan
from kdscale.sweep.report import build_report
from kdscale.sweep.schedule import waiting_trials
from kdscale.sweep.status import stage_state

IMAGES = 3
WriteTar = Callable[[Path, list[tuple[str, bytes]]], Path]
HERE = Execution(num_workers=0, cpus_per_worker=0.5)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> TowerSpec:
    """A drawn pair whose makers claim one half."""
    place, spec = tmp_path_factory.mktemp("teacher"), tiny(name="claimed")
    save_clip(tower(spec).model, spec, place)
    return spec.replace(weights=str(place), facts=TowerFacts(zero_shot_top1=50.0))


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    """Three of ImageNet's pictures."""
    return write_folders(tmp_path / "imagenet", ["0", "10", "2"])


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """An empty stage store."""
    return Storage(str(tmp_path / "runs"))


def scale(imagenet: Path | None, num_images: int = IMAGES, **fields: Any) -> Scale:
    """The paper's scale with an ImageNet of a few pictures."""
    data = DataSpec(name="imagenet_val", num_samples=num_images, max_bad_fraction=0.0)
    known = {"imagenet": ZeroShotSpec(name="ImageNet", data=data, templates="simple")}
    paths = {} if imagenet is None else {"imagenet_val": str(imagenet)}
    defaults = {"zero_shot": known, "data_paths": paths, "run": HERE, "precision": "fp32"}
    return PAPER.replace(**(defaults | fields))


def plan_of(teacher: Any, storage: Storage, at: Scale, **fields: Any) -> Plan:
    """Two students of a teacher."""
    common: dict[str, Any] = {"teacher": teacher, "zero_shot": None, "data": MINI.data["cc12m"]}
    recipe = Distill(student="vit_t16", loss=choose("kl", "icl"), **common | fields)
    return make_plan([Sweep(name="x", stages=[recipe])], storage, at, {})


def gates_in(plan: Plan) -> list[Stage]:
    """The gates of a plan."""
    return [stage for stage in plan.stages.values() if stage.kind == Gate.kind]


def test_a_teacher_passes_one_gate_before_all_that_it_teaches(
    teacher: TowerSpec, storage: Storage, imagenet: Path
) -> None:
    plan = plan_of(teacher, storage, scale(imagenet))
    (gate,) = gates_in(plan)
    assert [trial.path[0] for trial in plan.trials] == [gate.key] * 2
    assert plan.missing == []
    without = plan_of(teacher, storage, scale(imagenet, gates=False))
    assert [trial.path for trial in without.trials] == [t.path[1:] for t in plan.trials]
    cached = plan_of(teacher, storage, scale(imagenet), teacher_outputs="cached", views=1)
    assert [stage.kind for stage in cached.stages.values()][:2] == ["gate", "embed"]
    with (console := Console(width=160)).capture() as capture:
        print_plan(plan, console)
    assert "gate claimed" in capture.get()
    assert "3 images, shared by 2 trials" in capture.get()


def test_only_published_weights_have_a_gate(
    teacher: TowerSpec, storage: Storage, imagenet: Path
) -> None:
    for other in (teacher.replace(weights="random"), teacher.replace(facts=TowerFacts())):
        assert not gates_in(plan_of(other, storage, scale(imagenet)))


def test_mini_and_random_teachers_have_none(storage: Storage, imagenet: Path) -> None:
    assert not gates_in(plan_of("clip_b16", storage, MINI))
    assert not gates_in(plan_of("clip_b16", storage, scale(imagenet, random_weights=True)))
    assert len(gates_in(plan_of("clip_b16", storage, scale(imagenet)))) == 1


def test_a_key_is_that_of_teacher_and_pictures(
    teacher: TowerSpec, storage: Storage, imagenet: Path, tmp_path: Path
) -> None:
    def key(folder: Path, who: TowerSpec = teacher) -> str:
        return gates_in(plan_of(who, storage, scale(folder)))[0].key

    own = key(imagenet)
    shutil.copytree(imagenet, tmp_path / "moved")
    assert key(tmp_path / "moved") == own
    assert key(imagenet, teacher.replace(facts=TowerFacts(zero_shot_top1=1.0), name="b")) == own
    (tmp_path / "moved" / "0").rename(tmp_path / "moved" / "1")
    assert key(tmp_path / "moved") != own


def test_missing_pictures_are_noted(teacher: TowerSpec, storage: Storage, tmp_path: Path) -> None:
    (note,) = plan_of(teacher, storage, scale(None)).missing
    assert "say --data imagenet_val=DIR; the gates" in note
    assert "--no-gates" in note
    # One path for all data is that of the training data.
    unnamed = scale(None, data_paths={"": "/nowhere/*.tar"})
    notes = plan_of(teacher, storage, unnamed, data="cc12m").missing
    assert any("imagenet_val=DIR; the gates of pretrained teachers read it" in n for n in notes)
    (note,) = plan_of(teacher, storage, scale(tmp_path / "nowhere")).missing
    assert "nowhere" in note
    assert "--no-gates" in note
    assert plan_of(teacher, storage, scale(None, gates=False)).missing == []


def test_what_is_finished_needs_no_gate(
    teacher: TowerSpec, storage: Storage, imagenet: Path
) -> None:
    plan = plan_of(teacher, storage, scale(imagenet))
    for trial in plan.trials:
        StageStore(storage, "distill", trial.key).finish({})
    assert not gates_in(plan_of(teacher, storage, scale(imagenet)))
    assert plan_of(teacher, storage, scale(None)).missing == []
    gates_in(plan)[0].store(storage).finish({})
    again = plan_of(teacher, storage, scale(imagenet))
    assert [stage.reused for stage in gates_in(again)] == [True]
    assert waiting_trials(again) == []


def job_of(plan: Plan) -> GateJob:
    """What the worker is told."""
    job = group_job(gates_in(plan)[0], None, plan.storage)  # pyright: ignore[reportArgumentType]
    assert isinstance(job, GateJob)
    return job


def test_a_teacher_that_disagrees_ends_its_trials_and_is_embedded_once(
    teacher: TowerSpec, storage: Storage, imagenet: Path
) -> None:
    plan = plan_of(teacher, storage, scale(imagenet))
    alone = Plan(scale=plan.scale, storage=storage, stages={g.key: g for g in gates_in(plan)})
    prepare(alone, lambda _: None)
    job = job_of(plan)
    with pytest.raises(GateFailed, match=r"claimed .* reaches 0\.00 % .*published are 50\.00"):
        _work({"jobs": [job], "in_group": False})
    failure = job.stage.failure()
    assert failure is not None
    assert failure["final"]
    assert failure["message"].startswith("GateFailed: claimed")
    assert stage_state(gates_in(plan)[0], storage) == ("failed", failure["message"])
    (line,) = read_steps(job.stage)
    assert (line["images"], line["published_top1"]) == (IMAGES, 50.0)
    shutil.rmtree(imagenet)  # the next in line is told from what is kept
    job.stage.forget_failure()
    with pytest.raises(GateFailed):
        GateRun(job, World(), lambda _: None).train()
    top1 = storage.read_json(*job.stage.parts, "output", "metrics.json")["zero_shot_top1"]
    agreed = replace(job, recipe=job.recipe.replace(published=top1 + 0.1))
    GateRun(agreed, World(), lambda _: None).train()
    assert job.stage.is_done()
    assert len(list(read_steps(job.stage))) == 1


def test_a_gate_that_is_passed_stands_in_the_report(
    teacher: TowerSpec, storage: Storage, imagenet: Path
) -> None:
    honest = teacher.replace(facts=TowerFacts(zero_shot_top1=0.0))
    plan = plan_of(honest, storage, scale(imagenet))
    sweep = Sweep(name="x", stages=[])
    (row,) = build_report(plan, [sweep]).teachers
    assert row.note == "has not passed its gate"
    _work({"jobs": [job_of(plan)], "in_group": False})
    (row,) = build_report(plan, [sweep]).teachers
    assert row.score is not None
    assert (row.score.top1, row.score.n, row.score.chance, row.note) == (0.0, IMAGES, 0.1, "")
    assert teacher_grid([row]).rows[0][2].text == str(IMAGES)
    assert json.loads(json.dumps(plan.document()))["stages"][0]["kind"] == "gate"


def test_workers_share_the_pieces_and_a_part_of_the_set_decides_nothing(
    teacher: TowerSpec, storage: Storage, tmp_path: Path, write_tar: WriteTar
) -> None:
    class Alone(World):
        """A worker whose others are not waited for."""

        def wait(self) -> None: ...

    for place in range(3):
        parts = [("a.jpg", jpeg(place)), ("a.cls", str(place).encode())]
        write_tar(tmp_path / "tars" / f"{place}.tar", parts)
    job = job_of(plan_of(teacher, storage, scale(tmp_path / "tars", num_images=4)))
    GateRun(job, Alone(rank=1, size=2), lambda _: None).train()
    assert storage.names(*job.stage.parts, "parts") == ["000001.npz"]
    with pytest.raises(GateUndecided, match=r"3 images were scored .* holds 4"):
        GateRun(job, Alone(rank=0, size=1), lambda _: None).train()
    table = pq.read_table(storage.url(*job.stage.parts, "output", "zero_shot.parquet"))
    whole = evaluate(job.recipe, tower(teacher))
    assert table.column("prediction").to_pylist() == [item["prediction"] for item in whole.items]


def test_the_command_line_can_say_no(tmp_path: Path) -> None:
    sweep = tmp_path / "one.py"
    sweep.write_text(
        "from kdscale import Distill, Sweep\n"
        "one = Distill(student='vit_t16', teacher='clip_b16', zero_shot=None)\n"
        "sweep = Sweep(name='one', stages=[one])\n"
    )
    line = ["plan", str(sweep), "--storage", str(tmp_path / "runs"), "--json"]
    kinds = []
    for more in ([], ["--no-gates"]):
        document = json.loads(CliRunner().invoke(app, [*line, *more]).stdout)
        kinds.append([stage["kind"] for stage in document["stages"]])
        assert any("--no-gates" in note for note in document["cost"]["missing"]) is not bool(more)
    assert kinds == [["gate", "distill"], ["distill"]]


def test_a_gate_whose_pictures_are_not_all_there_is_refused_by_the_plan(
    teacher: TowerSpec, storage: Storage, imagenet: Path
) -> None:
    plan = plan_of(teacher, storage, scale(imagenet, num_images=50_000))
    (note,) = plan.missing
    assert "holds 3 of the 50,000 images of ImageNet" in note
    assert "--no-gates" in note
    with (console := Console(width=160)).capture() as capture:
        print_plan(plan, console)
    assert "3 images, shared by 2 trials" in capture.get()
    for trial in plan.trials:
        StageStore(storage, "distill", trial.key).finish({})
    assert plan_of(teacher, storage, scale(imagenet, num_images=50_000)).missing == []
