"""A report as one self-contained HTML page.

It needs nothing from elsewhere: figures are inlined as SVG, and its colours follow the reader's
preference for light or dark.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path

from matplotlib.figure import Figure

from kdscale.core.storage import Storage
from kdscale.core.types import KdscaleError
from kdscale.sweep.figures import (
    accuracy_figure,
    cka_figure,
    loss_figure,
    scores_figure,
    to_svg,
)
from kdscale.sweep.grids import Grid, cka_grids, pivot_grid, teacher_grid, trial_grid, vlms_grid
from kdscale.sweep.plan import Plan
from kdscale.sweep.render import HOW_TO_READ, search_grids, vlm_grids, vlms_of
from kdscale.sweep.report import Report, Table
from kdscale.sweep.search_views import search_figure
from kdscale.sweep.sheet import sheet_figure


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page.

    Attributes:
        title: Its heading, and what the contents call it.
        body: HTML below the heading.
        parts: (anchor, title) of tables in it that the contents name, too.
    """

    title: str
    body: str
    parts: tuple[tuple[str, str], ...] = ()


def write_html(
    report: Report, plan: Plan, path: str | Path, before: Sequence[Section] = ()
) -> None:
    """Writes the report as one HTML page without external resources.

    Args:
        report: What to write.
        plan: The plan that it was made of; its storage holds the sample images.
        path: Local file; its directory is made where it is absent.
        before: Sections ahead of the sweeps'.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(html_page(report, plan.storage, before), encoding="utf-8")


def html_page(report: Report, storage: Storage, before: Sequence[Section] = ()) -> str:
    """Returns the report as one HTML page.

    Args:
        report: What to write.
        storage: Where the sample images are found.
        before: Sections ahead of the sweeps'.
    """
    title = "Report: " + ", ".join(table.sweep for table in report.tables)
    sections = [*before, *(_section(report, table, storage) for table in report.tables)]
    if report.teachers:
        grid = teacher_grid(report.teachers)
        sections.append(Section(title=grid.title, body=html_grid(grid, titled=False)))
    sections.append(Section(title="How to read this", body=_html_list(HOW_TO_READ, "muted")))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head><body><main>"
        f"<header><h1>{escape(title)}</h1><p><strong>{escape(report.message())}</strong></p>"
        f'<p class="muted">Scale {escape(report.scale)}, storage {escape(report.storage)}</p>'
        f"{_html_list(report.warnings, 'warnings')}</header>"
        f"{_contents(sections)}{''.join(map(_html_section, sections))}</main></body></html>\n"
    )


def _contents(sections: Sequence[Section]) -> str:
    """Returns links to all sections and their tables."""
    lines: list[str] = []
    for section in sections:
        parts = "".join(f"<li>{_link(*part)}</li>" for part in section.parts)
        link = _link(_anchor(section.title), section.title)
        lines.append(f"<li>{link}{f'<ul>{parts}</ul>' if parts else ''}</li>")
    return f'<nav aria-label="Contents"><h2>Contents</h2><ul>{"".join(lines)}</ul></nav>'


def _link(anchor: str, title: str) -> str:
    """Returns a link to a place on the page."""
    return f'<a href="#{anchor}">{escape(title)}</a>'


def _anchor(title: str) -> str:
    """Returns what the place of a section with this title is called."""
    return re.sub(r"\W+", "-", title.lower()).strip("-")


def _html_section(section: Section) -> str:
    """Returns a section with its heading."""
    heading = f'<h2 id="{_anchor(section.title)}">{escape(section.title)}</h2>'
    return f"<section>{heading}{section.body}</section>"


def _section(report: Report, table: Table, storage: Storage) -> Section:
    """Returns one sweep's part of the page."""
    sweep = table.sweep
    rows = report.of(sweep)
    figures = [_html_figure(plot, sweep, partial(draw, report, sweep)) for plot, draw in PLOTS]
    searches = "".join(map(html_grid, search_grids(report, table)))
    if searches:
        searches += _html_figure(SEARCH, sweep, partial(search_figure, report, sweep))
    figures.append(_html_figure(SHEET, sweep, partial(sheet_figure, report, sweep, storage)))
    return Section(
        title=sweep,
        body=f"<p>{escape(report.verdict(sweep))}</p>{searches}{html_grid(pivot_grid(table, rows))}"
        f"{figures[0]}{html_grid(trial_grid(rows))}{''.join(figures[1:])}"
        f"{_vlms(report, sweep)}",
    )


def _vlms(report: Report, sweep: str) -> str:
    """Returns a line for each VLM of a sweep; its tables, and those of CKA, are folded."""
    vlms = vlms_of(report, sweep)
    overview = html_grid(vlms_grid(vlms)) if vlms else ""
    folds = [fold(row.name, "".join(map(html_grid, vlm_grids(row)))) for row in vlms]
    folds += [
        fold(", ".join((grid.title, *grid.columns[2:])), html_grid(grid, titled=False))
        for grid in cka_grids(report.compared(sweep))
    ]
    return overview + "".join(folds)


def fold(summary: str, body: str) -> str:
    """Returns what is shown when its summary is clicked."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


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


def html_grid(grid: Grid, *, anchor: str = "", titled: bool = True) -> str:
    """Returns a table that scrolls where it is too wide.

    Args:
        grid: The table.
        anchor: What links call its place; empty for none.
        titled: Below its title; what it stands in may name it already.
    """
    place = f' id="{anchor}"' if anchor else ""
    title = f"<h3{place}>{escape(grid.title)}</h3>" if titled else ""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in grid.columns)
    rows = "".join(
        "<tr>"
        + f'<th scope="row">{escape(row[0].text)}</th>'
        + "".join(f'<td class="{words.tone}">{escape(words.text)}</td>' for words in row[1:])
        + "</tr>"
        for row in grid.rows
    )
    return (
        f'{title}<div class="wide"><table><thead><tr>{head}</tr></thead>'
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
a{color:var(--c0)}
nav ul{margin:4px 0;padding-left:1.2em}
nav>ul{columns:2 22em}
nav>ul>li{break-inside:avoid}
nav ul ul{font-size:.88rem}
summary{cursor:pointer;padding:3px 0}
.muted,figcaption{color:var(--muted)}
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
figcaption{font-size:.88rem}
ul.muted{font-size:.88rem}
ul.muted li{margin:4px 0;max-width:90ch}
"""
