"""Figures of a report: scores with intervals, and curves over steps.

Everything is drawn on `Figure` objects without a backend or global state. The colours
stand for themselves in a PNG; `to_svg` turns them into CSS variables, so that a page may be dark.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from kdscale.core.config import TowerSpec
from kdscale.sweep.outcomes import DONE, Outcome, TrialRow
from kdscale.sweep.report import Report, Table

# Okabe and Ito's colours, which the colour-blind can tell apart, without black and yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D46")
DASHES = ("solid", (0, (6, 1.5)), (0, (3, 1.5)), (0, (9, 1.5)))
CONTROL_DASH = (0, (6, 1.5, 1, 1.5))
TEACHER_DASH, FAINT_DASH = (0, (4, 3)), (0, (1, 1.6))
INK, MUTED, LINE, GOOD, BAD = "#1b1f24", "#59636e", "#d0d7de", "#00745a", "#b34700"
THEME = {INK: "--ink", MUTED: "--muted", LINE: "--line", GOOD: "--good", BAD: "--bad"} | {
    colour: f"--c{index}" for index, colour in enumerate(COLOURS)
}
WIDTH_IN = 9.6
MAX_POINTS = 200
MAX_NAME = 44


@dataclass(frozen=True)
class Look:
    """How a sweep's trials are told apart: colour by row, panel by column, dashes by the rest."""

    report: Report
    table: Table
    trials: list[TrialRow]

    @classmethod
    def of(cls, report: Report, sweep: str) -> Look:
        """Returns the look of one of a report's sweeps."""
        table = next(table for table in report.tables if table.sweep == sweep)
        return cls(report, table, report.of(sweep))

    @property
    def compared(self) -> list[TrialRow]:
        """The trials that are not controls; all where nothing else is there."""
        return [row for row in self.trials if not row.is_baseline] or self.trials

    @property
    def row_names(self) -> list[str]:
        """The rows that have a colour of their own."""
        return list(dict.fromkeys(row.row for row in self.compared))

    @property
    def panels(self) -> list[str]:
        """The columns that have a panel of their own."""
        return list(dict.fromkeys(row.column for row in self.compared))

    def colour(self, row: TrialRow) -> str:
        """Returns a trial's colour; a control in a row of its own is in ink."""
        if row.row not in self.row_names:
            return INK
        return COLOURS[self.row_names.index(row.row) % len(COLOURS)]

    def rest(self, row: TrialRow) -> str:
        """Returns what a trial chose beside row, column and seed."""
        shown = (self.table.rows, self.table.columns, "seed")
        names = [
            name
            for name in row.chosen
            if name not in shown and len({str(other.chosen[name]) for other in self.compared}) > 1
        ]
        return " ".join(str(row.chosen[name]) for name in names)

    def rests(self) -> list[str]:
        """Returns every distinct rest."""
        return list(dict.fromkeys(self.rest(row) for row in self.compared))

    def dash(self, row: TrialRow) -> Any:
        """Returns a trial's line style."""
        if row not in self.compared:
            return DASHES[0] if self.colour(row) == INK else CONTROL_DASH
        return DASHES[self.rests().index(self.rest(row)) % len(DASHES)]

    def in_panel(self, panel: str) -> list[TrialRow]:
        """Returns the trials of a panel, and the controls, which stand in every one."""
        return [row for row in self.trials if row.column == panel or row.is_baseline]

    def outcome(self, row: TrialRow) -> Outcome:
        """Returns what a trial's stage has left."""
        assert row.key is not None
        return self.report.outcomes[row.key]

    def legend(self, marker: str = "") -> list[Line2D]:
        """Returns legend entries for rows, controls and dashes; only rows where dots are drawn."""
        entries = [
            legend_entry(name, COLOURS[i % len(COLOURS)], "solid", marker)
            for i, name in enumerate(self.row_names)
        ]
        controls = [row for row in self.trials if row not in self.compared]
        if controls:
            own = self.colour(controls[0]) == INK
            dash, colour = self.dash(controls[0]), INK if own else MUTED
            entries.append(legend_entry("control", colour, dash, "s" if marker else ""))
        rests = self.rests()
        if len(rests) > 1 and not marker:
            entries += [
                legend_entry(rest, MUTED, DASHES[i % len(DASHES)]) for i, rest in enumerate(rests)
            ]
        return entries


def legend_entry(name: str, colour: str, dash: Any, marker: str = "") -> Line2D:
    """Returns a legend entry."""
    return Line2D([], [], color=colour, linestyle=dash, marker=marker, label=name, linewidth=1.7)


