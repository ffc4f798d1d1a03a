"""Comparisons with the paper as words: grids for terminal and page, CSV and LaTeX files."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Sequence

from kdscale.sweep.beside import NOT_PRINTED, Beside, BesideTable, OurCell, said
from kdscale.sweep.grids import NONE, Grid, Words
from kdscale.sweep.paper_tables import PaperCell
from kdscale.sweep.places import CKA
from kdscale.sweep.verdicts import (
    DOES_NOT_APPLY,
    NOT_RUN,
    NOT_SUPPORTED,
    SUPPORTED,
    Comparison,
    Judged,
    Verdict,
)

TONES = {SUPPORTED: "better", NOT_SUPPORTED: "worse"}
NEEDS = {
    "all": "all have to hold",
    "any": "one suffices",
    "agree": "those that are decided have to agree",
}
SIGNS = {
    "at chance": "≈chance",
    "below chance": "<chance",
    "one answer": "=",
    "first questions": "*",
}
HOW_TO_READ = (
    "Above: as printed, with the number of its note. Below: ours, the mean over seeds, with its "
    "95 % interval, n of each seed × seeds.",
    "≈chance: the interval holds the chance level; <chance: it lies below; = more than 95 % of the "
    "answers are one and the same; * only the first questions were asked.",
)
CSV_HEAD = ("column", "paper", "ours", "low", "high", "n", "seeds", "flags", "notes")
CLAIM_HEAD = (
    "claim", "text", "source", "paper_verdict", "our_verdict", "comparison", "at_least",
    "paper_value", "paper_p", "paper_outcome", "paper_detectable",
    "our_value", "our_low", "our_high", "our_p", "our_outcome", "our_detectable", "our_seeds",
    "premise", "paper_premise_first", "paper_premise_second", "paper_premise_outcome",
    "our_premise_first", "our_premise_second", "our_premise_outcome",
)  # fmt: skip


def decimals(cell: PaperCell) -> int:
    """Returns how many digits of a number mean something: CKA has three."""
    return 3 if cell.terms[0][1].metric.startswith(CKA) else 2


def number(value: float | None, digits: int) -> str:
    """Writes a number."""
    return NONE if value is None else f"{value:.{digits}f}"


def beside_grid(table: BesideTable, *, whole: bool) -> Grid:
    """Returns a table with our number below each printed one.

    Args:
        table: The table.
        whole: Everything, or what a terminal has room for: the first columns of the rows of which
            something was run.
    """
    shown = table.paper.columns if whole else table.paper.columns[: table.paper.short]
    marks = table.marks_on(shown)
    rows: list[list[Words]] = []
    for row, ours in zip(table.paper.rows, table.ours, strict=True):
        if not whole and not any(ours):
            continue
        cells = zip(shown, row.cells, ours, strict=False)
        words = [_words(cell, own, marks.on(row, column, cell)) for column, cell, own in cells]
        rows.append([Words(", ".join(row.labels)), *words])
    left = len(table.paper.columns) - len(shown), len(table.paper.rows) - len(rows)
    parts = zip(left, ("columns", "rows that were not run"), strict=True)
    more = [f"left out: {count} {what}" for count, what in parts if count]
    return Grid(
        title=table.paper.title,
        columns=(", ".join(table.paper.label_names), *shown),
        rows=rows,
        notes=[*marks.lines(), *more],
    )


def _words(cell: PaperCell, own: OurCell | None, marks: Sequence[int]) -> Words:
    """Returns a cell: the printed number above ours."""
    notes = "".join(f" ({mark})" for mark in marks)
    printed = number(cell.printed, decimals(cell)) + notes
    if own is None:
        return Words(f"{printed}\n{NOT_RUN}", "muted")
    return Words(f"{printed}\n{ours(own, decimals(cell))}\n{counts(own)}")


def ours(own: OurCell, digits: int) -> str:
    """Writes our number with its interval."""
    if own.interval is None or not math.isfinite(own.interval.low + own.interval.high):
        return f"{own.value:.{digits}f} [no interval]"
    interval = f"[{own.interval.low:.{digits}f}, {own.interval.high:.{digits}f}]"
    return f"{own.value:.{digits}f} {interval}"


def counts(own: OurCell) -> str:
    """Writes n, seeds and flags."""
    flags = "".join(f" {SIGNS[flag]}" for flag in own.flags)
    return f"{own.counted or f'{own.n:,}'} × {own.seeds}{flags}"


def claim_grid(found: Beside) -> Grid:
    """Returns the verdicts on the paper's claims."""
    rows = [
        [
            Words(own.claim.text),
            _verdict(printed, said(printed)),
            _verdict(own, own.verdict),
            Words(_tally(own)),
            Words(NONE if own.seeds == 0 else str(own.seeds)),
            Words(number(own.detectable, 2)),
        ]
        for printed, own in zip(found.paper, found.ours, strict=True)
    ]
    return Grid(
        title="Claims of the paper",
        columns=("claim", "paper, at its n", "ours", "comparisons", "seeds", "detectable"),
        rows=rows,
        notes=[
            "Comparisons: those that hold + that are contradicted / all. Detectable: the smallest "
            "difference, in points, that every comparison would find with a power of 0.8. One "
            "seed says nothing of another training run. The rule: docs/claims.md.",
            *_inapplicable("The paper", found.paper),
            *_inapplicable("Ours", found.ours),
        ],
    )


