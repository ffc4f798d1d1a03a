"""Our numbers one by one, and the places of the paper's tables that they stand in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from kdscale.analysis.stats import Interval
from kdscale.sweep.places import (
    CKA,
    IMAGENET,
    PAPER_NAMES,
    RELEASED,
    Estimate,
    Influence,
    Place,
    encoder,
    student,
)

Z = 1.959964


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One number of one run; names are roles, or what a spec of one's own is called.

    Attributes:
        framework: Recipe of the VLM; None for metrics of the encoder alone.
        teacher: None for given encoders and for students without one.
        loss: None for given encoders, as data and epochs are.
        epochs: As the recipe states them at the paper's scale.
        metric: As in `kdscale.sweep.places.Place`.
        n: Questions or images.
        interval: 95 %, over the choice of questions; None where there is none.
        chance: What guessing gives, None where that has no meaning.
        constant: More than 95 % of the answers are one and the same.
        variant: How the student's training departs from the defaults of recipes, in words.
        vlm_variant: The same of the VLM's training and scoring.
        schedule: As in `kdscale.sweep.places.Place`.
        weights_of: The student whose weights a file gave (`Pretrained`).
        limited: Only the first questions were asked.
        influence: By question, where the answers are at hand.
        counted: `n` in words, where the value is over something else than questions: `96 pairs`.
    """

    framework: str | None
    llm: str | None
    student_or_encoder: str
    teacher: str | None
    loss: str | None
    data: str | None
    epochs: int | None
    seed: int
    metric: str
    value: float
    n: int
    interval: Interval | None
    chance: float | None
    constant: bool
    variant: str = ""
    vlm_variant: str = ""
    schedule: int | None = None
    weights_of: str | None = None
    limited: bool = False
    influence: Influence | None = field(default=None, repr=False, compare=False)
    counted: str = ""

    @property
    def estimate(self) -> Estimate:
        """What the rule for claims takes."""
        error = None if self.interval is None else (self.interval.high - self.interval.low) / 2 / Z
        known = error is not None and math.isfinite(error) and error > 0
        return Estimate(
            value=self.value,
            seed=self.seed,
            standard_error=error if known else None,
            influence=self.influence,
        )


def place_of(measured: Measured) -> Place | None:
    """Returns a number's place in the paper's names; None where the paper has no such model."""
    roles = (
        measured.framework,
        measured.llm,
        measured.student_or_encoder,
        measured.teacher,
        measured.loss,
        measured.data,
    )
    names = [None if role is None else PAPER_NAMES.get(role) for role in roles]
    if any(role is not None and name is None for role, name in zip(roles, names, strict=True)):
        return None
    framework, llm, model, teacher, loss, data = names
    alone = measured.metric == IMAGENET or measured.metric.startswith(CKA)
    return Place(
        metric=measured.metric,
        framework=None if alone else framework,
        llm=None if alone else llm,
        model=str(model),
        teacher=teacher,
        loss=loss,
        data=data,
        epochs=measured.epochs,
        schedule=measured.schedule,
    )


def places_of(measured: Measured) -> tuple[Place, ...]:
    """Returns all places of a number; table 1 has a ViT-T of CLIP-ViT-B, taught or given."""
    place = place_of(measured)
    if measured.framework is None:
        return () if place is None else (place,)
    if place is None:
        given = place_of(replace(measured, student_or_encoder=measured.weights_of or ""))
        is_released = given is not None and (given.model, given.loss) == ("ViT-T", None)
        return (replace(given, model=RELEASED),) if given and is_released else ()
    taught = student(place.metric, "CLIP-ViT-B", llm=place.llm or "")
    if replace(place, framework=taught.framework) != taught:
        return (place,)
    return place, encoder(place.metric, str(place.framework), str(place.llm), RELEASED)


def runs_of(measured: Sequence[Measured]) -> dict[Place, list[Measured]]:
    """Returns every place's runs: one a seed, all of one model, given weights before others."""
    found: dict[Place, list[Measured]] = {}
    for one in sorted(measured, key=lambda one: one.weights_of is None):
        for place in places_of(one):
            own = found.setdefault(place, [])
            is_alike = not own or own[0].student_or_encoder == one.student_or_encoder
            if is_alike and one.seed not in {other.seed for other in own}:
                own.append(one)
    return found
