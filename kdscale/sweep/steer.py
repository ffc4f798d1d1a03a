"""Searches under Ray Tune's schedulers and searchers.

A trial's process follows the journal of the stage that is searched and reports its evaluations, so
that a scheduler can stop the trial: it writes a checkpoint, ends, and frees what it holds.
Trials that are finished or stopped already tell their journals again, since a scheduler compares
trials with each other.
"""

# pyright: basic
# (Ray carries too few types for strict checking)
from __future__ import annotations

import copy
import os
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
import ray.tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from kdscale.core.journal import JournalReader, Line
from kdscale.core.lease import own_token
from kdscale.core.stop import ask_attempt_to_stop, stopped
from kdscale.core.storage import Storage
from kdscale.core.types import ConfigError, KdscaleError, StageStopped, StorageError
from kdscale.sweep.chosen import is_finished, own_stages, unended
from kdscale.sweep.fitting import concurrent_trials, sharing_cores, trial_resources
from kdscale.sweep.grid import Sweep
from kdscale.sweep.plan import Plan, Planner
from kdscale.sweep.prepare import prepare
from kdscale.sweep.schedule import (
    REFUSED,
    TrialFailure,
    cluster_resources,
    failures_in,
    number_in,
    numbered,
    refusal,
    run_config,
    run_stages,
    ship_own_losses,
    start_ray,
)
from kdscale.sweep.search import Search
from kdscale.sweep.stage import PlannedTrial, Stage
from kdscale.sweep.suggest import Suggested

LOOK_EVERY_S = 0.5
OWN = {"step", "epoch", "ids", "attempt", "time"}  # of a journal line, beside its metrics


@dataclass(frozen=True)
class Work:
    """What a trial's process is told.

    Attributes:
        stages: The trial's path.
        own: Of these, the followed stage and those after it.
        metric: What is reported.
        run: Name under which the driver's run may be asked to stop.
        finished: Nothing is to be run; inputs of its outcome may be gone.
    """

    trial: PlannedTrial
    stages: tuple[Stage, ...]
    own: tuple[Stage, ...]
    storage: Storage
    metric: str
    run: str
    finished: bool

    def __str__(self) -> str:
        return self.trial.key

    @property
    def followed(self) -> Stage:
        """The stage whose evaluations are reported, and which may be stopped."""
        return self.own[0]

    @classmethod
    def of(cls, plan: Plan, trial: PlannedTrial, search: Search, run: str = "") -> Work:
        """Returns what to tell of one of a plan's trials."""
        path = tuple(plan.stages[key] for key in trial.path)
        own = tuple(own_stages(plan, trial, search))
        finished = is_finished(plan, trial)
        return cls(trial, path, own, plan.storage, search.metric, run, finished)

    def last(self) -> dict[str, Any]:
        """Returns the metric's last value, by the last of the trial's own stages that has it."""
        for stage in reversed(self.own):
            lines = JournalReader(stage.store(self.storage)).new_lines()
            lines = [line for line in lines if line.get(self.metric) is not None]
            if lines:
                return metrics_of(max(lines, key=lambda line: line["step"]), stage)
        return {}


def run_search(
    plan: Plan,
    sweep: Sweep,
    say: Callable[[str], None],
    is_over: Callable[[], bool],
    run: str = "",
) -> list[TrialFailure]:
    """Runs what is left of a search: its unfinished trials, and what a searcher suggests.

    Args:
        plan: Of the sweep; what is suggested is added to it.
        sweep: A sweep whose search is steered.
        say: Tells people of data that are prepared.
        is_over: Whether nothing more is to be begun.
        run: As of `run_plan`.

    Returns:
        Trials that failed.

    Raises:
        ImpossibleResources: Before anything starts.
        ConfigError: If scheduler and searcher do not fit the search.
    """
    search, chosen = sweep.search, plan.searches.get(sweep.name)
    assert search is not None
    left = chosen.unfinished or chosen.num_left if chosen else unended(plan, sweep.name)
    if not left or is_over():
        return []
    probe = chosen.probe if chosen else plan
    ship_own_losses(probe)
    start_ray()
    stages = probe.remaining() or list(probe.stages.values())
    at_once = concurrent_trials(stages, *cluster_resources())
    options: dict[str, Any] = {"max_concurrent_trials": at_once}
    if chosen is None:
        shared = sharing_cores(plan, at_once, os.cpu_count() or 1)
        planned = [trial for trial in plan.trials if trial.sweep == sweep.name]
        works = [Work.of(shared, trial, search, run) for trial in planned]
        return _fit(search, works, stages, options)
    prepare(probe, say)

    def work_of(config: Mapping[str, Any]) -> Work:
        added, trial = _added(plan, sweep, config)
        prepare(added, say)
        return Work.of(sharing_cores(added, at_once, os.cpu_count() or 1), trial, search, run)

    options["search_alg"] = Suggested(_fresh(search.searcher), search, chosen, work_of, is_over)
    options["num_samples"] = len(chosen.unfinished) + chosen.num_left
    return _fit(search, [], stages, options)


