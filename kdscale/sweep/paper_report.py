"""The comparison with the paper: printed, as sections of the page, and as files."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from rich.console import Console
from rich.text import Text

from kdscale.sweep.beside import Beside, beside
from kdscale.sweep.beside_grids import (
    HOW_TO_READ,
    beside_grid,
    claim_grid,
    claims_csv,
    claims_tex,
    comparison_grid,
    table_csv,
    table_tex,
)
from kdscale.sweep.figures import to_png, to_svg
from kdscale.sweep.measure import measured
from kdscale.sweep.page import Section, fold, html_grid, write_html
from kdscale.sweep.paper_figures import gap_figure, long_figure, svg_file
from kdscale.sweep.plan import Plan
from kdscale.sweep.render import print_grid
from kdscale.sweep.report import Report

PAPER_SCALE = "paper"
DEFAULTS = "defaults of recipes"
FIGURES = (("figure2", gap_figure), ("figure3", long_figure))


def heading(found: Beside) -> str:
    """Names a comparison by how its results were trained."""
    return f"Beside the paper: {found.variant or DEFAULTS}"


def remarks(report: Report, found: Beside) -> list[str]:
    """Says what the comparison does not show."""
    lines: list[str] = []
    if report.scale != PAPER_SCALE:
        lines.append(
            f"Scale {report.scale}: our numbers are of other models and questions than the "
            "printed ones. Compare directions, not sizes."
        )
    if found.variant:
        lines.append(f"Our results depart from the defaults of recipes: {found.variant}.")
    if found.elsewhere:
        lines.append(f"{found.elsewhere} numbers of ours have no counterpart in the paper.")
    return lines


def print_beside(report: Report, plan: Plan, console: Console) -> tuple[Beside, ...]:
    """Prints tables of which something was run, and the verdicts.

    Args:
        report: What was found.
        plan: The plan that it was made of.
        console: Where to.

    Returns:
        The comparisons.
    """
    every = beside(measured(report, plan))
    for found in every:
        console.print()
        console.rule(Text(heading(found), style="bold"))
        for line in remarks(report, found):
            console.print(Text(line, style="yellow"))
        for table in found.tables:
            if table.num_run:
                print_grid(beside_grid(table, whole=False), console)
        empty = [table.paper.name for table in found.tables if not table.num_run]
        if empty:
            console.print(Text(f"Nothing was run of: {', '.join(empty)}.", style="dim"))
        print_grid(claim_grid(found), console)
    console.print(Text("\n".join(HOW_TO_READ), style="dim"))
    return every


def write_paper(report: Report, plan: Plan, every: Sequence[Beside], out: str | Path) -> list[Path]:
    """Writes the page, tables as CSV and LaTeX, and figures as PNG and SVG.

    Args:
        report: What was found.
        plan: The plan that it was made of.
        every: Comparisons; the files of all but the first lie in folders of their own.
        out: Folder, made where it is absent.

    Returns:
        The files.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "report.html"
    claims = [_claims(report, found) for found in every]
    tables = [_tables(found, index) for index, found in enumerate(every)]
    write_html(report, plan, page, [*claims, *tables])
    written = [page]
    for index, found in enumerate(every):
        own = folder / f"variant{index}" if index else folder
        own.mkdir(exist_ok=True)
        for name, content in _files(found).items():
            (own / name).write_bytes(content)
            written.append(own / name)
    return written


def _files(found: Beside) -> dict[str, bytes]:
    """Returns the files of a comparison by name."""
    texts = {"claims.csv": claims_csv(found), "claims.tex": claims_tex(found)}
    for table in found.tables:
        texts[f"{table.paper.name}.csv"] = table_csv(table)
        texts[f"{table.paper.name}.tex"] = table_tex(table)
    files = {name: text.encode() for name, text in texts.items()}
    for name, draw in FIGURES:
        figure = draw(found)
        files |= {f"{name}.png": to_png(figure), f"{name}.svg": svg_file(figure, name)}
    return files


def _claims(report: Report, found: Beside) -> Section:
    """Returns the page's part on a comparison's claims."""
    lines = "".join(f"<li>{escape(line)}</li>" for line in remarks(report, found))
    details = "".join(
        fold(own.claim.text, html_grid(comparison_grid(printed, own)))
        for printed, own in zip(found.paper, found.ours, strict=True)
    )
    grid = claim_grid(found)
    return Section(
        title=f"{grid.title}: {found.variant or DEFAULTS}",
        body=f'<ul class="warnings">{lines}</ul>{html_grid(grid, titled=False)}'
        f"<h3>Comparisons behind each claim</h3>{details}",
    )


def _tables(found: Beside, index: int) -> Section:
    """Returns the page's part with a comparison's figures and tables."""
    figures = "".join(
        f'<figure><div class="wide" role="img" aria-label="{name}">'
        f"{to_svg(draw(found), f'{name}-{index}')}</div></figure>"
        for name, draw in FIGURES
    )
    grids = {f"{t.paper.name}-{index}": beside_grid(t, whole=True) for t in found.tables}
    tables = "".join(html_grid(grid, anchor=anchor) for anchor, grid in grids.items())
    how = "".join(f"<li>{escape(line)}</li>" for line in HOW_TO_READ)
    return Section(
        title=heading(found),
        body=f'<h3>Figures 2 and 3</h3>{figures}{tables}<ul class="muted">{how}</ul>',
        parts=tuple((anchor, grid.title) for anchor, grid in grids.items()),
    )
