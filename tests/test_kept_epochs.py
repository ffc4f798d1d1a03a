"""Students kept at the end of epochs: when they are written, what a plan makes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Part, pair
from safetensors.torch import load_file
from worlds import TEXT, small_job, synthetic, vit

from kdscale import DataSpec, Distill, Execution, Sweep, Vlm, ZeroShotSpec, choose
from kdscale.core.checkpoints import Checkpoints
from kdscale.core.scale import MINI, PAPER, TRUE_SIZE_CPU
from kdscale.core.storage import Storage
from kdscale.core.trained import missing_epochs
from kdscale.core.types import ConfigError
from kdscale.data.shards import Manifest, ShardEntry
from kdscale.stages.jobs import DistillJob
from kdscale.stages.loop import World
from kdscale.stages.run import Run
from kdscale.sweep.kept import is_finished
from kdscale.sweep.plan import Plan, make_plan
from kdscale.sweep.tree import _stage_label

UNGATED = PAPER.replace(gates=False)
PER_EPOCH = 3  # steps of 8 samples
WEIGHTS = "open_clip_model.safetensors"


def job_of(root: Path, *keep: int) -> DistillJob:
    """Returns three epochs of three steps, with a checkpoint at every second step."""
    shard = ShardEntry("x.tar", 1, "0" * 64, 8 * PER_EPOCH, "0" * 16)
    job = small_job(str(root), total_steps=3 * PER_EPOCH, epochs=3, keep_epochs=keep)
    return replace(job, data=Manifest(shards=(shard,)))


def student(job: DistillJob, name: str) -> dict[str, torch.Tensor]:
    """Reads a student that a stage has kept."""
    return load_file(job.stage.url("output", name, WEIGHTS))


def train(job: DistillJob, die_before: int | None = None) -> dict[int, dict[str, torch.Tensor]]:
    """Trains from the newest checkpoint; returns the student before each step."""
    seen: dict[int, dict[str, torch.Tensor]] = {}

    def batches(start: int) -> Any:
        for batch in synthetic(job, World())(start):
            if batch.step == die_before:
                raise KeyboardInterrupt
            state = run.task.student.model.state_dict()
            seen[batch.step] = {name: value.clone() for name, value in state.items()}
            yield batch

    run = Run(job, World(), lambda _: None)
    run.train(batches)
    return seen


def assert_equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_students_are_kept_at_the_ends_of_epochs(tmp_path: Path) -> None:
    job = job_of(tmp_path / "kept", 1, 2)
    before = train(job)
    for epoch in (1, 2):
        assert_equal(student(job, f"model-epoch-{epoch:04d}"), before[epoch * PER_EPOCH])
    assert missing_epochs(job.stage, (1, 2, 3)) == [3]
    plain = job_of(tmp_path / "plain")
    train(plain)
    assert_equal(student(job, "model"), student(plain, "model"))  # keeping changes no number


def test_a_resumed_run_writes_each_student_once(tmp_path: Path) -> None:
    job = job_of(tmp_path, 1, 2)
    with pytest.raises(KeyboardInterrupt):
        train(job, die_before=5)  # the newest checkpoint is that of step 4, behind epoch 1
    written = Path(job.stage.url("output", "model-epoch-0001", WEIGHTS))
    first = written.stat().st_mtime_ns
    before = train(job)
    assert min(before) == 4
    assert written.stat().st_mtime_ns == first
    assert_equal(student(job, "model-epoch-0002"), before[2 * PER_EPOCH])


def test_an_attempt_that_kept_less_is_not_resumed_behind_an_epoch(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(job_of(tmp_path), die_before=7)  # checkpoints of steps 4 and 6
    job = job_of(tmp_path, 2)
    job.rewind()
    assert Checkpoints(job.stage, keep=2).latest_step() == 4
    before = train(job)
    assert min(before) == 4
    assert_equal(student(job, "model-epoch-0002"), before[2 * PER_EPOCH])


def test_a_run_that_ends_early_keeps_its_last_student(tmp_path: Path) -> None:
    job = replace(job_of(tmp_path, 1, 2), total_steps=1)
    train(job)
    assert missing_epochs(job.stage, (1, 2)) == []


def plan_of(storage: Storage, *stages: Distill | Vlm, scale: Any = UNGATED) -> Plan:
    return make_plan([Sweep(name="x", stages=list(stages))], storage, scale, {})


def recipe(**fields: Any) -> Distill:
    common = {"student": "vit_t16", "teacher": "dfn_l14", "epochs": 96}
    return Distill(**(common | fields))


def test_trials_of_one_training_keep_all_that_they_ask_for(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    long = recipe(keep_epochs=(64,))
    read = long.at_epoch(choose(16, 32, 96))
    plan = plan_of(storage, long, read, Vlm(vision=read))
    (key,) = {key for key, stage in plan.stages.items() if stage.kind == "distill"}
    assert plan.stages[key].training.keep_epochs == (16, 32, 64)
    assert plan.trials[0].key == key
    assert [trial.epoch for trial in plan.trials[:4]] == [None, 16, 32, None]
    seen = [plan.stages[t.key].recipe.vision.weights for t in plan.trials[4:]]  # pyright: ignore
    assert seen == [f"stage:distill/{key}{at}" for at in ("@16", "@32", "")]
    (one,) = plan_of(storage, recipe()).stages.values()
    assert one.key == key  # what is kept changes no key
    assert plan.stages[key].bytes_out == 4 * (one.bytes_out or 0)


def test_epochs_shrink_with_the_scale(tmp_path: Path) -> None:
    plan = plan_of(Storage(str(tmp_path)), recipe(keep_epochs=(8, 32, 64, 96)), scale=MINI)
    (stage,) = (stage for stage in plan.stages.values() if stage.kind == "distill")
    assert (stage.training.epochs, stage.training.keep_epochs) == (3, (1, 2))


def test_a_student_of_the_sweep_may_teach(tmp_path: Path) -> None:
    big = Distill(student="vit_b16", loss="clip", epochs=96)
    taught = Distill(student="vit_t16", teacher=choose(big.at_epoch(32), big))
    plan = plan_of(Storage(str(tmp_path)), taught)
    teacher, *students = [s for s in plan.stages.values() if s.kind == "distill"]
    weights = [stage.training.teacher.weights for stage in students]  # pyright: ignore
    assert weights == [f"stage:distill/{teacher.key}@32", f"stage:distill/{teacher.key}"]
    assert [t.trial.name for t in plan.trials] == [
        "vit_t16 from vit_b16 alone clip read_epoch=32 clip_kd",
        "vit_t16 from vit_b16 alone clip clip_kd",
    ]


def test_a_finished_stage_without_an_epoch_is_run_again(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    (stage,) = plan_of(storage, recipe()).stages.values()
    stage.store(storage).finish({})
    (stage,) = plan_of(storage, recipe()).stages.values()
    assert (stage.reused, stage.note) == (True, "")
    plan = plan_of(storage, recipe(), recipe(keep_epochs=(32, 64)))
    (stage,) = plan.stages.values()
    assert not stage.reused
    assert "without the student of epoch 32 and 64" in _stage_label(plan, stage)
    for epoch in (32, 64):
        name = f"metrics-epoch-{epoch:04d}.json"
        storage.write_json({}, *stage.store(storage).parts, "output", name)
    (stage,) = plan_of(storage, recipe(keep_epochs=(32, 64))).stages.values()
    assert stage.reused


@pytest.mark.parametrize("fields", [{"keep_epochs": (97,)}, {"read_epoch": 0}, {"read_epoch": 128}])
def test_an_epoch_that_is_not_trained_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"no student .* of 96"):
        recipe(**fields)


@pytest.mark.ray
def test_a_finished_stage_is_trained_again_for_an_epoch(
    tmp_path: Path, write_tar: Callable[[Path, list[Part]], Path], ray_cluster: Any
) -> None:
    from kdscale.sweep.schedule import run_stages

    write_tar(tmp_path / "0.tar", [p for i in range(16) for p in pair(f"{i:04d}", i)])
    data = DataSpec(name="pairs", urls=str(tmp_path / "0.tar"))
    benchmark = ZeroShotSpec(
        name="pairs", data=data, classnames=tuple("abcdefghij"), templates=("a {}",)
    )
    config: Any = vit().clip_config
    reads = vit().replace(clip_config=config | {"text_cfg": TEXT | {"vocab_size": 49_408}})
    fields: dict[str, Any] = {"student": reads, "loss": "clip", "data": data}
    fields |= {"global_batch_size": 8, "epochs": 3, "zero_shot": benchmark}
    fields["run"] = Execution(num_workers=0, checkpoint_every=100)
    storage, whole = Storage(str(tmp_path / "runs")), Distill(**fields)

    def run(distill: Distill) -> Path:
        (stage,) = plan_of(storage, distill, scale=TRUE_SIZE_CPU).stages.values()
        run_stages([stage], storage)
        assert is_finished(stage, storage)
        return Path(stage.store(storage).url("output"))

    first = load_file(run(whole) / "model" / WEIGHTS)
    output = run(whole.at_epoch(2))
    assert_equal(first, load_file(output / "model" / WEIGHTS))
    names = {f"{name}-epoch-0002" for name in ("model", "zero_shot", "metrics")}
    assert names <= {path.stem for path in output.iterdir()}