def _added(plan: Plan, sweep: Sweep, config: Mapping[str, Any]) -> tuple[Plan, PlannedTrial]:
    """Plans a configuration's trial, and adds it to a plan that others may be reading."""
    planner = Planner(plan.storage, plan.scale, plan.overrides)
    planner.add_trials(sweep.name, sweep.trials(plan.overrides, [config]))
    (trial,) = planner.plan.trials
    plan.stages = {**planner.plan.stages, **plan.stages}
    if all(trial.key != known.key or known.sweep != sweep.name for known in plan.trials):
        plan.trials = [*plan.trials, trial]
    return planner.plan, trial


def _fit(
    search: Search, works: Sequence[Work], stages: Sequence[Stage], options: dict[str, Any]
) -> list[TrialFailure]:
    """Runs one Tune experiment; the configurations are given, or a searcher's."""
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"  # a refused trial has no metric
    given = {"trial": numbered(map(str, works))} if works else {}
    scheduler = Graceful(_fresh(search.scheduler or FIFOScheduler()), works, search)
    with tempfile.TemporaryDirectory() as scratch:
        results = ray.tune.Tuner(
            ray.tune.with_resources(
                ray.tune.with_parameters(_run_trial, works=list(works)), trial_resources(stages)
            ),
            param_space=given,
            tune_config=ray.tune.TuneConfig(
                metric=search.metric,
                mode=search.mode,
                scheduler=scheduler,
                reuse_actors=True,
                trial_name_creator=_name,
                trial_dirname_creator=_name,
                **options,
            ),
            run_config=run_config(scratch),
        ).fit()
    return failures_in(results, lambda config: _work(config, works).trial)


def _fresh(steering: Any) -> Any:
    """Returns a scheduler or searcher as the sweep file made it: a run changes it."""
    try:
        return copy.deepcopy(steering)
    except Exception:  # one that holds a lock or a connection is used as it is
        return steering


def _work(config: Mapping[str, Any], works: Sequence[Work]) -> Work:
    """Returns a trial's work: its searcher's, or one of those that were planned."""
    return config["work"] if "work" in config else works[number_in(config)]


def _name(trial: Any) -> str:
    """Names a trial for Tune: by its key."""
    config = trial.config
    return str(config["work"]) if "work" in config else config["trial"]["key"]


def _run_trial(config: dict[str, Any], works: Sequence[Work]) -> dict[str, Any]:
    """Runs one trial, or tells again what it has found; on a Tune actor."""
    work = _work(config, works)
    found: dict[str, Any] = {"key": work.trial.key}
    with Reporter(work):
        try:
            if not work.finished and stopped(work.followed.store(work.storage)) is None:
                run_stages(work.stages, work.storage, work.run)
        except StageStopped:
            if stopped(work.followed.store(work.storage)) is None:
                return found  # it is the sweep that stops: this trial goes on another time
        except KdscaleError as error:
            found[REFUSED] = refusal(error)
    found["stopped"] = stopped(work.followed.store(work.storage)) is not None
    return work.last() | found


