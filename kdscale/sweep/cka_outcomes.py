"""How alike trials' towers and those that they are compared with see each set of images.

Reads plans and outcomes; needs neither torch nor Ray.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdscale.core.eval_config import Cka
from kdscale.sweep.outcomes import DONE, NOT_FINISHED, Outcome
from kdscale.sweep.plan import PlannedTrial
from kdscale.sweep.vlm_outcomes import VlmRow


@dataclass(frozen=True, kw_only=True)
class CkaRow:
    """One comparison of one trial.

    Attributes:
        trial: The trial's name, and of its sweep; `trial_key` is the trial's, `key` the stage's.
        images: The benchmark's name, as beside its scores; or the zero-shot set's.
        a: The trial's model.
        b: The other one.
        debiased: Of the final layers; None where undefined or not finished.
        n: Images compared on.
        score: The trial's score in that benchmark, None where it has none.
        note: Why something is undefined.
    """

    trial: str
    sweep: str
    trial_key: str
    key: str
    images: str
    tap: str
    a: str
    b: str
    state: str
    debiased: float | None = None
    biased: float | None = None
    n: int | None = None
    score: float | None = None
    note: str = ""

    def document(self) -> dict[str, Any]:
        """Returns the row as JSON."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def cka_rows(
    trials: Sequence[PlannedTrial], outcomes: Mapping[str, Outcome], vlms: Sequence[VlmRow]
) -> tuple[CkaRow, ...]:
    """Reports every comparison of the given trials, in their order.

    Args:
        trials: Planned trials.
        outcomes: {key: what the stage's directory holds}.
        vlms: Rows of the VLMs among them, for the scores.
    """
    scores = {
        (vlm.sweep, vlm.key, found.benchmark): found.score.value
        for vlm in vlms
        for found in vlm.benchmarks
        if found.score is not None
    }
    return tuple(
        _row(trial, outcomes[key], scores)
        for trial in trials
        for key in trial.path
        if isinstance(outcomes[key].stage.recipe, Cka)
    )


def _row(
    trial: PlannedTrial, outcome: Outcome, scores: Mapping[tuple[str, str, str], float]
) -> CkaRow:
    """Reports one comparison."""
    recipe, found = outcome.stage.recipe, outcome.comparison
    assert isinstance(recipe, Cka)
    images = recipe.images.name
    return CkaRow(
        trial=trial.trial.name,
        sweep=trial.sweep,
        trial_key=trial.key,
        key=outcome.stage.key,
        images=images,
        tap=recipe.tap,
        a=str(getattr(recipe.a, "name", recipe.a)),
        b=str(getattr(recipe.b, "name", recipe.b)),
        state=DONE if outcome.done else NOT_FINISHED,
        debiased=found.get("debiased"),
        biased=found.get("biased"),
        n=found.get("n"),
        score=scores.get((trial.sweep, trial.key, images)),
        note="; ".join(found.get("notes", ())),
    )
