"""A sweep's report as files: the page, its trials as a table, its scores as a picture."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from kdscale.sweep.figures import scores_figure
from kdscale.sweep.outcomes import TrialRow
from kdscale.sweep.page import write_html
from kdscale.sweep.plan import Plan
from kdscale.sweep.report import Report
from kdscale.sweep.tracked_facts import trial_scores
from kdscale.sweep.vlm_outcomes import VlmRow

DPI = 150


def write_files(report: Report, plan: Plan, folder: str) -> dict[str, str]:
    """Writes the report of one sweep: {name: path of a file in the folder}."""
    (table,) = report.tables
    paths = {name: str(Path(folder, name)) for name in ("report.html", "trials.csv", "scores.png")}
    write_html(report, plan, paths["report.html"])
    _write_csv(report, table.sweep, paths["trials.csv"])
    figure: Any = scores_figure(report, table.sweep)
    if figure is None:
        del paths["scores.png"]
    else:
        figure.savefig(paths["scores.png"], dpi=DPI, metadata={"Software": None})
    return paths


def _write_csv(report: Report, sweep: str, path: str) -> None:
    """Writes a row for each trial: what was chosen, and every number that the report has."""
    scores = trial_scores(report, sweep)
    trials: list[tuple[TrialRow | VlmRow, dict[str, float]]] = [
        *((row, row.metrics | _interval(row)) for row in report.of(sweep)),
        *((row, {}) for row in report.vlms if row.sweep == sweep),
    ]
    rows: list[dict[str, Any]] = [
        {"trial": row.name, "key": row.key, "state": row.state}
        | {name: "none" if value is None else value for name, value in row.chosen.items()}
        | metrics
        | scores.get(row.name, {})
        for row, metrics in trials
    ]
    columns = dict.fromkeys(name for row in rows for name in row)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _interval(row: TrialRow) -> dict[str, float]:
    """Returns the ends of a score's 95 % interval."""
    if row.score is None:
        return {}
    return {"zero_shot_low": row.score.interval.low, "zero_shot_high": row.score.interval.high}
