"""What many trials cost beside their work: twice as many take about twice as long."""

from __future__ import annotations

import io
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from studies import NUM_IMAGES, Study, answers, finish, make_sweep

from kdscale.core.storage import Storage
from kdscale.sweep.plan import Plan
from kdscale.sweep.progress import Follower, Progress, print_plan
from kdscale.sweep.report import build_report
from kdscale.sweep.tracking import Tracker

FEW, MANY = 8, 16  # seeds of 5 trials


def study_of(folder: Path, seeds: int) -> Study:
    """A study that is finished."""
    folder.mkdir()
    study = Study(folder, [make_sweep(seeds=tuple(range(seeds)))])
    for number, stage in enumerate(study.plan.stages.values()):
        finish(stage, study.storage, answers(number % NUM_IMAGES))
    return study


def again(study: Study) -> float:
    """Finds everything finished, as a second run does; gives the seconds of processor time."""
    began = time.process_time()
    plan = study.planned()
    assert not plan.remaining()
    print_plan(plan, Console(file=io.StringIO(), width=160))
    build_report(plan, study.sweeps)
    return time.process_time() - began


def test_twice_as_many_finished_trials_take_about_twice_as_long(tmp_path: Path) -> None:
    taken: dict[int, float] = {}
    for seeds in (FEW, MANY):
        study = study_of(tmp_path / str(seeds), seeds)
        taken[seeds] = min(again(study) for _ in range(3))
    assert taken[MANY] < 2.6 * taken[FEW]


def test_a_stage_that_mlflow_has_costs_no_query_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    study, uri = study_of(tmp_path / "store", 1), f"sqlite:///{tmp_path}/mlflow.db"
    Tracker(uri, "little", study.plan).close()
    asked: Counter[str] = Counter()
    for name in ("search_runs", "get_run", "get_metric_history", "log_batch", "create_run"):
        _count(monkeypatch, MlflowClient, name, asked)
    tracker = Tracker(uri, "little", study.planned())
    tracker.sync()
    tracker.sync()
    assert asked == {"search_runs": 1}  # all runs at once


def test_stages_that_have_not_begun_cost_no_query_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study(tmp_path, [make_sweep(seeds=tuple(range(4)))])
    plan: Plan = study.plan
    plan.remaining()[0].store(study.storage).finish({})
    asked: Counter[str] = Counter()
    follower = Follower(plan, Progress(Console(file=io.StringIO())))
    follower.look()
    for name in ("exists", "names", "read"):
        _count(monkeypatch, Storage, name, asked)
    follower.look()
    kinds = {stage.kind for stage in plan.stages.values()}
    assert asked == {"names": len(kinds)}


def _count(patch: pytest.MonkeyPatch, owner: Any, name: str, into: Counter[str]) -> None:
    """Counts the calls of a method, which works as before."""
    original = getattr(owner, name)

    def counted(*given: Any, **named: Any) -> Any:
        into[name] += 1
        return original(*given, **named)

    patch.setattr(owner, name, counted)