def scores_figure(report: Report, sweep: str) -> Figure | None:
    """Draws every trial's accuracy and its difference to the control, with 95 % intervals.

    Returns:
        None where nothing is finished.
    """
    look = Look.of(report, sweep)
    if not any(row.score for row in look.trials):
        return None
    compared = any(row.difference for row in look.trials)
    figure = new_figure(0.3 * len(look.trials) + 1.5)
    grid: Any = figure.subplots(1, 2 if compared else 1, sharey=True, squeeze=False)
    left = grid[0][0]
    quiet(left, "zero-shot top-1, %, with 95 % interval")
    for place, row in enumerate(look.trials):
        _score_line(left, place, row, look)
    for chance in {row.score.chance for row in look.trials if row.score}:
        left.axvline(chance, color=MUTED, linestyle=FAINT_DASH, linewidth=1.2)
    names = [_tick(row) for row in look.trials]
    left.set_yticks(range(len(names)), names, fontsize=8.5, parse_math=False)
    for row, text in zip(look.trials, left.get_yticklabels(), strict=True):
        text.set_color(MUTED if row.score is None else INK)
    left.set_ylim(len(names) - 0.4, -0.6)
    if compared:
        right = grid[0][1]
        quiet(right, "difference to the control, points, with 95 % interval")
        right.axvline(0.0, color=INK, linewidth=1.0)
        for place, row in enumerate(look.trials):
            if row.difference is not None:
                _interval(right, place, row.difference.points, row.difference.interval, look, row)
        right.tick_params(axis="y", length=0, labelleft=False)
    extra = [legend_entry("chance", MUTED, FAINT_DASH)]
    if any(_teacher_score(look, row) is not None for row in look.trials):
        extra.append(_hollow("the trial's teacher"))
    put_legend(figure, look.legend("o") + extra)
    return figure


def _score_line(axes: Any, place: int, row: TrialRow, look: Look) -> None:
    """Draws one trial's accuracy beside its teacher's."""
    teacher = _teacher_score(look, row)
    if teacher is not None:
        axes.plot(teacher, place, **_HOLLOW)
    if row.score is not None:
        _interval(axes, place, row.score.top1, row.score.interval, look, row)


def _tick(row: TrialRow) -> str:
    """Names a trial beside its line, and says why the line is empty."""
    if row.score is not None:
        return short(row.name)
    return f"{short(row.name)} ({'no score' if row.state == DONE else row.state})"


_HOLLOW: dict[str, Any] = {
    "marker": "D", "markersize": 5.5, "color": MUTED, "markerfacecolor": "none",
    "linestyle": "none",
}  # fmt: skip


def _hollow(name: str) -> Line2D:
    """Returns the legend entry of a hollow diamond."""
    return Line2D([], [], label=name, **_HOLLOW)


def _interval(
    axes: Any, place: int, value: float, interval: Any, look: Look, row: TrialRow
) -> None:
    """Draws a dot with its interval, where there is one."""
    colour = look.colour(row)
    if math.isfinite(interval.low) and math.isfinite(interval.high):
        axes.plot([interval.low, interval.high], [place, place], color=colour, linewidth=2)
    axes.plot(value, place, "s" if row.is_baseline else "o", color=colour, markersize=6)


def _teacher_score(look: Look, row: TrialRow) -> float | None:
    """Returns the measured accuracy of a trial's teacher, if a stage trained one."""
    teacher = look.outcome(row).stage.training.teacher
    if not isinstance(teacher, TowerSpec):
        return None
    found = look.report.outcomes.get(teacher.weights.rpartition("/")[2])
    return None if found is None or found.score is None else found.score.top1


def accuracy_figure(report: Report, sweep: str) -> Figure | None:
    """Draws zero-shot top-1 over steps; teachers are dashed lines, chance is dotted.

    Returns:
        None where no journal holds an evaluation.
    """
    look = Look.of(report, sweep)

    def draw(axes: Any, panel: str) -> int:
        """Draws one panel; returns its number of curves."""
        drawn = sum(
            _curve(axes, look, row, "zero_shot_top1", marker="o") for row in look.in_panel(panel)
        )
        for row in look.in_panel(panel):
            teacher = _teacher_score(look, row)
            if teacher is not None:
                colour = look.colour(row) if look.table.rows == "teacher" else MUTED
                axes.axhline(teacher, color=colour, linestyle=TEACHER_DASH, linewidth=1.2)
            if row.score is not None:
                axes.axhline(row.score.chance, color=MUTED, linestyle=FAINT_DASH, linewidth=1.0)
        return drawn

    extra = [
        legend_entry("teacher", MUTED, TEACHER_DASH),
        legend_entry("chance", MUTED, FAINT_DASH),
    ]
    return _panels(look, draw, "zero-shot top-1, %", look.legend() + extra, sharey=True)


