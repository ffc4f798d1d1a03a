"""Which trials of a sweep are controls, and which of them belongs to a trial."""

from __future__ import annotations

from collections.abc import Sequence

from kdscale.core.config import Distill
from kdscale.sweep.grid import Sweep
from kdscale.sweep.plan import PlannedTrial


def is_baseline(planned: PlannedTrial, sweep: Sweep) -> bool:
    """Tells whether a trial is one that the others are compared with."""
    if sweep.baseline is None:
        return False
    recipe = planned.trial.recipe
    return all(getattr(recipe, name) == value for name, value in sweep.baseline.items())


def controls_of(
    planned: PlannedTrial, trials: Sequence[PlannedTrial], sweep: Sweep
) -> list[PlannedTrial]:
    """Returns the baselines of a trial's own student, seed and benchmark that differ least."""
    fixed = [n for n in ("student", "seed", "zero_shot", "data") if n not in (sweep.baseline or {})]

    def agreement(other: PlannedTrial, names: Sequence[str]) -> int:
        mine, theirs = planned.trial.recipe, other.trial.recipe
        return sum(getattr(mine, name) == getattr(theirs, name) for name in names)

    found = [
        trial
        for trial in trials
        if is_baseline(trial, sweep) and agreement(trial, fixed) == len(fixed)
    ]
    every = list(Distill.model_fields)
    best = max((agreement(trial, every) for trial in found), default=0)
    return [trial for trial in found if agreement(trial, every) == best]
