"""What a searcher has chosen so far: kept in storage, so that a second run goes on from there.

`searches/<sweep>/<hash>.json` holds events in their order: a configuration was chosen, a trial of
it ended. The hash stands for what the metric of a configuration depends on (the recipe's stages,
the space), so that another scale or data set begins another search.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from kdscale.core.config import Distill
from kdscale.core.stop import stopped
from kdscale.core.storage import Storage
from kdscale.core.types import ConfigError
from kdscale.sweep.grid import Sweep
from kdscale.sweep.search import Config, Search, describe_space, followed_kind

if TYPE_CHECKING:
    from kdscale.sweep.plan import Plan, Planner
    from kdscale.sweep.stage import PlannedTrial, Stage


@dataclass
class Chosen:
    """The record of one search.

    Attributes:
        parts: Where in the storage it is kept.
        probe: Plan of the sweep's recipe as it stands: the data and resources of all trials.
        events: `{"chosen": config}` or `{"ended": number, "value": ..., "stopped": ...}`.
    """

    storage: Storage
    parts: tuple[str, ...]
    num_trials: int
    probe: Plan
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def configs(self) -> list[Config]:
        """The configurations, in the order in which they were chosen."""
        return [event["chosen"] for event in self.events if "chosen" in event]

    @property
    def ended(self) -> dict[int, dict[str, Any]]:
        """{number of a configuration: how its trial ended}."""
        return {event["ended"]: event for event in self.events if "ended" in event}

    @property
    def num_left(self) -> int:
        """How many are to be chosen still."""
        return max(0, self.num_trials - len(self.configs))

    @property
    def unfinished(self) -> list[int]:
        """Numbers of the configurations whose trials have not ended."""
        return [number for number in range(len(self.configs)) if number not in self.ended]

    def choose(self, config: Config) -> int:
        """Adds a configuration and returns its number; ConfigError if it cannot be kept."""
        self._add({"chosen": as_kept(config)})
        return len(self.configs) - 1

    def end(self, number: int, value: float | None, is_stopped: bool) -> None:
        """Notes that a configuration's trial has ended, with the last value of the metric."""
        self._add({"ended": number, "value": value, "stopped": is_stopped})

    def _add(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        self.storage.write_json(self.events, *self.parts)


def as_kept(config: Any) -> Any:
    """Returns a configuration as it is read again from the record.

    Raises:
        ConfigError: If JSON cannot hold it.
    """
    try:
        return json.loads(json.dumps(config))
    except TypeError as error:
        raise ConfigError(
            f"a searcher's choices are kept as JSON, which {config!r} is not: search names and "
            "numbers"
        ) from error


def configs_of(planner: Planner, sweep: Sweep) -> Sequence[Config] | None:
    """Returns what a searcher has chosen so far; None where a sweep has no searcher.

    The plan then says how many are to come, and which data they lack.

    Raises:
        ConfigError: If the sweep has more than one trial a configuration.
    """
    search = sweep.search
    if search is None or search.searcher is None:
        return None
    plan = planner.plan
    probe = type(planner)(plan.storage, plan.scale, planner.overrides)
    probe.add(replace(sweep, search=None))
    if len(probe.plan.trials) != 1:
        raise ConfigError(
            f"a searcher wants one result a configuration, and {sweep.name!r} has "
            f"{len(probe.plan.trials)} recipes times seeds: leave one, or draw without a searcher"
        )
    planner.expect_data(*probe.names)
    plan.missing += probe.plan.missing
    parts = ("searches", sweep.name, f"{_digest(search, probe.plan)}.json")
    known = plan.storage.exists(*parts)
    events: list[dict[str, Any]] = plan.storage.read_json(*parts) if known else []
    chosen = Chosen(plan.storage, parts, search.num_trials, probe.plan, events)
    plan.searches[sweep.name] = chosen
    return chosen.configs


def _digest(search: Search, probe: Plan) -> str:
    """Hashes what a configuration's result depends on beside the configuration."""
    space = describe_space(search.space)
    document = {"key": probe.trials[0].key, "space": space, "of": [search.metric, search.mode]}
    text = json.dumps(document, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def check_search(plan: Plan, sweep: Sweep) -> None:
    """Refuses a search whose trials cannot have its metric, or that would all be cut short.

    Raises:
        ConfigError: Saying what to change.
    """
    search = sweep.search
    if search is None:
        return
    known = plan.searches[sweep.name].probe if sweep.name in plan.searches else plan
    for trial in (trial for trial in known.trials if trial.sweep == sweep.name):
        stage = followed_stage(known, trial, search)
        recipe = stage.recipe
        needs = search.metric in ("zero_shot_top1", "cka_debiased", "cka_biased")
        if isinstance(recipe, Distill) and needs and recipe.zero_shot is None:
            raise ConfigError(f"{sweep.name}: {search.metric} needs a recipe with zero_shot")
        _check_horizon(search.scheduler, stage)


def _check_horizon(scheduler: Any, stage: Stage) -> None:
    """Refuses a scheduler that would end every trial before its last step."""
    horizon = getattr(scheduler, "_max_t", None)
    unit = getattr(scheduler, "_time_attr", None)
    total = {"step": stage.total_steps, "progress": 100}.get(str(unit))
    if horizon is not None and total is not None and horizon < total:
        raise ConfigError(
            f"{type(scheduler).__name__} ends every trial at {unit} {horizon} (its max_t), and "
            f"{stage.name!r} goes to {total}: say max_t={total}, or time_attr='progress' with "
            "max_t=100"
        )


def followed_stage(plan: Plan, trial: PlannedTrial, search: Search) -> Stage:
    """Returns the stage of a trial that a scheduler follows."""
    kind = followed_kind(search)
    stages = [plan.stages[key] for key in trial.path]
    found = [stage for stage in stages if stage.kind == kind]
    return found[-1] if found else stages[-1]


def own_stages(plan: Plan, trial: PlannedTrial, search: Search) -> list[Stage]:
    """Returns the stages that a trial's metric may come from: the followed one and those after."""
    stages = [plan.stages[key] for key in trial.path]
    return stages[stages.index(followed_stage(plan, trial, search)) :]


def stop_note(plan: Plan, trial: PlannedTrial) -> dict[str, Any] | None:
    """Returns where and why a trial was stopped early, None where it was not."""
    for key in trial.path:
        note = stopped(plan.stages[key].store(plan.storage))
        if note is not None:
            return note
    return None


def split(plan: Plan, sweeps: Sequence[Sweep], resume_stopped: bool) -> tuple[Plan, list[Sweep]]:
    """Separates what runs by itself from the sweeps that a scheduler or searcher steers.

    Args:
        plan: Of all of them.
        sweeps: Those that it was made from.
        resume_stopped: Go on with stopped trials, by themselves.

    Returns:
        The plan of the former, and the latter.
    """
    steered = [sweep for sweep in sweeps if sweep.search is not None and sweep.search.is_steered]
    names = {sweep.name for sweep in steered}
    trials = [
        trial
        for trial in plan.trials
        if trial.sweep not in names or (resume_stopped and stop_note(plan, trial) is not None)
    ]
    keys = {key for trial in trials for key in trial.path}
    stages = {key: stage for key, stage in plan.stages.items() if key in keys}
    return replace(plan, trials=trials, stages=stages), steered


def is_left(plan: Plan, sweeps: Sequence[Sweep], resume_stopped: bool) -> bool:
    """Tells whether anything remains to be run or chosen."""
    alone, steered = split(plan, sweeps, resume_stopped)
    return bool(
        alone.remaining()
        or any(unended(plan, sweep.name) for sweep in steered)
        or any(chosen.num_left for chosen in plan.searches.values())
    )


def unended(plan: Plan, sweep: str) -> list[PlannedTrial]:
    """Returns a sweep's trials that are neither finished nor stopped early."""
    return [
        trial
        for trial in plan.trials
        if trial.sweep == sweep and not is_finished(plan, trial) and stop_note(plan, trial) is None
    ]


def is_finished(plan: Plan, trial: PlannedTrial) -> bool:
    """Tells whether a trial has its outcomes; stages that those came from may be gone."""
    path = [plan.stages[key] for key in trial.path]
    measured = ("evaluate", "answers", "cka")
    wanted = plan.redo | {trial.key}
    return all(s.reused for s in path if s.key in wanted or s.kind in measured)
