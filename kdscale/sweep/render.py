"""A report for people: tables in the terminal, and one self-contained HTML page.

The page needs nothing from elsewhere: figures are inlined as SVG, and its colours follow the
reader's preference for light or dark.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from html import escape
from pathlib import Path

from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from kdscale.core.storage import Storage
from kdscale.core.types import KdscaleError
from kdscale.sweep.figures import (
    accuracy_figure,
    cka_figure,
    loss_figure,
    scores_figure,
    to_svg,
)
from kdscale.sweep.grids import (
    Grid,
    Words,
    benchmark_grid,
    cka_grids,
    pivot_grid,
    teacher_grid,
    trial_grid,
    vlm_grid,
)
from kdscale.sweep.plan import Plan
from kdscale.sweep.report import Report, Table
from kdscale.sweep.search_views import search_figure, search_grid
from kdscale.sweep.sheet import sheet_figure
from kdscale.sweep.vlm_outcomes import VlmRow

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


def print_report(report: Report, console: Console) -> None:
    """Prints a report's tables.

    Args:
        report: What to print.
        console: Where to.
    """
    console.print(Text(report.message(), style="bold"))
    for warning in report.warnings:
        console.print(Text(f"Note: {warning}", style="yellow"))
    if not any(outcome.done or outcome.journal for outcome in report.outcomes.values()):
        return
    if report.teachers:
        print_grid(teacher_grid(report.teachers), console)
    for table in report.tables:
        rows = report.of(table.sweep)
        console.print()
        console.rule(Text(table.sweep, style="bold"))
        for grid in _search_grids(report, table):
            print_grid(grid, console)
        print_grid(pivot_grid(table, rows), console)
        print_grid(trial_grid(rows), console)
        console.print(Text(report.verdict(table.sweep)))
        for row in report.vlms:
            if row.sweep == table.sweep:
                for grid in _vlm_grids(row):
                    print_grid(grid, console)
        for grid in cka_grids(report.compared(table.sweep)):
            print_grid(grid, console)
    console.print(Text("\n".join(("", *HOW_TO_READ)), style="dim"))


def _vlm_grids(row: VlmRow) -> list[Grid]:
    """Returns a VLM's tables: its questions, unless it was asked benchmarks alone, and those."""
    questions = [vlm_grid(row)] if row.scores or not row.benchmarks else []
    return [*questions, *([benchmark_grid(row)] if row.benchmarks else [])]


def _search_grids(report: Report, table: Table) -> list[Grid]:
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


def write_html(report: Report, plan: Plan, path: str | Path, more: str = "") -> None:
    """Writes the report as one HTML page without external resources.

    Args:
        report: What to write.
        plan: The plan that it was made of; its storage holds the sample images.
        path: Local file; its directory is made where it is absent.
        more: Sections behind those of the sweeps.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(html_page(report, plan.storage, more), encoding="utf-8")


def html_page(report: Report, storage: Storage, more: str = "") -> str:
    """Returns the report as one HTML page.

    Args:
        report: What to write.
        storage: Where the sample images are found.
        more: Sections behind those of the sweeps.
    """
    title = "Report: " + ", ".join(table.sweep for table in report.tables)
    teachers = html_grid(teacher_grid(report.teachers)) if report.teachers else ""
    sections = "".join(_section(report, table, storage) for table in report.tables)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head><body><main>"
        f"<header><h1>{escape(title)}</h1><p><strong>{escape(report.message())}</strong></p>"
        f'<p class="muted">Scale {escape(report.scale)}, storage {escape(report.storage)}</p>'
        f"{_html_list(report.warnings, 'warnings')}</header>"
        f"{sections}<section>{teachers}</section>{more}"
        f"<footer><h3>How to read this</h3>{_html_list(HOW_TO_READ)}</footer>"
        "</main></body></html>\n"
    )


def _section(report: Report, table: Table, storage: Storage) -> str:
    """Returns one sweep's part of the page."""
    sweep = table.sweep
    rows = report.of(sweep)
    figures = [_html_figure(plot, sweep, partial(draw, report, sweep)) for plot, draw in PLOTS]
    searches = "".join(map(html_grid, _search_grids(report, table)))
    if searches:
        searches += _html_figure(SEARCH, sweep, partial(search_figure, report, sweep))
    figures.append(_html_figure(SHEET, sweep, partial(sheet_figure, report, sweep, storage)))
    grids = [grid for row in report.vlms if row.sweep == sweep for grid in _vlm_grids(row)]
    grids += cka_grids(report.compared(sweep))
    vlms = "".join(map(html_grid, grids))
    return (
        f"<section><h2>{escape(sweep)}</h2><p>{escape(report.verdict(sweep))}</p>"
        f"{searches}{html_grid(pivot_grid(table, rows))}{figures[0]}{html_grid(trial_grid(rows))}"
        f"{''.join(figures[1:])}{vlms}</section>"
    )