class Reporter:
    """Reports the evaluations of a trial's followed stage to Tune from a thread, each step once.

    Args:
        work: The trial.
    """

    def __init__(self, work: Work) -> None:
        self._work, self._last = work, 0
        self._reader = JournalReader(work.followed.store(work.storage))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True, name="reporter")

    def __enter__(self) -> Reporter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _loop(self) -> None:
        while not self._stop.wait(LOOK_EVERY_S):
            self._look()
        self._look()

    def _look(self) -> None:
        """Reports new lines; a storage fault is left to the next look."""
        stage = self._work.followed
        lines: list[Line] = []
        with suppress(OSError, StorageError):
            lines = self._reader.new_lines()
        for line in lines:
            if line["step"] > self._last and self._counts(line):
                self._last = line["step"]
                token = _own_lease(stage, self._work.storage)
                ray.tune.report(metrics_of(line, stage) | {"lease": token})

    def _counts(self, line: Line) -> bool:
        """Tells whether a line is of a checkpoint, and holds the metric."""
        stage, step = self._work.followed, line["step"]
        every = stage.recipe.run.checkpoint_every if stage.recipe.run else 1
        at_checkpoint = step % every == 0 or step == stage.total_steps
        return at_checkpoint and line.get(self._work.metric) is not None


def metrics_of(line: Line, stage: Stage) -> dict[str, Any]:
    """Returns what a journal line measures, its step, and how far that is in per cent."""
    numbers = {k: v for k, v in line.items() if k not in OWN and isinstance(v, int | float)}
    progress = 100 * line["step"] / (stage.total_steps or line["step"])
    return numbers | {"step": line["step"], "progress": progress}


def _own_lease(stage: Stage, storage: Storage) -> str:
    """Returns the token of a stage's lease where this process holds it, else nothing."""
    with suppress(OSError, StorageError):
        return own_token(stage.store(storage)) or ""
    return ""


class Graceful(TrialScheduler):
    """A scheduler whose stops let a trial write a checkpoint and end, in place of killing it.

    A pause is a stop, too: a stage can be taken up again at any time.

    Args:
        scheduler: Decides.
        works: The trials that were planned.
        search: Metric and mode.
    """

    _supports_buffered_results = False

    def __init__(self, scheduler: TrialScheduler, works: Sequence[Work], search: Search) -> None:
        super().__init__()
        self._scheduler, self._works, self._search = scheduler, works, search
        self._seen: dict[str, dict[str, Any]] = {}
        self._reasons: dict[str, str] = {}
        if not scheduler.set_search_properties(search.metric, search.mode):
            raise ConfigError(
                f"{type(scheduler).__name__} names a metric or mode of its own; the search's are "
                f"{search.metric!r} and {search.mode!r}"
            )

    @property
    def metric(self) -> str | None:
        """What the scheduler compares."""
        return self._search.metric

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Takes metric and mode, which the scheduler has got already."""
        return True

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Passes on."""
        self._scheduler.on_trial_add(tune_controller, trial)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Passes on."""
        self._scheduler.on_trial_error(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Passes evaluations on, each once; a decision to stop becomes a request."""
        name = trial.trial_id
        if name in self._reasons:
            self._ask(trial, result)
            return self.CONTINUE
        step = result.get("step")
        if "lease" not in result or step <= self._seen.get(name, {"step": 0})["step"]:
            return self.CONTINUE  # what a trial says at its end it has said before
        self._seen[name] = result
        decision = self._scheduler.on_trial_result(tune_controller, trial, result)
        if decision == self.CONTINUE or result["progress"] >= 100:
            return self.CONTINUE
        value, metric = result[self._search.metric], self._search.metric
        self._reasons[name] = f"{type(self._scheduler).__name__} at step {step}, {metric} {value:g}"
        self._ask(trial, result)
        return self.CONTINUE

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Passes on, with the trial's last evaluation."""
        last = self._seen.get(trial.trial_id, {})
        self._scheduler.on_trial_complete(tune_controller, trial, last)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """Passes on."""
        self._scheduler.on_trial_remove(tune_controller, trial)

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """Passes on."""
        return self._scheduler.choose_trial_to_run(tune_controller)

    def debug_string(self) -> str:
        """Passes on."""
        return self._scheduler.debug_string()

    def _ask(self, trial: Any, result: dict[str, Any]) -> None:
        """Asks a trial to stop, if it runs its stage itself: another sweep may be at it."""
        if token := result.get("lease"):
            work = _work(trial.config, self._works)
            stage = work.followed.store(work.storage)
            ask_attempt_to_stop(stage, self._reasons[trial.trial_id], token)
