"""A report for people in the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from kdscale.sweep.grids import (
    Grid,
    Words,
    benchmark_grid,
    cka_grids,
    pivot_grid,
    teacher_grid,
    trial_grid,
    vlm_grid,
    vlms_grid,
)
from kdscale.sweep.report import Report, Table
from kdscale.sweep.search_views import search_grid
from kdscale.sweep.vlm_outcomes import VlmRow

MAX_DETAILED = 40  # trials whose own tables are printed unasked
MIN_NAME = 16
OPTIONAL = ("CKA biased", "steps", "time")
TONES = {"better": "green", "worse": "red", "muted": "dim"}
HOW_TO_READ = (
    "Top-1 is the percentage of n benchmark images whose class the model names; chance is what "
    "guessing gives.",
    "[ ] is a 95 % interval: a percentile bootstrap over images with 1000 resamples, or Wilson's "
    "where all or none are right. It covers the choice of images, not the choice of seed.",
    "Minus control is a trial's top-1 minus that of the control with the same student, data and "
    "seed, by a paired bootstrap over the same images. The intervals are not adjusted for the "
    "number of comparisons.",
    "CKA is linear, between the student's and the teacher's mean patch features of the "
    "benchmark's images. The biased estimate is too high where images are few. On a "
    "benchmark it is that of the final layers on its distinct images; matrices of all layers and "
    "heat maps lie with the stages and in MLflow.",
    "Benchmarks of VLMs are in per cent, MME-P is a sum of ten category scores up to 2000; chance "
    "is a uniform guess over the options. Their intervals draw pairs, rotations or images as "
    "wholes, or are Wilson's where all come out alike. Minus blind is the score less that without "
    "images, by a paired bootstrap over the same questions. A score is marked where its interval "
    "lies above chance and that of minus blind above 0. ! is one answer to more than 95 % of the "
    "questions.",
)


def print_report(report: Report, console: Console, *, details: bool = False) -> None:
    """Prints a report's tables.

    Args:
        report: What to print.
        console: Where to.
        details: The tables of single VLMs and of CKA as well, however many trials there are.
    """
    console.print(Text(report.message(), style="bold"))
    for warning in report.warnings:
        console.print(Text(f"Note: {warning}", style="yellow"))
    if not any(outcome.done or outcome.journal for outcome in report.outcomes.values()):
        return
    if report.teachers:
        print_grid(teacher_grid(report.teachers), console)
    count = len(report.trials) + len(report.vlms)
    is_short = count > MAX_DETAILED and not details
    for table in report.tables:
        console.print()
        console.rule(Text(table.sweep, style="bold"))
        for grid in _sweep_grids(report, table):
            print_grid(grid, console)
        console.print(Text(report.verdict(table.sweep)))
        for grid in () if is_short else _detail_grids(report, table.sweep):
            print_grid(grid, console)
    console.print(Text("\n".join(("", *HOW_TO_READ)), style="dim"))
    if is_short and (report.vlms or report.comparisons):
        words = f"{count} trials: kdscale report --details also prints the tables of each one."
        console.print(Text(words, style="bold"))


def _sweep_grids(report: Report, table: Table) -> list[Grid]:
    """Returns the tables of all trials of a sweep."""
    rows, vlms = report.of(table.sweep), vlms_of(report, table.sweep)
    overview = [vlms_grid(vlms)] if vlms else []
    return [*search_grids(report, table), pivot_grid(table, rows), trial_grid(rows), *overview]


def _detail_grids(report: Report, sweep: str) -> list[Grid]:
    """Returns the tables of single trials of a sweep."""
    grids = [grid for row in vlms_of(report, sweep) for grid in vlm_grids(row)]
    return [*grids, *cka_grids(report.compared(sweep))]


def vlms_of(report: Report, sweep: str) -> list[VlmRow]:
    """Returns one sweep's VLMs."""
    return [row for row in report.vlms if row.sweep == sweep]


def vlm_grids(row: VlmRow) -> list[Grid]:
    """Returns a VLM's tables: its questions, unless it was asked benchmarks alone, and those."""
    questions = [vlm_grid(row)] if row.scores or not row.benchmarks else []
    return [*questions, *([benchmark_grid(row)] if row.benchmarks else [])]


def search_grids(report: Report, table: Table) -> list[Grid]:
    """Returns the table of a sweep's search, where it is one."""
    return [search_grid(found) for found in report.searches if found.sweep == table.sweep]


def print_grid(grid: Grid, console: Console) -> None:
    """Prints one table and its notes; breaks cells and leaves columns out only where it must."""
    broken = _map_texts(grid, _broken)
    shown = [column for column in grid.columns if column not in OPTIONAL]
    fits = [option for option in (grid, broken) if _width(option) <= console.width]
    chosen = fits[0] if fits else _only(broken, shown)
    table = RichTable(
        title=chosen.title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    whole = _width(chosen) <= console.width
    for index, column in enumerate(chosen.columns):
        justify = "right" if index else "left"
        header = column.replace(" ", "\n", 1)
        table.add_column(header, justify=justify, overflow="fold", no_wrap=whole and index > 0)
    for row in chosen.rows:
        table.add_row(*(Text(words.text, style=TONES.get(words.tone, "")) for words in row))
    console.print(table)
    for note in chosen.notes:
        console.print(Text(f"  {note}", style="yellow"))


def _width(grid: Grid) -> int:
    """Returns the characters that a table takes when only the first column is folded."""
    columns = zip(
        *([Words(c.replace(" ", "\n", 1)) for c in grid.columns], *grid.rows), strict=True
    )
    widths = [max(len(line) for words in c for line in words.text.split("\n")) for c in columns]
    return min(widths[0], MIN_NAME) + sum(widths[1:]) + 2 * len(widths) + 2


def _only(grid: Grid, columns: Sequence[str]) -> Grid:
    """Leaves columns out, and says which."""
    places = [grid.columns.index(column) for column in columns]
    left_out = [column for column in grid.columns if column not in columns]
    notes = [f"A wider terminal also shows {', '.join(left_out)}."] if left_out else []
    rows = [[row[place] for place in places] for row in grid.rows]
    return replace(grid, columns=tuple(columns), rows=rows, notes=[*grid.notes, *notes])


def _map_texts(grid: Grid, change: Callable[[str], str]) -> Grid:
    """Changes the text of every cell right of the first column."""
    rows = [
        [row[0], *(replace(words, text=change(words.text)) for words in row[1:])]
        for row in grid.rows
    ]
    return replace(grid, rows=rows)


def _broken(text: str) -> str:
    """Breaks a cell's text where that hurts least."""
    for before, after in ((" [", "\n["), ("not f", "not\nf"), (" of ", "\nof ")):
        text = text.replace(before, after)
    return text