@dataclass(frozen=True)
class _Plot:
    """A figure of the page, and what is said where it cannot be drawn."""

    name: str
    title: str
    caption: str
    absent: str


PLOTS = (
    (
        _Plot(
            "scores",
            "Scores",
            "Dots are trials, bars are 95 % intervals.",
            "no trial is finished",
        ),
        scores_figure,
    ),
    (
        _Plot(
            "accuracy",
            "Zero-shot accuracy while training",
            "Read at every checkpoint. The control stands in every panel.",
            "no checkpoint has been evaluated",
        ),
        accuracy_figure,
    ),
    (
        _Plot(
            "loss",
            "Loss while training",
            "Total loss. Recipes weigh different terms, so panels cannot be compared.",
            "no step has been done",
        ),
        loss_figure,
    ),
    (
        _Plot(
            "cka",
            "CKA with the teacher while training",
            "1 means that student and teacher arrange the images alike.",
            "no checkpoint of a student with a teacher has a defined CKA",
        ),
        cka_figure,
    ),
)
SEARCH = _Plot(
    "search",
    "What the search found",
    "A dot is a finished trial; a cross is the last evaluation of one that was stopped early.",
    "no trial has been evaluated",
)
SHEET = _Plot(
    "samples",
    "Sample images",
    "Drawn at random from the benchmark, not picked. The true class is above an image, the "
    "students' answers are below it.",
    "no student has predictions",
)


def _html_figure(plot: _Plot, sweep: str, draw: Callable[[], Figure | None]) -> str:
    """Draws a figure, or says why it is not there."""
    heading = f"<h3>{escape(plot.title)}</h3>"
    try:
        figure, reason = draw(), plot.absent
    except (KdscaleError, OSError) as error:
        figure, reason = None, str(error)
    if figure is None:
        return f'{heading}<p class="muted">Nothing to draw: {escape(reason)}.</p>'
    svg = to_svg(figure, f"{sweep}-{plot.name}")
    label = escape(f"{plot.title} of {sweep}")
    return (
        f'{heading}<figure><div class="wide" role="img" aria-label="{label}">{svg}</div>'
        f"<figcaption>{escape(plot.caption)}</figcaption></figure>"
    )


def _html_list(items: Sequence[str], tone: str = "") -> str:
    """Returns a list; nothing where it is empty."""
    lines = "".join(f"<li>{escape(item)}</li>" for item in items)
    return f'<ul class="{tone}">{lines}</ul>' if items else ""


def html_grid(grid: Grid) -> str:
    """Returns a table that scrolls where it is too wide."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in grid.columns)
    rows = "".join(
        "<tr>"
        + f'<th scope="row">{escape(row[0].text)}</th>'
        + "".join(f'<td class="{words.tone}">{escape(words.text)}</td>' for words in row[1:])
        + "</tr>"
        for row in grid.rows
    )
    return (
        f'<h3>{escape(grid.title)}</h3><div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>{_html_list(grid.notes, 'warnings')}"
    )


CSS = """
:root{color-scheme:light dark;--paper:#fff;--card:#f6f8fa;--ink:#1b1f24;--muted:#59636e;
--line:#d0d7de;--good:#00745a;--bad:#b34700;--c0:#0072b2;--c1:#d55e00;--c2:#009e73;--c3:#cc79a7;
--c4:#e69f00;--c5:#56b4e9;--c6:#8c6d46}
@media(prefers-color-scheme:dark){:root{--paper:#14181d;--card:#1c2229;--ink:#e6edf3;
--muted:#9aa4af;--line:#37404a;--good:#4cc9a0;--bad:#ff9d57;--c0:#4aa8e0;--c1:#ff8a3d;
--c2:#3cc9a0;--c3:#e39cc8;--c4:#f2b84b;--c5:#8cd0f5;--c6:#b9986f}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:1140px;margin:0 auto;padding:24px 20px 64px}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 8px}
h2{font-size:1.35rem;margin:48px 0 8px;padding-top:20px;border-top:1px solid var(--line)}
h3{font-size:1.05rem;margin:32px 0 8px}
p{margin:4px 0;max-width:80ch}
.muted,figcaption,footer{color:var(--muted)}
.warnings{color:var(--bad);font-size:.9rem;padding-left:1.2em}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.86rem;font-variant-numeric:tabular-nums}
th,td{padding:5px 12px 5px 0;text-align:right;white-space:pre;vertical-align:top;
border-bottom:1px solid var(--line)}
th:first-child{text-align:left;padding-right:20px}
thead th{color:var(--muted);font-weight:600;vertical-align:bottom}
tbody th{font-weight:500;white-space:normal;min-width:11em}
thead th{white-space:normal}
td.better{color:var(--good);font-weight:600}
td.worse{color:var(--bad);font-weight:600}
figure{margin:0}
figure svg{display:block;width:100%;min-width:640px;height:auto}
figcaption,footer{font-size:.88rem}
footer{margin-top:48px;border-top:1px solid var(--line)}
footer li{margin:4px 0;max-width:90ch}
"""
