"""Our results beside the paper's: cells with n, seeds, interval and flags; verdicts on claims."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from kdscale.analysis.stats import Interval
from kdscale.sweep.beside_runs import Measured, places_of, runs_of
from kdscale.sweep.claims import CLAIMS, CLIP_LABELS
from kdscale.sweep.paper_notes import Marks, Note
from kdscale.sweep.paper_numbers import paper_numbers
from kdscale.sweep.paper_tables import TITLES, PaperCell, PaperTable, paper_tables
from kdscale.sweep.places import (
    AVERAGE,
    CKA,
    RELEASED,
    Numbers,
    Place,
    encoder,
)
from kdscale.sweep.verdicts import (
    NOT_RUN,
    NOT_SUPPORTED,
    SUPPORTED,
    UNDECIDED,
    Verdict,
    contrast,
    judge,
)

NOT_PRINTED = "not printed"
TAUGHT = "taught by CLIP-ViT-B on CC12M with CLIP-KD's loss, the ViT-T of table 2"
LABELS_FIT = {
    SUPPORTED: "fit the labels as printed",
    NOT_SUPPORTED: "fit swapped labels",
    UNDECIDED: "do not decide between the two readings at this n",
}


PROTOCOL = ("mode=paper", "")  # how the paper trained and asked


@dataclass(frozen=True, kw_only=True)
class OurCell:
    """Our number for a cell.

    Attributes:
        n: Questions or images, of each seed.
        seeds: Runs behind it.
        interval: 95 %; over questions, and from two seeds on over seeds as well.
        flags: `at chance`, `below chance`, `one answer`, `first questions`.
        counted: As of `Measured`.
    """

    value: float
    n: int
    seeds: int
    interval: Interval | None
    flags: tuple[str, ...]
    counted: str = ""


@dataclass(frozen=True, kw_only=True)
class BesideTable:
    """A table of the paper with our cells; None marks what was not run.

    Attributes:
        notes: What has to be known of ours.
    """

    paper: PaperTable
    ours: tuple[tuple[OurCell | None, ...], ...]
    notes: tuple[Note, ...] = ()

    @property
    def marks(self) -> Marks:
        """The notes on all of its columns."""
        return self.marks_on(self.paper.columns)

    def marks_on(self, columns: Sequence[str]) -> Marks:
        """Returns the notes on some of its columns."""
        return Marks.of(self.paper, columns, self.notes)

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
        front = {"name": self.paper.name, "title": self.paper.title}
        return {**front, "cells": cells, "notes": self.marks.lines()}


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
    """Groups results by how they were trained: the paper's protocol first, then the defaults."""
    taught = [m for m in measured if m.loss is not None]  # given encoders stand with all of them
    names = dict.fromkeys((m.variant, m.vlm_variant) for m in taught if m.framework is not None)
    taken = {variant for variant, _ in names}
    for m in taught:
        if m.framework is None and m.variant not in taken:
            names.setdefault((m.variant, ""))
    own = {vlm_variant for _, vlm_variant in names}
    names |= {("", m.vlm_variant): None for m in measured if m.vlm_variant not in own}
    ordered = sorted(names, key=lambda name: (name != PROTOCOL, name != ("", ""))) or [("", "")]
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
    known = {place for t in paper_tables() for r in t.rows for c in r.cells for _, place in c.terms}
    runs = runs_of(measured)
    numbers = {place: [one.estimate for one in own] for place, own in runs.items()}
    ours = tuple(judge(claim, numbers) for claim in CLAIMS)
    tables = tuple(
        BesideTable(
            paper=table,
            ours=tuple(tuple(_cell(c, runs, numbers) for c in row.cells) for row in table.rows),
            notes=_notes(table, runs, ours),
        )
        for table in paper_tables()
    )
    elsewhere = sum(known.isdisjoint(places_of(one)) for one in measured)
    return Beside(variant=variant, tables=tables, paper=printed, ours=ours, elsewhere=elsewhere)


def _notes(
    table: PaperTable, runs: Mapping[Place, Sequence[Measured]], ours: Sequence[Verdict]
) -> tuple[Note, ...]:
    """Returns what has to be known of our numbers in a table."""
    if table.name == "table1":
        return tuple(_released_notes(table, runs))
    if table.name == "clip_labels":
        found = next(one for one in ours if one.claim is CLIP_LABELS)
        if found.verdict in LABELS_FIT:
            seeds = "1 seed" if found.seeds == 1 else f"{found.seeds} seeds"
            text = f"By ImageNet, ours {LABELS_FIT[found.verdict]}; {seeds}"
            return (Note(tables=(table.name,), text=text, source=f"claim {found.claim.name}"),)
    return ()


def _released_notes(table: PaperTable, runs: Mapping[Place, Sequence[Measured]]) -> Iterator[Note]:
    """Yields which ViT-T of ours fills the rows of CLIP-KD's released one."""
    rows: dict[str, list[str]] = {}
    for framework, llm, model in (row.labels for row in table.rows):
        own = runs.get(encoder(AVERAGE, framework, llm, model), ())
        if model == RELEASED and own:
            given = own[0].weights_of and f"the given weights, {own[0].student_or_encoder}"
            rows.setdefault(given or TAUGHT, []).append(f"{framework} with {llm}")
    for text, where in rows.items():
        here = f" ({', '.join(where)})" if len(rows) > 1 else ""
        yield Note(
            tables=(table.name,),
            rows=(RELEASED,),
            columns=(TITLES[AVERAGE],),
            text=f"Ours: {text}{here}",
            source="docs/claims.md",
        )


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
        counted=of_place[0].counted,
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
