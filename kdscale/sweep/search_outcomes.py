"""What a search has found: its trials by the metric, the best first.

Needs neither torch nor Ray, but for the domains of the search itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kdscale.core.stop import EARLY
from kdscale.sweep.chosen import own_stages, stop_note
from kdscale.sweep.grid import Sweep
from kdscale.sweep.outcomes import DONE, NOT_FINISHED, Outcome
from kdscale.sweep.plan import Plan
from kdscale.sweep.search import Search
from kdscale.sweep.stage import PlannedTrial
from kdscale.sweep.vlm_outcomes import vlm_rows


@dataclass(frozen=True, kw_only=True)
class SearchRow:
    """One trial of a search.

    Attributes:
        state: `done`, `not finished`, or `stopped early at step N`.
        step: Of the value.
        value: Last value of the metric; None before the first evaluation.
        config: {searched field: value}.
    """

    name: str
    key: str
    state: str
    step: int | None
    value: float | None
    config: dict[str, Any]

    @property
    def has_ended(self) -> bool:
        """Whether nothing of it remains to be run."""
        return self.state == DONE or self.state.startswith(EARLY)


@dataclass(frozen=True, kw_only=True)
class SearchTable:
    """A search's trials, the best first, those without a value last.

    Attributes:
        fields: Fields that differ between trials.
        log_fields: Those drawn on a logarithmic scale.
        num_left: Trials that a searcher has still to choose.
    """

    sweep: str
    metric: str
    mode: str
    fields: tuple[str, ...]
    log_fields: frozenset[str]
    rows: tuple[SearchRow, ...]
    num_left: int

    @property
    def best(self) -> SearchRow | None:
        """The best of the finished trials; a stopped one was not carried through."""
        return next((r for r in self.rows if r.state == DONE and r.value is not None), None)

    def document(self) -> dict[str, Any]:
        """Returns the table as JSON."""
        best = self.best
        own = asdict(self) | {"log_fields": sorted(self.log_fields)}
        return own | {"best": None if best is None else asdict(best)}


def search_tables(
    plan: Plan, sweeps: Sequence[Sweep], outcomes: Mapping[str, Outcome]
) -> tuple[SearchTable, ...]:
    """Reports the searches among some sweeps.

    Args:
        plan: Of the sweeps.
        sweeps: Those that are reported.
        outcomes: {key: what the stage's directory holds}.
    """
    return tuple(
        _table(plan, sweep, sweep.search, outcomes) for sweep in sweeps if sweep.search is not None
    )


def _table(
    plan: Plan, sweep: Sweep, search: Search, outcomes: Mapping[str, Outcome]
) -> SearchTable:
    """Reports one search."""
    trials = [trial for trial in plan.trials if trial.sweep == sweep.name]
    rows = [_row(plan, trial, search, outcomes) for trial in trials]
    sign = -1.0 if search.mode == "max" else 1.0

    def place(row: SearchRow) -> tuple[bool, float]:
        return row.value is None, 0.0 if row.value is None else sign * row.value

    chosen = plan.searches.get(sweep.name)
    return SearchTable(
        sweep=sweep.name,
        metric=search.metric,
        mode=search.mode,
        fields=tuple(search.fields),
        log_fields=frozenset(search.log_fields()),
        rows=tuple(sorted(rows, key=place)),
        num_left=chosen.num_left if chosen else 0,
    )


def _row(
    plan: Plan, trial: PlannedTrial, search: Search, outcomes: Mapping[str, Outcome]
) -> SearchRow:
    """Reports one trial."""
    last, note = outcomes[trial.key], stop_note(plan, trial)
    state = DONE if last.done else NOT_FINISHED
    if not last.done and note is not None:
        state = f"{EARLY} at step {note['step']}"
    step, value = _value(plan, trial, search, outcomes)
    return SearchRow(
        name=trial.trial.name,
        key=trial.key,
        state=state,
        step=step,
        value=value,
        config={name: trial.trial.chosen[name] for name in search.fields},
    )


def _value(
    plan: Plan, trial: PlannedTrial, search: Search, outcomes: Mapping[str, Outcome]
) -> tuple[int | None, float | None]:
    """Returns the last value of the metric and its step."""
    if search.metric == "average":
        found = vlm_rows([trial], outcomes, plan.scale)
        return None, found[0].average if found else None
    for stage in reversed(own_stages(plan, trial, search)):
        for line in reversed(outcomes[stage.key].journal):
            value = line.get(search.metric)
            if value is not None and math.isfinite(value):
                return line["step"], float(value)
    return None, None
