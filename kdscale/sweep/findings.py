"""What a sweep has found: each metric's cells, and their differences to the sweep's baseline.

The rule is that of the paper's claims (`kdscale.sweep.verdicts`, docs/claims.md): differences are
paired by seed and by question, p-values are Holm's over the differences of one metric.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from kdscale.core.config import Distill
from kdscale.core.types import ConfigError
from kdscale.sweep.beside_runs import Measured
from kdscale.sweep.grid import Sweep
from kdscale.sweep.measure import numbers_of
from kdscale.sweep.naming import label
from kdscale.sweep.places import AVERAGE, CKA, Numbers, Place
from kdscale.sweep.plan import Plan
from kdscale.sweep.report import Report
from kdscale.sweep.verdicts import (
    Claim,
    Comparison,
    Contrast,
    Judged,
    Verdict,
    contrast,
    judge,
    pooled,
)

SAID = {
    "holds": "clear and positive",
    "contradicted": "clear and negative",
    "undecided": "undecided",
    "no interval": "without an interval",
    "not run": "not run",
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One metric of one sweep.

    Attributes:
        metric: As in `kdscale.sweep.places.Place`; that of a VLM names it.
        rows: Field that makes rows.
        columns: Field that makes columns.
        reference: The column that the others are compared with.
        names: The rows and the columns, in the sweep's order.
        runs: (row, column) to its runs, one a seed.
        verdict: On "there is a difference", one comparison for each cell beside the reference.
    """

    metric: str
    rows: str
    columns: str
    reference: str
    names: tuple[tuple[str, ...], tuple[str, ...]]
    runs: dict[tuple[str, str], list[Measured]]
    verdict: Verdict

    @property
    def unit(self) -> str:
        """What the numbers are in: `%`, or nothing."""
        return "" if self.metric.startswith(CKA) else "%"

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many questions or images a run was measured on, where that is one number."""
        return tuple(sorted({one.n for own in self.runs.values() for one in own if one.n}))

    @property
    def compared(self) -> tuple[str, ...]:
        """The columns beside the reference."""
        return tuple(name for name in self.names[1] if name != self.reference)

    def mean(self, row: str, column: str) -> Contrast | None:
        """Returns a cell's mean; how its seeds scatter is asked of the whole column."""
        numbers = _numbers(self.metric, self.runs)
        rows = self.names[0]
        alone = [contrast(((1.0, _place(self.metric, r, column)),), numbers) for r in rows]
        return pooled(alone, [column] * len(rows))[rows.index(row)]

    def difference(self, row: str, column: str) -> Judged:
        """Returns a cell less its row's reference."""
        name = _title(row, column, self.reference)
        return next(one for one in self.verdict.judged if one.comparison.name == name)


def find(report: Report, plan: Plan, sweep: Sweep) -> list[Finding]:
    """Compares a sweep's cells with its baseline, metric by metric.

    Args:
        report: Of that sweep, among others.
        plan: What the report was made of.
        sweep: One whose baseline is told by the columns of its table.

    Returns:
        Zero-shot accuracy, CKA and the averages of VLMs, as far as any of them is measured.

    Raises:
        ConfigError: The sweep has no such baseline.
    """
    columns = sweep.table.columns
    if set(sweep.baseline or {}) != {columns}:
        raise ConfigError(
            f"{sweep.name} has the baseline {sweep.baseline}, and its table has columns by "
            f"{columns!r}: findings are differences to one of the columns, so say "
            f"baseline={{{columns!r}: ...}} in the sweep"
        )
    assert sweep.baseline is not None
    reference = _named(columns, sweep.baseline[columns])
    found: dict[str, dict[tuple[str, str], list[Measured]]] = {}
    for cell, one in _cells(report, plan, sweep):
        own = found.setdefault(one.metric, {}).setdefault(cell, [])
        if one.seed not in {other.seed for other in own}:
            own.append(one)
    alone = sweep.baseline.get("teacher", "") is None  # such a student is compared with no teacher
    return [
        _finding(metric, runs, sweep, reference)
        for metric, runs in found.items()
        if not (alone and metric.startswith(CKA))
    ]


