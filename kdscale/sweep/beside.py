"""Our results beside the paper's: cells with n, seeds, interval and flags; verdicts on claims."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from kdscale.analysis.stats import Interval
from kdscale.sweep.claims import CLAIMS
from kdscale.sweep.paper_notes import Marks
from kdscale.sweep.paper_numbers import paper_numbers
from kdscale.sweep.paper_tables import PaperCell, PaperTable, paper_tables
from kdscale.sweep.places import (
    CKA,
    IMAGENET,
    PAPER_NAMES,
    Estimate,
    Influence,
    Numbers,
    Place,
)
from kdscale.sweep.verdicts import NOT_RUN, Verdict, contrast, judge

Z = 1.959964
NOT_PRINTED = "not printed"


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
        limited: Only the first questions were asked.
        influence: By question, where the answers are at hand.
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
    limited: bool = False
    influence: Influence | None = field(default=None, repr=False, compare=False)

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
    )


@dataclass(frozen=True, kw_only=True)
class OurCell:
    """Our number for a cell.

    Attributes:
        n: Questions or images, of each seed.
        seeds: Runs behind it.
        interval: 95 %; over questions, and from two seeds on over seeds as well.
        flags: `at chance`, `below chance`, `one answer`, `first questions`.
    """

    value: float
    n: int
    seeds: int
    interval: Interval | None
    flags: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class BesideTable:
    """A table of the paper with our cells; None marks what was not run."""

    paper: PaperTable
    ours: tuple[tuple[OurCell | None, ...], ...]

    @property
    def num_run(self) -> int:
        """Cells that have a number of ours."""
        return sum(cell is not None for row in self.ours for cell in row)

    def document(self) -> dict[str, Any]:
        """Returns the table as JSON, one entry a cell."""
        cells = [
            {
                "labels": row.labels,
                "column": column,
                "paper": cell.printed,
                "ours": own and asdict(own),
            }
            for row, owns in zip(self.paper.rows, self.ours, strict=True)
            for column, cell, own in zip(self.paper.columns, row.cells, owns, strict=True)
        ]
        notes = Marks.of(self.paper, self.paper.columns).lines()
        return {"name": self.paper.name, "title": self.paper.title, "cells": cells, "notes": notes}


@dataclass(frozen=True, kw_only=True)
class Beside:
    """All tables and claims for results that were trained alike.

    Attributes:
        variant: How all of them depart from the defaults of recipes; empty where they do not.
        paper: Verdicts on the printed numbers.
        ours: Verdicts on ours, in the same order.
        elsewhere: Numbers of ours that stand in no table of the paper.
    """

    variant: str
    tables: tuple[BesideTable, ...]
    paper: tuple[Verdict, ...]
    ours: tuple[Verdict, ...]
    elsewhere: int

    def document(self) -> dict[str, Any]:
        """Returns all as JSON."""
        claims = [
            {
                "name": own.claim.name,
                "claim": own.claim.text,
                "source": own.claim.source,
                "paper": said(printed),
                "ours": own.verdict,
                "seeds": own.seeds,
                "detectable": own.detectable,
            }
            for printed, own in zip(self.paper, self.ours, strict=True)
        ]
        return {
            "variant": self.variant,
            "tables": [table.document() for table in self.tables],
            "claims": claims,
            "elsewhere": self.elsewhere,
        }


def said(verdict: Verdict) -> str:
    """Names the verdict on printed numbers, of which a part may not be printed."""
    return NOT_PRINTED if verdict.verdict == NOT_RUN else verdict.verdict


def beside(measured: Sequence[Measured]) -> tuple[Beside, ...]:
    """Puts results beside the paper, separately for each way of training.

    Args:
        measured: Results; of several with the same names, metric and seed the first counts.

    Returns:
        One comparison for each variant, at least one; results of students alone stand with every
        VLM of the same students.
    """
    printed = tuple(judge(claim, paper_numbers()) for claim in CLAIMS)
    return tuple(
        _beside(", ".join(filter(None, names)), group, printed)
        for names, group in _variants(measured).items()
    )


def _variants(measured: Sequence[Measured]) -> dict[tuple[str, str], list[Measured]]:
    """Groups results by how they were trained; defaults come first."""
    taught = [m for m in measured if m.loss is not None]  # given encoders stand with all of them
    names = dict.fromkeys((m.variant, m.vlm_variant) for m in taught if m.framework is not None)
    taken = {variant for variant, _ in names}
    for m in taught:
        if m.framework is None and m.variant not in taken:
            names.setdefault((m.variant, ""))
    own = {vlm_variant for _, vlm_variant in names}
    names |= {("", m.vlm_variant): None for m in measured if m.vlm_variant not in own}
    ordered = sorted(names, key=lambda name: name != ("", "")) or [("", "")]
    return {
        name: [
            m
            for m in measured
            if (m.variant == name[0] or m.loss is None)
            and (m.framework is None or m.vlm_variant == name[1])
        ]
        for name in ordered
    }


def _beside(variant: str, measured: Sequence[Measured], printed: tuple[Verdict, ...]) -> Beside:
    """Compares results that were trained alike."""
    runs: dict[Place, list[Measured]] = {}
    elsewhere = 0
    known = {place for t in paper_tables() for r in t.rows for c in r.cells for _, place in c.terms}
    for one in measured:
        place = place_of(one)
        elsewhere += place not in known
        if place is not None:
            own = runs.setdefault(place, [])
            if one.seed not in {other.seed for other in own}:
                own.append(one)
    numbers = {place: [one.estimate for one in own] for place, own in runs.items()}
    tables = tuple(
        BesideTable(
            paper=table,
            ours=tuple(tuple(_cell(c, runs, numbers) for c in row.cells) for row in table.rows),
        )
        for table in paper_tables()
    )
    ours = tuple(judge(claim, numbers) for claim in CLAIMS)
    return Beside(variant=variant, tables=tables, paper=printed, ours=ours, elsewhere=elsewhere)


def _cell(
    cell: PaperCell, runs: Mapping[Place, Sequence[Measured]], numbers: Numbers
) -> OurCell | None:
    """Returns our number for a cell, None where a part of it was not run."""
    found = contrast(cell.terms, numbers)
    if found is None:
        return None
    of_place = runs[cell.terms[0][1]]
    is_single = len(cell.terms) == 1
    interval = None
    own = of_place[0].interval
    if is_single and len(of_place) == 1:
        interval = own if own is not None and math.isfinite(own.low + own.high) else None
    elif math.isfinite(half := found.half_width()):
        interval = Interval(found.value - half, found.value + half)
        if is_single and not cell.terms[0][1].metric.startswith(CKA):
            interval = Interval(max(0.0, interval.low), interval.high)
    return OurCell(
        value=found.value,
        n=of_place[0].n,
        seeds=found.seeds,
        interval=interval,
        flags=_flags(of_place, interval) if is_single else (),
    )


def _flags(runs: Sequence[Measured], interval: Interval | None) -> tuple[str, ...]:
    """Names what makes a number say less than it seems to."""
    flags: list[str] = []
    chances = [run.chance for run in runs if run.chance is not None]
    if chances and interval is not None:
        chance = fmean(chances)
        if interval.high < chance:
            flags.append("below chance")
        elif interval.low <= chance:
            flags.append("at chance")
    if all(run.constant for run in runs):
        flags.append("one answer")
    if any(run.limited for run in runs):
        flags.append("first questions")
    return tuple(flags)
