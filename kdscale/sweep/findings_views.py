"""Findings for people: tables for the terminal, and blocks of a Markdown page with a plot.

A page belongs to people: only what stands between a sweep's markers is written anew, so that
conclusions beside the numbers stay.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from kdscale.sweep.figures import COLOURS, INK, legend_entry, new_figure, put_legend, quiet, to_png
from kdscale.sweep.findings import Finding, tally, title_of
from kdscale.sweep.grids import NONE, Grid, Words
from kdscale.sweep.verdicts import Contrast

TONES = {"holds": "better", "contradicted": "worse"}
RESULTS = {"holds": "higher", "contradicted": "lower"}
IMAGES = "images"
LINE_IN = 0.24


def digits_of(finding: Finding) -> int:
    """Returns the digits of a metric that mean something."""
    return 1 if finding.unit else 3


def finding_grid(finding: Finding) -> Grid:
    """Returns one metric's table: a row for each difference to the reference."""
    unit = f", {finding.unit}" if finding.unit else ""
    columns = (finding.rows, finding.columns, "mean", finding.reference, "change", "p")
    return Grid(
        title=f"{title_of(finding.metric)}{unit} ({_behind(finding)})",
        columns=(*columns, "result", "detects"),
        rows=[
            _row_of(finding, row, column) for row in finding.names[0] for column in finding.compared
        ],
        notes=[tally(finding)],
    )


def _behind(finding: Finding) -> str:
    """Says how many runs and questions are behind a cell."""
    sizes = " or ".join(f"{size:,}" for size in finding.sizes)
    seeds = sorted({len(own) for own in finding.runs.values()})
    words = f"{' or '.join(map(str, seeds))} seed{'' if seeds == [1] else 's'}"
    return f"n={sizes} a run, {words}" if sizes else words


def _row_of(finding: Finding, row: str, column: str) -> list[Words]:
    """Writes a cell, its row's reference, and the difference with what it shows."""
    digits = digits_of(finding)
    judged = finding.difference(row, column)
    means = [finding.mean(row, name) for name in (column, finding.reference)]
    own, reference = (Words(NONE if mean is None else _measured(mean, digits)) for mean in means)
    words = [Words(row), Words(column), own, reference]
    if judged.found is None:
        return [*words, *map(Words, (NONE, NONE, "not run", NONE))]
    p, detects = judged.p, judged.detectable
    outcome = RESULTS.get(judged.outcome, judged.outcome)
    return [
        *words,
        Words(_measured(judged.found, digits, "+")),
        Words(NONE if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"),
        Words(outcome, TONES.get(judged.outcome, "")),
        Words(NONE if detects is None else f"{detects:.{digits}f}"),
    ]


def _measured(found: Contrast, digits: int, sign: str = "") -> str:
    """Writes a value with half of its 95 % interval, where it has one."""
    half = found.half_width()
    more = f" ± {half:.{digits}f}" if math.isfinite(half) else ""
    return f"{found.value:{sign}.{digits}f}{more}"


def findings_figure(findings: Sequence[Finding]) -> Figure:
    """Draws every difference with its 95 % interval, a panel for each metric."""
    lines = max(len(one.names[0]) * len(one.compared) for one in findings)
    figure = new_figure(LINE_IN * lines + 1.5)
    grid: Any = figure.subplots(1, len(findings), squeeze=False, sharey=True)
    for axes, finding in zip(grid[0], findings, strict=True):
        unit = "points" if finding.unit else "of 1"
        quiet(axes, f"less {finding.reference}, {unit}")
        axes.set_title(title_of(finding.metric).replace(" (", "\n("), fontsize=9, color=INK)
        axes.axvline(0.0, color=INK, linewidth=1.0)
        _draw(axes, finding)
    entries = [
        legend_entry(column, COLOURS[index], "none", "o")
        for index, column in enumerate(findings[0].compared)
    ]
    put_legend(figure, entries)
    return figure


def _draw(axes: Any, finding: Finding) -> None:
    """Draws one metric's differences, the rows from the top."""
    ticks: list[float] = []
    compared = finding.compared
    for place, row in enumerate(finding.names[0]):
        first = place * (len(compared) + 0.6)
        ticks.append(first + (len(compared) - 1) / 2)
        for index, column in enumerate(compared):
            found = finding.difference(row, column).found
            if found is None:
                continue
            half, colour = found.half_width(), COLOURS[index]
            if math.isfinite(half):
                ends = [found.value - half, found.value + half]
                axes.plot(ends, [first + index] * 2, color=colour, linewidth=2)
            axes.plot(found.value, first + index, "o", color=colour, markersize=5)
    axes.set_yticks(ticks, finding.names[0], fontsize=8.5)
    axes.set_ylim(ticks[-1] + len(compared) / 2 + 0.3, ticks[0] - len(compared) / 2 - 0.3)


def write_findings(
    page: Path, sweep: str, question: str, findings: Sequence[Finding], command: str
) -> list[Path]:
    """Writes a sweep's block of a page, and its plot beside it.

    Args:
        page: Markdown file, made where it is absent; the rest of it stays as it is.
        sweep: Names the block and the plot.
        question: What the sweep asks.
        findings: Its metrics.
        command: What makes the block.

    Returns:
        The files that were written.
    """
    plot = page.parent / IMAGES / f"findings_{sweep}.png"
    plot.parent.mkdir(parents=True, exist_ok=True)
    plot.write_bytes(to_png(findings_figure(findings), dpi=110))
    begin, end = f"<!-- findings of {sweep} -->", f"<!-- end of {sweep} -->"
    block = "\n".join([begin, *_block(sweep, question, findings, command), end])
    text = page.read_text(encoding="utf-8") if page.exists() else "# Findings\n"
    there = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if there.search(text):
        text = there.sub(lambda _: block, text)
    else:
        text = f"{text.rstrip()}\n\n## {sweep}\n\n{block}\n"
    page.write_text(text, encoding="utf-8")
    return [page, plot]


def _block(sweep: str, question: str, findings: Sequence[Finding], command: str) -> list[str]:
    """Returns the lines of a block."""
    lines = [f"> {line}".rstrip() for line in question.strip().splitlines()]
    lines += ["", f"![Differences of {sweep}]({IMAGES}/findings_{sweep}.png)"]
    for finding in findings:
        grid = finding_grid(finding)
        lines += ["", f"**{grid.title}**", ""]
        lines += [_row(grid.columns), _row(["---"] * len(grid.columns))]
        lines += [_row([words.text for words in row]) for row in grid.rows]
        lines += ["", *grid.notes]
    return [*lines, "", f"Made by `{command}`."]


def _row(cells: Sequence[str]) -> str:
    """Returns a row of a Markdown table."""
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