def _inapplicable(whose: str, verdicts: Sequence[Verdict]) -> list[str]:
    """Says which comparisons do not apply, and what was measured instead of their premise."""
    names: dict[str, list[str]] = {}
    for one in (one for verdict in verdicts for one in verdict.judged):
        if one.outcome == DOES_NOT_APPLY and one.premise is not None:
            front = f"{whose}, {one.premise.comparison.name}? {premise_words(one.premise)}"
            names.setdefault(front, []).append(one.comparison.name)
    return [f"{front}. So these do not apply: {'; '.join(own)}." for front, own in names.items()]


def premise_words(premise: Judged) -> str:
    """Writes the two numbers of a premise and its outcome: `36.94 against 34.65: holds`."""
    if premise.found is None:
        return premise.outcome
    first, second = (number(part, digits_of(premise.comparison)) for part in premise.found.parts)
    return f"{first} against {second}: {premise.outcome}"


def _verdict(verdict: Verdict, words: str) -> Words:
    """Returns the cell of a verdict; one of a single seed says so."""
    seeds = " (1 seed)" if verdict.seeds == 1 and verdict.verdict in TONES else ""
    return Words(words + seeds, TONES.get(verdict.verdict, "muted"))


def _tally(verdict: Verdict) -> str:
    """Counts outcomes."""
    decided = f"{verdict.count('holds')} + {verdict.count('contradicted')}"
    apart = verdict.count(DOES_NOT_APPLY)
    words = f"; {apart} {'does' if apart == 1 else 'do'} not apply" if apart else ""
    return f"{decided} / {len(verdict.judged) - apart}{words}"


def comparison_grid(printed: Verdict, own: Verdict) -> Grid:
    """Returns the comparisons behind one claim."""
    rows = [
        [_asked(one.comparison), *_judged(said_, printed=True), *_judged(one, printed=False)]
        for said_, one in zip(printed.judged, own.judged, strict=True)
    ]
    return Grid(
        title=f"{own.claim.source}; {NEEDS[own.claim.need]}",
        columns=("comparison", "paper", "p", "outcome", "ours", "p", "outcome"),
        rows=rows,
        notes=[],
    )


def _asked(comparison: Comparison) -> Words:
    """Names a comparison and its premise."""
    premise = comparison.premise
    return Words(comparison.name + (f"\nif {premise.name}" if premise else ""))


def _judged(one: Judged, *, printed: bool) -> list[Words]:
    """Returns the cells of a comparison: difference, adjusted p, outcome with its premise."""
    premise = f"\n{premise_words(one.premise)}" if one.premise else ""
    if one.found is None:
        outcome = NOT_PRINTED if printed and one.outcome == NOT_RUN else one.outcome
        return [Words(NONE, "muted")] * 2 + [Words(outcome + premise, "muted")]
    digits = digits_of(one.comparison)
    half = one.found.half_width()
    text = f"{one.found.value:+.{digits}f}"
    if math.isfinite(half):
        low, high = one.found.value - half, one.found.value + half
        text += f" [{low:+.{digits}f}, {high:+.{digits}f}]"
    tone = {"holds": "better", "contradicted": "worse"}.get(one.outcome, "muted")
    return [Words(text), Words(number(one.p, 3)), Words(one.outcome + premise, tone)]


def digits_of(comparison: Comparison) -> int:
    """Returns how many digits of a comparison mean something: CKA, at most 1, has three."""
    return 3 if comparison.terms[0][1].metric.startswith(CKA) else 2


def table_csv(table: BesideTable) -> str:
    """Returns a table as CSV, one line a cell."""
    marks = table.marks
    lines = marks.lines()
    rows: list[Sequence[object]] = [(*table.paper.label_names, *CSV_HEAD)]
    for row, owns in zip(table.paper.rows, table.ours, strict=True):
        for column, cell, own in zip(table.paper.columns, row.cells, owns, strict=True):
            notes = " ".join(lines[mark - 1] for mark in marks.on(row, column, cell))
            rows.append((*row.labels, column, cell.printed, *_csv(own), notes))
    return _to_csv(rows)


def _csv(own: OurCell | None) -> tuple[object, ...]:
    """Returns our fields of a line."""
    if own is None:
        return None, None, None, None, 0, NOT_RUN
    low, high = (own.interval.low, own.interval.high) if own.interval else (None, None)
    return own.value, low, high, own.n, own.seeds, "; ".join(own.flags)


