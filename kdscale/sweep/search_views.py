"""What people see of a search: its trials as a table, its metric against each searched field."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kdscale.sweep.figures import (
    COLOURS,
    INK,
    MUTED,
    new_figure,
    put_legend,
    quiet,
)
from kdscale.sweep.grids import METRICS, NONE, Grid, Words
from kdscale.sweep.outcomes import DONE
from kdscale.sweep.report import Report
from kdscale.sweep.search import rounded
from kdscale.sweep.search_outcomes import SearchRow, SearchTable

DECIMALS = {"zero_shot_top1": 1, "accuracy": 1, "average": 2}
MARKERS = {True: "o", False: "x"}  # finished or not


def search_figure(report: Report, sweep: str) -> Figure | None:
    """Draws the metric over every searched field, on a logarithmic axis where it is drawn so.

    Returns:
        None where no trial has a value.
    """
    table = next((table for table in report.searches if table.sweep == sweep), None)
    rows = [row for row in table.rows if row.value is not None] if table else []
    if table is None or not rows:
        return None
    columns = min(3, len(table.fields))
    lines = math.ceil(len(table.fields) / columns)
    figure = new_figure(2.5 * lines + 0.8)
    grid: Any = figure.subplots(lines, columns, sharey=True, squeeze=False)
    for index, axes in enumerate(grid.flat):
        if index >= len(table.fields):
            axes.remove()
            continue
        quiet(axes, table.fields[index])
        if index % columns == 0:
            axes.set_ylabel(table.metric, color=INK, fontsize=9)
        _draw(axes, table, rows, table.fields[index])
    put_legend(figure, _legend(table, rows))
    return figure


def _draw(axes: Any, table: SearchTable, rows: list[SearchRow], field: str) -> None:
    """Draws one panel; values that are no numbers stand side by side."""
    values = [row.config[field] for row in rows]
    if all(isinstance(value, int | float) for value in values):
        if field in table.log_fields:
            axes.set_xscale("log")
        places: list[float] = [float(value) for value in values]
    else:
        names = list(dict.fromkeys(map(str, values)))
        places = [names.index(str(value)) for value in values]
        axes.set_xticks(range(len(names)), names, fontsize=8, parse_math=False)
    for place, row in zip(places, rows, strict=True):
        best = row is table.best
        axes.plot(
            place,
            row.value,
            MARKERS[row.state == DONE],
            color=_colour(row),
            markersize=9 if best else 6,
            markeredgecolor=INK if best else _colour(row),
        )


def _colour(row: SearchRow) -> str:
    """Returns a trial's colour."""
    return COLOURS[0] if row.state == DONE else MUTED


def _legend(table: SearchTable, rows: list[SearchRow]) -> list[Line2D]:
    """Returns the legend's entries."""
    entries = [_entry("finished", COLOURS[0], "o", COLOURS[0])]
    if any(row.state != DONE for row in rows):
        entries.append(_entry("last value of a trial that did not end", MUTED, "x", MUTED))
    if table.best is not None:
        entries.append(_entry("best", COLOURS[0], "o", INK))
    return entries


def _entry(name: str, colour: str, marker: str, edge: str) -> Line2D:
    """Returns a legend entry."""
    return Line2D(
        [], [], color=colour, marker=marker, markeredgecolor=edge, linestyle="none", label=name
    )


def search_grid(table: SearchTable) -> Grid:
    """Returns the table of a search's trials as words."""
    digits = DECIMALS.get(table.metric, 3)
    best = table.best
    rows = [
        [
            Words(f"{place}"),
            Words(
                NONE if row.value is None else f"{row.value:.{digits}f}",
                "better" if row is best else "",
            ),
            Words(NONE if row.step is None else f"{row.step:,}"),
            Words(row.state, "" if row.state == DONE else "muted"),
            *(Words(str(rounded(row.config[name]))) for name in table.fields),
        ]
        for place, row in enumerate(table.rows, 1)
    ]
    notes: list[str] = []
    if best is not None:
        words = ", ".join(f"{name}={best.config[name]}" for name in table.fields)
        notes.append(f"best of the finished: {words} ({best.key})")
    if table.num_left:
        notes.append(f"{table.num_left} more trials are to be chosen while running")
    name = METRICS.get(table.metric, table.metric).partition(",")[0]
    return Grid(
        title=f"Search: {name}, {'highest' if table.mode == 'max' else 'lowest'} first",
        columns=("rank", table.metric, "at step", "state", *table.fields),
        rows=rows,
        notes=notes,
    )
