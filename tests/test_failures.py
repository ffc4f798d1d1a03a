"""Errors that are tried again and errors that are not, without Ray's processes."""

from __future__ import annotations

import pickle
import statistics
from pathlib import Path
from typing import Any

import pytest

from kdscale import Distill
from kdscale.core.causes import final_cause
from kdscale.core.scale import MINI, resolve
from kdscale.core.storage import StageStore, Storage
from kdscale.core.types import (
    DataError,
    PrecisionError,
    StageFailed,
    StageRefused,
    StorageError,
    TrainingDiverged,
)
from kdscale.data.shards import Manifest
from kdscale.stages.jobs import DistillJob
from kdscale.sweep import schedule


def job(root: Path, key: str) -> DistillJob:
    recipe = resolve(Distill(student="vit_t16", loss="clip"), MINI)
    return DistillJob("distill", key, str(root), recipe, 4, Manifest(shards=()), None, {})


class Wrapped(Exception):
    """An error as Ray hands it on."""

    def __init__(self, **inside: Any) -> None:
        super().__init__("wrapped")
        self.__dict__.update(inside)


def test_final_errors_are_found_below_what_ray_wraps_around_them() -> None:
    bad = DataError("no shard")
    assert final_cause(bad) is bad
    assert final_cause(Wrapped(cause=bad)) is bad
    assert final_cause(Wrapped(controller_failure=Wrapped(cause=bad))) is bad
    assert final_cause(Wrapped(worker_failures={0: OSError(), 1: bad})) is bad
    for error in (OSError("disk"), Wrapped(), Wrapped(worker_failures={0: OSError()})):
        assert final_cause(error) is None


def test_a_worker_notes_only_what_another_attempt_would_meet_again(tmp_path: Path) -> None:
    from kdscale.stages.worker import noting

    stage = job(tmp_path, "a").stage
    with pytest.raises(OSError, match="gone"), noting(stage):
        raise OSError("gone")
    assert stage.failure() is None
    with pytest.raises(TrainingDiverged), noting(stage):
        raise TrainingDiverged("the loss is nan")
    noted = stage.failure() or {}
    assert (noted["message"], noted["final"]) == ("TrainingDiverged: the loss is nan", True)
    stage.forget_failure()
    assert stage.failure() is None


def test_a_bug_is_told_with_its_place_in_the_process_that_met_it(tmp_path: Path) -> None:
    from kdscale.stages.worker import noting, raise_failed

    def bug() -> None:
        statistics.mean([])  # noticed inside a library

    with pytest.raises(statistics.StatisticsError) as met, noting(job(tmp_path, "a").stage):
        bug()
    assert job(tmp_path, "a").stage.failure() is None
    sent = pickle.loads(pickle.dumps(met.value))
    with pytest.raises(StageFailed) as told:
        raise_failed([job(tmp_path, "a")], Wrapped(worker_failures={0: sent}))
    place = f"({__file__}:{bug.__code__.co_firstlineno + 1}, in bug)"
    assert str(told.value).startswith("distill a failed: StatisticsError: mean requires at least")
    assert str(told.value).endswith(place)


def test_a_full_disk_is_told_in_our_words(tmp_path: Path) -> None:
    from kdscale.stages.worker import raise_failed

    full = StorageError("cannot write /x: No space left on device; free it")
    full.__cause__ = OSError(28, "No space left on device")
    for error in (full, Wrapped(cause=full), Wrapped(worker_failures={0: Wrapped(cause=full)})):
        with pytest.raises(StageFailed, match="distill a failed: StorageError: cannot write /x"):
            raise_failed([job(tmp_path, "a")], error)
        stage = job(tmp_path, "a").stage
        assert (stage.failure() or {"final": None})["final"] is False
        stage.forget_failure()


def test_a_group_that_ray_restarts_after_a_final_error_does_nothing(tmp_path: Path) -> None:
    from kdscale.stages.worker import _work, raise_failed

    jobs = [job(tmp_path, "a"), job(tmp_path, "b")]
    jobs[1].stage.fail("DataError: no shard", final=True)
    _work({"jobs": jobs, "in_group": True})
    with pytest.raises(StageRefused, match="distill b failed: DataError: no shard"):
        raise_failed(jobs, None)


def test_the_driver_notes_what_no_worker_could(tmp_path: Path) -> None:
    from kdscale.stages.worker import raise_failed

    jobs = [job(tmp_path, "a"), job(tmp_path, "b")]
    raise_failed(jobs, None)
    jobs[0].stage.finish({})
    with pytest.raises(StageFailed, match="distill b failed: OSError: gone") as failed:
        raise_failed(jobs, OSError("gone"))
    assert not isinstance(failed.value, StageRefused)
    jobs[1].stage.forget_failure()
    with pytest.raises(StageRefused, match="fp16"):
        raise_failed(jobs, Wrapped(cause=PrecisionError("fp16 on a CPU")))


def test_tune_does_not_see_what_it_must_not_try_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Trial:
        key, path = "k", ()

    class Result:
        config, error = {"trial": {"number": 0}}, None
        metrics: dict[str, Any]

    class Plan:
        stages, storage = {}, Storage(str(tmp_path))

    def refuse(*_: object) -> None:
        raise StageRefused("distill k failed: DataError: no shard")

    monkeypatch.setattr(schedule, "run_stages", refuse)
    monkeypatch.setattr(schedule, "waiting_trials", lambda _: [Trial])
    found, plan, trial = Result(), Plan(), Trial()
    found.metrics = schedule._run_trial({"trial": {"number": 0}}, plan)  # type: ignore[arg-type]
    (failure,) = schedule.failures_in([found], lambda _: trial)  # type: ignore[return-value]
    assert failure.message == "distill k failed: DataError: no shard"


def test_a_finished_stage_has_not_failed(tmp_path: Path) -> None:
    stage = StageStore(Storage(str(tmp_path)), "distill", "k")
    stage.fail("once", final=False)
    stage.finish({})
    assert stage.failure() is None