def claims_csv(found: Beside) -> str:
    """Returns the claims as CSV, one line a comparison."""
    rows: list[Sequence[object]] = [CLAIM_HEAD]
    for printed, own in zip(found.paper, found.ours, strict=True):
        claim = own.claim
        front = (claim.name, claim.text, claim.source, said(printed), own.verdict)
        for theirs, one in zip(printed.judged, own.judged, strict=True):
            value = theirs.found and theirs.found.value
            outcome = NOT_PRINTED if theirs.outcome == NOT_RUN else theirs.outcome
            paper = (value, theirs.p, outcome, theirs.detectable)
            compared = (*front, one.comparison.name, one.comparison.least, *paper, *_claim(one))
            rows.append((*compared, *_premises(one.comparison, theirs, one)))
    return _to_csv(rows)


def _premises(comparison: Comparison, *judged: Judged) -> Iterator[object]:
    """Yields the fields of a comparison's premise, of the paper's and of ours."""
    yield comparison.premise and comparison.premise.name
    for one in judged:
        parts = one.premise.found.parts if one.premise and one.premise.found else (None, None)
        yield from (*parts, one.premise and one.premise.outcome)


def _claim(one: Judged) -> tuple[object, ...]:
    """Returns our fields of a comparison's line."""
    if one.found is None:
        return None, None, None, None, one.outcome, None, 0
    value, half = one.found.value, one.found.half_width()
    low, high = (value - half, value + half) if math.isfinite(half) else (None, None)
    return value, low, high, one.p, one.outcome, one.detectable, one.found.seeds


def _to_csv(rows: Iterable[Sequence[object]]) -> str:
    """Writes rows as CSV."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()


def table_tex(table: BesideTable) -> str:
    """Returns a table for LaTeX (booktabs, graphicx): a line as printed above a line of ours."""
    paper, width = table.paper, len(table.paper.label_names)
    marks = table.marks
    body: list[str] = []
    for row, owns in zip(paper.rows, table.ours, strict=True):
        printed = [
            number(cell.printed, decimals(cell))
            + "".join(f"$^{{{mark}}}$" for mark in marks.on(row, column, cell))
            for column, cell in zip(paper.columns, row.cells, strict=True)
        ]
        mine = [_tex_cell(own, decimals(c)) for own, c in zip(owns, row.cells, strict=True)]
        body.append(_tex_row([*map(tex, row.labels), *printed]))
        body.append(_tex_row([*[""] * (width - 1), "ours", *mine]))
    head = _tex_row([tex(name) for name in (*paper.label_names, *paper.columns)])
    notes = [f"% {line}" for line in marks.lines()]
    return _tex(paper.title, paper.name, width * "l" + len(paper.columns) * "r", head, body, notes)


def _tex_cell(own: OurCell | None, digits: int) -> str:
    """Writes our number with half its interval, and its seeds."""
    if own is None:
        return "--"
    half = "" if own.interval is None else (own.interval.high - own.interval.low) / 2
    spread = f" $\\pm$ {half:.{digits}f}" if half != "" and math.isfinite(half) else ""
    sign = "$^{c}$" if {"at chance", "below chance", "one answer"} & set(own.flags) else ""
    return f"{own.value:.{digits}f}{spread}{sign}"


def claims_tex(found: Beside) -> str:
    """Returns the verdicts for LaTeX."""
    rows = [_tex_row([tex(words.text) for words in row]) for row in claim_grid(found).rows]
    grid = claim_grid(found)
    head = _tex_row([tex(column) for column in grid.columns])
    return _tex(grid.title, "claims", "p{7cm}llrrr", head, rows, [])


def _tex(
    title: str, name: str, columns: str, head: str, body: Sequence[str], notes: Sequence[str]
) -> str:
    """Puts a LaTeX table together."""
    lines = [
        "% needs booktabs and graphicx; ^c: at chance or one answer",
        "\\begin{table}",
        "\\centering",
        f"\\caption{{{tex(title)}}}",
        f"\\label{{tab:{name}}}",
        "\\resizebox{\\linewidth}{!}{%",
        f"\\begin{{tabular}}{{{columns}}}",
        "\\toprule",
        head,
        "\\midrule",
        *body,
        "\\bottomrule",
        "\\end{tabular}}",
        "\\end{table}",
        *notes,
    ]
    return "\n".join(lines) + "\n"


def _tex_row(cells: Sequence[str]) -> str:
    """Returns a row."""
    return " & ".join(cells) + r" \\"


def tex(text: str) -> str:
    """Escapes what LaTeX would read."""
    marks = {"\\": r"\textbackslash{}", NONE: "--"}
    return "".join(marks.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in text)