def loss_figure(report: Report, sweep: str) -> Figure | None:
    """Draws the total loss over steps; every loss recipe has a panel and a scale of its own.

    Returns:
        None where no step has been done.
    """
    look = Look.of(report, sweep)
    columns = list(dict.fromkeys(row.column for row in look.trials))

    def draw(axes: Any, panel: str) -> int:
        rows = [row for row in look.trials if row.column == panel]
        return sum(_curve(axes, look, row, "total") for row in rows)

    return _panels(look, draw, "total loss", look.legend(), panels=columns)


def cka_figure(report: Report, sweep: str) -> Figure | None:
    """Draws CKA with the teacher over steps: debiased as a line, biased dotted.

    Returns:
        None where no journal holds a defined CKA.
    """
    look = Look.of(report, sweep)

    def draw(axes: Any, panel: str) -> int:
        rows = [row for row in look.trials if row.column == panel]
        for row in rows:
            _curve(axes, look, row, "cka_biased", linestyle=FAINT_DASH, linewidth=1.3, alpha=0.8)
        return sum(_curve(axes, look, row, "cka_debiased", marker="o") for row in rows)

    entries = [entry for entry in look.legend() if entry.get_label() != "control"]
    extra = [legend_entry("biased estimate", MUTED, FAINT_DASH)]
    return _panels(look, draw, "CKA with the teacher", entries + extra, sharey=True)


def _panels(
    look: Look,
    draw: Callable[[Any, str], int],
    ylabel: str,
    legend: Sequence[Line2D],
    *,
    panels: Sequence[str] | None = None,
    sharey: bool = False,
) -> Figure | None:
    """Draws one panel a column; None where nothing was drawn in any."""
    names = list(look.panels if panels is None else panels)
    if not names:
        return None
    num_columns = 2 if len(names) == 4 else min(3, len(names))
    num_rows = math.ceil(len(names) / num_columns)
    figure = new_figure(2.5 * num_rows + 0.8)
    grid: Any = figure.subplots(
        num_rows, num_columns, sharex=True, sharey=sharey or "none", squeeze=False
    )
    drawn = 0
    for index, axes in enumerate(grid.flat):
        if index >= len(names):
            axes.remove()
            continue
        quiet(axes, "optimizer steps" if index + num_columns >= len(names) else "")
        axes.tick_params(labelbottom=index + num_columns >= len(names))
        drawn += draw(axes, names[index])
        axes.set_title(f"{look.table.columns}: {names[index]}", fontsize=9.5, color=INK)
        if index % num_columns == 0:
            axes.set_ylabel(ylabel, color=INK, fontsize=9)
    put_legend(figure, legend)
    return figure if drawn else None


def _curve(axes: Any, look: Look, row: TrialRow, metric: str, **options: Any) -> int:
    """Draws a metric of a trial's journal; returns how many points it had."""
    points = [
        (line["step"], line[metric])
        for line in look.outcome(row).journal
        if metric in line and math.isfinite(line[metric])
    ]
    if not points:
        return 0
    steps, values = _thin(np.array(points, dtype=float)).T
    style = {"color": look.colour(row), "linestyle": look.dash(row), "linewidth": 1.7} | options
    axes.plot(steps, values, markersize=3 if len(steps) <= 40 else 0, **style)
    return len(points)


def _thin(points: np.ndarray) -> np.ndarray:
    """Averages neighbours so that a long run makes a small figure."""
    size = math.ceil(len(points) / MAX_POINTS)
    return np.array([points[i : i + size].mean(axis=0) for i in range(0, len(points), size)])


def to_png(figure: Any, dpi: int = 150) -> bytes:
    """Renders a figure on white."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white")
    return buffer.getvalue()


def to_svg(figure: Any, name: str) -> str:
    """Renders a figure as an `<svg>` element that takes its colours from CSS variables.

    Args:
        figure: What to draw.
        name: Unique on the page; keeps the elements' ids apart and the same in every run.
    """
    buffer = io.BytesIO()
    with cast(Any, matplotlib).rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue().decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", text)
    for colour, variable in THEME.items():
        text = text.replace(colour.lower(), f"var({variable})")
    return text


def new_figure(height: float) -> Figure:
    """Returns an empty figure of the page's width."""
    figure = Figure(figsize=(WIDTH_IN, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def quiet(axes: Any, xlabel: str) -> None:
    """Makes axes quiet: two spines, a light grid, few ticks."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LINE)
    axes.tick_params(color=LINE, labelcolor=MUTED, labelsize=8)
    axes.grid(color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_facecolor("none")
    axes.set_xlabel(xlabel, color=INK, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(5))


def put_legend(figure: Any, entries: Iterable[Line2D]) -> None:
    """Puts a legend below the panels."""
    shown = list(entries)
    columns = min(6, len(shown))
    figure.legend(
        handles=shown,
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=8.5,
        labelcolor=INK,
    )


def short(text: str, limit: int = MAX_NAME) -> str:
    """Returns a name cut to so many characters."""
    return text if len(text) <= limit else text[: limit - 1] + "…"
