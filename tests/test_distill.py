"""The distillation step: world-size invariance, accumulation, resume, modes."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from worlds import small_job, spawn, synthetic, timm_tower, vit

from kdscale.core.checkpoints import Checkpoints
from kdscale.core.config import Execution
from kdscale.core.journal import JournalReader, read_steps
from kdscale.core.stop import ask_to_stop, let_run, stopped
from kdscale.core.types import (
    CheckpointError,
    ConfigError,
    PrecisionError,
    StageStopped,
    TrainingDiverged,
)
from kdscale.eval.zeroshot import predict
from kdscale.stages.distill import DistillTask
from kdscale.stages.jobs import DistillJob
from kdscale.stages.loop import World, learning_rate, micro_batches
from kdscale.stages.run import Run

CASES = {
    "vit": {"student": vit()},
    "vit_accumulated": {
        "student": vit(),
        "run": Execution(checkpoint_every=2, log_every=1, micro_batch_size=4),
    },
    "vit_masked": {"student": vit(), "loss": {"task": 1.0, "mfd": 4.0, "ckd": 1.0, "afd": 1.0}},
    # Two statistics of eight: with fewer rows, one-pixel maps amplify rounding past 1e-5.
    "mobilevit_batchnorm": {
        "student": timm_tower("mobilevit_xxs", 320),
        "global_batch_size": 16,
        "bn_group": 8,
    },
    "swin_droppath": {"student": timm_tower("swin_tiny_patch4_window7_224", 768), "drop_path": 0.3},
}


def run_cases(world: World, root: str) -> None:
    """Trains every case for three steps into its own storage."""
    torch.set_num_threads(1)
    for name, fields in CASES.items():
        job = small_job(f"{root}/{world.size}/{name}", **fields)
        task_run = Run(job, world, lambda _: None)
        task_run.train(synthetic(job, world))
        heads = torch.cat([p.detach().reshape(-1) for p in task_run.task.heads.parameters()])
        torch.save(heads, f"{root}/heads-{world.size}-{name}-{world.rank}.pt")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("worlds")
    for size in (1, 2):
        spawn(run_cases, size, str(root))
    return root


def job_in(root: Path, size: int, name: str) -> DistillJob:
    return small_job(f"{root}/{size}/{name}", **CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_two_workers_train_as_one(trained: Path, name: str) -> None:
    alone, both = (read_steps(job_in(trained, size, name).stage) for size in (1, 2))
    assert [line["ids"] for line in alone] == [line["ids"] for line in both]
    for one, two in zip(alone, both, strict=True):
        terms = {"total", "task", "fd", "mfd", "afd", "icl", "ckd"} & set(one)
        assert len(terms) >= 4
        # AdamW divides by gradients near zero: later steps show rounding enlarged.
        within = 1e-6 if one["step"] == 1 else 1e-4
        for term in terms:
            assert math.isclose(one[term], two[term], rel_tol=within), (name, one["step"], term)


def test_accumulation_changes_nothing(trained: Path) -> None:
    whole = read_steps(job_in(trained, 1, "vit").stage)
    pieces = read_steps(job_in(trained, 2, "vit_accumulated").stage)
    losses = [[line["total"] for line in lines] for lines in (whole, pieces)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_heads_are_the_same_on_all_ranks(trained: Path, name: str) -> None:
    first, second = (torch.load(trained / f"heads-2-{name}-{rank}.pt") for rank in (0, 1))
    assert first.numel() > 0
    assert torch.equal(first, second)


def record_paper_heads(world: World, root: str) -> None:
    job = small_job(root, mode="paper")
    task = DistillTask(job, world)
    state = task.state(0)
    assert b"heads" not in state
    torch.save(task.heads.image_head.weight, f"{root}/paper-{world.rank}.pt")  # pyright: ignore


def test_paper_mode_draws_other_heads_per_rank_and_loses_them(tmp_path: Path) -> None:
    spawn(record_paper_heads, 2, str(tmp_path))
    first, second = (torch.load(tmp_path / f"paper-{rank}.pt") for rank in (0, 1))
    assert not torch.equal(first, second)


def test_resume_restores_heads_in_corrected_mode(tmp_path: Path) -> None:
    job = small_job(str(tmp_path))
    task = DistillTask(job, World())
    for batch in synthetic(job, World())(0):
        task.step(batch)
    trained = task.heads.state_dict()
    again = DistillTask(job, World())
    assert not torch.equal(
        again.heads.state_dict()["image_head.weight"], trained["image_head.weight"]
    )
    again.load_state(task.state(3))
    for name, value in again.heads.state_dict().items():
        assert torch.equal(value, trained[name]), name


def test_a_damaged_checkpoint_is_named_and_not_tried_again(tmp_path: Path) -> None:
    from kdscale.stages.worker import noting

    job = small_job(str(tmp_path), total_steps=5)

    def until_killed(start: int):
        yield from itertools.islice(synthetic(job, World())(start), 4)
        raise Killed

    first = Run(job, World(), lambda _: None)
    with pytest.raises(Killed):
        first.train(until_killed)
    first.checkpoints.wait()
    folder = tmp_path.joinpath(*job.stage.parts, "checkpoints")
    newest = folder / "step-000000004.pt"
    whole = newest.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"not a checkpoint", b"PK" + bytes(100)):
        newest.write_bytes(damaged)
        with (
            pytest.raises(CheckpointError, match=rf"{newest} is damaged .*goes on from step 2"),
            noting(job.stage),
        ):
            Run(job, World(), lambda _: None).train(synthetic(job, World()))
        assert (job.stage.failure() or {})["final"]
        job.stage.forget_failure()
    newest.unlink()
    Run(job, World(), lambda _: None).train(synthetic(job, World()))
    assert job.stage.is_done()


class Killed(Exception):
    """Stands for a process that goes away."""


def test_an_interrupted_run_continues_bit_for_bit(tmp_path: Path) -> None:
    steps = 7
    whole = small_job(str(tmp_path / "whole"), total_steps=steps)
    Run(whole, World(), lambda _: None).train(synthetic(whole, World()))
    broken = small_job(str(tmp_path / "broken"), total_steps=steps)

    def until_killed(start: int):
        for batch in synthetic(broken, World())(start):
            if batch.step == 5 and start == 0:
                raise Killed
            yield batch

    with pytest.raises(Killed):
        Run(broken, World(), lambda _: None).train(until_killed)
    Run(broken, World(), lambda _: None).train(until_killed)
    lines = JournalReader(broken.stage).new_lines()
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 5, 6, 7]
    for one, two in zip(read_steps(whole.stage), read_steps(broken.stage), strict=True):
        for name in ("ids", "total", "task", "fd", "icl", "ckd", "lr", "logit_scale"):
            assert one[name] == two[name]


def test_a_run_that_is_asked_to_stop_stops_at_a_checkpoint_and_goes_on(tmp_path: Path) -> None:
    job = small_job(str(tmp_path), total_steps=5)
    ask_to_stop(job.stage, "enough")
    with pytest.raises(StageStopped, match="enough"):
        Run(job, World(), lambda _: None).train(synthetic(job, World()))
    assert Checkpoints(job.stage, keep=1).latest_step() == 1
    assert stopped(job.stage) is None
    let_run(job.stage)
    Run(job, World(), lambda _: None).train(synthetic(job, World()))
    lines = JournalReader(job.stage).new_lines()
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert job.stage.is_done()


def test_learning_rate_matches_the_reference() -> None:
    options = {"lr": 5e-4, "warmup_steps": 2000, "total_steps": 70304}
    assert learning_rate(0, **options) == pytest.approx(2.5e-7)
    assert learning_rate(1999, **options) == pytest.approx(5e-4)
    assert learning_rate(36152, **options) == pytest.approx(2.5e-4)


def test_fp16_on_a_cpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PrecisionError, match="fp32"):
        DistillTask(small_job(str(tmp_path), precision="fp16"), World())


@pytest.mark.parametrize("micro_batch_size", [None, 4])
def test_fp16_trains_as_fp32_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro_batch_size: int | None
) -> None:
    """On a CPU, where it is slow and refused, so that no GPU is needed to find it broken."""
    monkeypatch.setattr("kdscale.stages.distill.check_precision", lambda *_: None)
    run = Execution(checkpoint_every=2, log_every=1, micro_batch_size=micro_batch_size)
    losses: dict[str, list[float]] = {}
    for precision in ("fp32", "fp16"):
        job = small_job(str(tmp_path), precision=precision, total_steps=4, run=run)
        task = DistillTask(job, World())
        # Its start, 65536, is too large for losses of this size; the first steps would be skipped.
        task.scaler.load_state_dict(task.scaler.state_dict() | {"scale": 16.0})
        losses[precision] = []
        for batch in synthetic(job, World())(0):
            if batch.step == 2:
                state = task.state(2)
                task = DistillTask(job, World())
                task.load_state(state)
                steps = {value["step"].device.type for value in task.optimizer.state.values()}
                assert steps == {"cpu"}
                assert task.scaler.get_scale() == {"fp32": 1.0, "fp16": 16.0}[precision]
            losses[precision].append(float(task.step(batch)["total"]))
    assert losses["fp16"] == pytest.approx(losses["fp32"], rel=5e-3)


def test_an_overflow_in_fp16_is_skipped_and_lowers_the_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdscale.stages.distill.check_precision", lambda *_: None)
    job = small_job(str(tmp_path), precision="fp16", total_steps=1)
    task = DistillTask(job, World())
    task.scaler.load_state_dict(task.scaler.state_dict() | {"scale": 2.0**120})
    before = [parameter.detach().clone() for parameter in task.student.model.parameters()]
    task.step(next(synthetic(job, World())(0)))
    assert task.scaler.get_scale() == 2.0**119
    for old, new in zip(before, task.student.model.parameters(), strict=True):
        assert torch.equal(old, new)


def test_micro_batches_must_divide(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="divisor"):
        micro_batches(8, 3)


def test_a_sigmoid_loss_gives_a_softmax_pair_a_bias(tmp_path: Path) -> None:
    job = small_job(str(tmp_path), loss={"sigmoid": 1.0}, teacher=None)
    task = DistillTask(job, World())
    assert [float(scale) for scale in task.scales][1:] == [-10.0]


def test_embeddings_that_are_not_numbers_are_no_prediction() -> None:
    with pytest.raises(TrainingDiverged, match="not finite"):
        predict(torch.full((2, 4), float("nan")), torch.eye(4))