def _cells(report: Report, plan: Plan, sweep: Sweep) -> Iterator[tuple[tuple[str, str], Measured]]:
    """Yields every number of a sweep that is compared, with its row and column."""
    for trial in plan.trials:
        recipe = trial.trial.recipe
        student = recipe if isinstance(recipe, Distill) else recipe.vision
        if trial.sweep != sweep.name or not isinstance(student, Distill):
            continue
        fields = (sweep.table.rows, sweep.table.columns)
        row, column = (_named(name, getattr(student, name)) for name in fields)
        zero_shot = str(label(student.zero_shot))
        for one in numbers_of(trial, report, plan):
            if one.framework is not None and one.metric == AVERAGE:
                yield (row, column), replace(one, metric=f"{AVERAGE}, {one.framework} {one.llm}")
            elif one.framework is None and one.metric in (zero_shot, CKA + zero_shot):
                yield (row, column), one


def _finding(
    metric: str, runs: dict[tuple[str, str], list[Measured]], sweep: Sweep, reference: str
) -> Finding:
    """Judges one metric."""
    rows = tuple(dict.fromkeys(row for row, _ in runs))
    columns = tuple(dict.fromkeys(column for _, column in runs))
    claim = Claim(
        name=metric,
        text=f"{sweep.table.columns} changes it",
        source=sweep.name,
        comparisons=tuple(
            Comparison(
                name=_title(row, column, reference),
                terms=(
                    (1.0, _place(metric, row, column)),
                    (-1.0, _place(metric, row, reference)),
                ),
                alike=column,
            )
            for row in rows
            for column in columns
            if column != reference
        ),
        need="any",
    )
    return Finding(
        metric=metric,
        rows=sweep.table.rows,
        columns=sweep.table.columns,
        reference=reference,
        names=(rows, columns),
        runs=runs,
        verdict=judge(claim, _numbers(metric, runs)),
    )


def _named(field: str, value: Any) -> str:
    """Names a choice, as the report's table does."""
    return f"no {field}" if value is None else str(label(value))


def _title(row: str, column: str, reference: str) -> str:
    """Names a difference."""
    return f"{row}: {column} - {reference}"


def _place(metric: str, row: str, column: str) -> Place:
    """Returns what the rule knows a cell by."""
    return Place(metric=metric, model=f"{row} / {column}")


def _numbers(metric: str, runs: dict[tuple[str, str], list[Measured]]) -> Numbers:
    """Returns the runs as the rule takes them."""
    return {
        _place(metric, row, column): [one.estimate for one in own]
        for (row, column), own in runs.items()
    }


def tally(finding: Finding) -> str:
    """Says what the differences of a metric show, how large they had to be, and on how much."""
    judged = finding.verdict.judged
    if not judged:
        return f"{title_of(finding.metric)}: nothing beside {finding.reference} is finished."
    counts = [(finding.verdict.count(outcome), words) for outcome, words in SAID.items()]
    said = ", ".join(f"{count} {words}" for count, words in counts if count)
    words = (
        f"{title_of(finding.metric)}: of {len(judged)} differences to {finding.reference} {said}."
    )
    found = sorted(one.detectable for one in judged if one.detectable)
    if found:
        digits, points = (1, " points") if finding.unit else (3, "")
        ends = " to ".join(dict.fromkeys(f"{one:.{digits}f}" for one in (found[0], found[-1])))
        words += f" Each shows a true difference of {ends}{points} with a power of 0.8."
    if finding.verdict.seeds == 1:
        words += " With one seed the intervals do not know what another seed would change."
    return words


def title_of(metric: str) -> str:
    """Names a metric for people."""
    if metric.startswith(CKA):
        return "CKA with the teacher"
    if metric.startswith(AVERAGE):
        return f"Average of the 16 benchmarks ({metric.partition(', ')[2]})"
    return "Zero-shot top-1"
