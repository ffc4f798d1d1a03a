"""Figures 2 and 3 of the paper: printed numbers hollow, ours filled with their intervals."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from itertools import product
from typing import Any, cast

import matplotlib
from matplotlib.figure import Figure

from kdscale.sweep.beside import Beside, BesideTable, OurCell
from kdscale.sweep.figures import (
    COLOURS,
    INK,
    MUTED,
    legend_entry,
    new_figure,
    put_legend,
    quiet,
)
from kdscale.sweep.paper_tables import COMPLETE, EPOCHS, LONG_TEACHERS, ON_THE_WAY, PROTOCOLS

LINES = {COMPLETE: "solid", ON_THE_WAY: "dashed"}
TEACHER, STUDENT = COLOURS[0], COLOURS[1]
BESIDE = 0.022  # of the axis
HOLLOW: dict[str, Any] = {"markerfacecolor": "none", "linestyle": "none", "markersize": 6}


def table_named(found: Beside, name: str) -> BesideTable:
    """Returns one of the tables."""
    return next(table for table in found.tables if table.paper.name == name)


def gap_figure(found: Beside) -> Figure:
    """Draws figure 2: teacher's and student's average, and the gap, weakest teacher first."""
    table = table_named(found, "figure2")
    names = [row.labels[0] for row in table.paper.rows]
    figure = new_figure(3.6)
    grid: Any = figure.subplots(1, 2, squeeze=False)
    left, right = grid[0]
    for axes, columns in ((left, (0, 1)), (right, (2,))):
        quiet(axes, "teacher, by its own printed average")
        axes.set_xticks(range(len(names)), names, fontsize=8)
        axes.set_xlim(-0.6, len(names) - 0.4)
        for column in columns:
            colour = (TEACHER, STUDENT, INK)[column]
            rows = zip(table.paper.rows, table.ours, strict=True)
            for place, (row, owns) in enumerate(rows):
                _point(axes, place, row.cells[column].printed, owns[column], colour)
    left.set_ylabel("multimodal average, %", color=INK, fontsize=9)
    right.set_ylabel("gap between teacher and student, points", color=INK, fontsize=9)
    low, high = min(0.0, right.get_ylim()[0]), max(0.0, right.get_ylim()[1])
    room = 0.04 * (high - low)  # so that zero is seen where all gaps lie on one side
    right.set_ylim(low - room, high + room)
    right.axhline(0.0, color=INK, linewidth=1.2, zorder=1)
    shown = [("teacher", TEACHER), ("student", STUDENT), ("gap", INK)]
    put_legend(figure, [*(legend_entry(n, c, "none", "o") for n, c in shown), *_sides(table)])
    return figure


def long_figure(found: Beside) -> Figure:
    """Draws figure 3: scores over epochs of distillation, for each teacher and protocol."""
    table = table_named(found, "figure3")
    figure = new_figure(3.2)
    grid: Any = figure.subplots(1, len(table.paper.columns), squeeze=False)
    for column, axes in enumerate(grid[0]):
        quiet(axes, "epochs of distillation")
        axes.set_title(f"{table.paper.columns[column]}, %", fontsize=9.5, color=INK)
        axes.set_xticks(EPOCHS)
        axes.set_xlim(EPOCHS[0] - 10, EPOCHS[-1] + 10)
        for names in product(LONG_TEACHERS, PROTOCOLS):
            _line(axes, table, names, column)
    entries = [legend_entry(n, COLOURS[i], "none", "o") for i, n in enumerate(LONG_TEACHERS)]
    lines = [legend_entry(name, MUTED, LINES[name]) for name in PROTOCOLS]
    put_legend(figure, [*entries, *lines, *_sides(table)])
    return figure


def _line(axes: Any, table: BesideTable, names: tuple[str, str], column: int) -> None:
    """Draws the students of a teacher and protocol; the two teachers are set a little apart."""
    points: list[tuple[float, float]] = []
    teacher, protocol = names
    colour = COLOURS[LONG_TEACHERS.index(teacher)]
    shift = -2.5 if teacher == LONG_TEACHERS[0] else 0.5
    for row, owns in zip(table.paper.rows, table.ours, strict=True):
        if row.labels[:2] == names:
            place, own = int(row.labels[2]) + shift, owns[column]
            _point(axes, place, row.cells[column].printed, own, colour)
            if own is not None:
                left, right = axes.get_xlim()
                points.append((place + BESIDE * (right - left), own.value))
    if points:
        axes.plot(
            *zip(*points, strict=True), color=colour, linewidth=1.4, linestyle=LINES[protocol]
        )


def _point(
    axes: Any, place: float, printed: float | None, own: OurCell | None, colour: str
) -> None:
    """Draws a printed number and, a little to the right, ours, so that neither hides the other."""
    left, right = axes.get_xlim()
    if printed is not None:
        axes.plot(place, printed, "o", color=colour, **HOLLOW)
    if own is None:
        return
    place += BESIDE * (right - left)
    interval = own.interval
    if interval is not None and math.isfinite(interval.low + interval.high):
        axes.plot([place] * 2, [interval.low, interval.high], color=colour, linewidth=2)
    axes.plot(place, own.value, "o", color=colour, markersize=6)


def _sides(table: BesideTable) -> Sequence[Any]:
    """Returns legend entries that tell printed and measured numbers apart."""
    hollow = legend_entry("printed", MUTED, "none", "o")
    hollow.set_markerfacecolor("none")
    name = "ours, 95 % interval" if table.num_run else "ours: not run"
    return [hollow, legend_entry(name, MUTED, "none", "o")]


def svg_file(figure: Any, name: str) -> bytes:
    """Renders a figure as an SVG file, the same in every run."""
    buffer = io.BytesIO()
    with cast(Any, matplotlib).rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
