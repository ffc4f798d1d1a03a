"""A sweep from Python: what `kdscale plan`, `run` and `report` do, for notebooks and programs."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from kdscale.core.scale import Scale, scale_named
from kdscale.core.storage import Storage
from kdscale.core.types import UnfinishedStage, unknown_name
from kdscale.sweep.grid import Sweep
from kdscale.sweep.outcomes import TrialRow
from kdscale.sweep.page import PLOTS, SHEET
from kdscale.sweep.plan import Plan, make_plan
from kdscale.sweep.progress import print_plan
from kdscale.sweep.render import print_report
from kdscale.sweep.report import Report, build_report
from kdscale.sweep.run import execute
from kdscale.sweep.sheet import sheet_figure
from kdscale.sweep.tracking import default_tracking_uri

RUN = "study.run()"
WIDTH = 110  # where there is no terminal to ask


@dataclass(frozen=True)
class Study:
    """A sweep with all that decides what it comes to.

    Attributes:
        sweep: What is asked.
        storage: Where stages live: a path or any fsspec URL.
        scale: What roles mean; None takes the sweep's own.
        settings: Recipe fields set last, as `--set` does: `{"lr": 1e-3, "run": {"log_every": 1}}`.
        data: Where shards are, as `--data` says it: `{"cc12m": "/data/{00000..02175}.tar"}`.
        tracking_uri: MLflow server; None for SQLite in the storage.
    """

    sweep: Sweep
    storage: str = "runs"
    scale: str | Scale | None = None
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    data: Mapping[str, str] = field(default_factory=dict[str, str])
    tracking_uri: str | None = None

    @property
    def mlflow_uri(self) -> str:
        """Where MLflow finds the study's runs, for an `MlflowClient`."""
        return self.tracking_uri or default_tracking_uri(Storage(self.storage))

    def plan(self) -> Plan:
        """Plans the study: trials, stages, what is finished already. Runs nothing.

        Raises:
            ConfigError, UnknownName: As of `kdscale plan`: what cannot be run, or is not known.
        """
        scale = scale_named(self.scale or self.sweep.scale)
        scale = scale.replace(data_paths=scale.data_paths | dict(self.data))
        return make_plan([self.sweep], Storage(self.storage), scale, self.settings)

    def show_plan(self, console: Console | None = None) -> None:
        """Prints the plan."""
        print_plan(self.plan(), console or _console())

    def run(self, console: Console | None = None) -> None:
        """Runs every stage that is not finished and prints the report.

        Args:
            console: Where progress and tables go.

        Raises:
            NoShards, StageFailed: As `kdscale.sweep.run.execute`.
        """
        execute(
            self.plan(),
            [self.sweep],
            console=console or _console(),
            tracking_uri=self.tracking_uri,
            command=RUN,
        )

    def report(self) -> Report:
        """Reads what the finished stages say."""
        return build_report(self.plan(), [self.sweep], command=RUN)

    def show(self, console: Console | None = None, *, details: bool = False) -> None:
        """Prints the report; with `details` the tables of each of many trials, too."""
        print_report(self.report(), console or _console(), details=details)

    def rows(self) -> list[dict[str, Any]]:
        """Returns one flat row a trial, as a data frame takes it; what is not finished is None."""
        return [_flat(row) for row in self.report().trials]

    def figure(self, name: str) -> Figure:
        """Draws a figure of the report.

        Args:
            name: `scores`, `accuracy`, `loss`, `cka` or `samples`.

        Raises:
            UnknownName: The report has no such figure.
            UnfinishedStage: No stage has left what it shows.
        """
        report, sweep = self.report(), self.sweep.name
        drawings = {plot.name: (plot, partial(draw, report, sweep)) for plot, draw in PLOTS}
        sheet = partial(sheet_figure, report, sweep, Storage(self.storage))
        drawings |= {SHEET.name: (SHEET, sheet)}
        if name not in drawings:
            raise unknown_name("figure", name, drawings)
        plot, draw = drawings[name]
        drawn = draw()
        if drawn is None:
            raise UnfinishedStage(f"nothing to draw: {plot.absent}. {report.message()}")
        return drawn


def _console() -> Console:
    """Returns a console that writes plain lines where nobody sits at a terminal.

    A notebook would set each line apart as an output, and its kernel asks for colours.
    """
    if sys.stdout.isatty():
        return Console()
    return Console(force_jupyter=False, force_terminal=False, width=WIDTH)


def _flat(row: TrialRow) -> dict[str, Any]:
    """Returns a trial's choices, its numbers, and the ends of their intervals."""
    score, difference = row.score, row.difference
    ends = score and asdict(score.interval)
    others = difference and asdict(difference.interval)
    return {
        "trial": row.name,
        **row.chosen,
        "state": row.state,
        "key": row.key,
        "zero_shot_top1": score and score.top1,
        "low": ends and ends["low"],
        "high": ends and ends["high"],
        "n": score and score.n,
        "chance": score and score.chance,
        "difference": difference and difference.points,
        "difference_low": others and others["low"],
        "difference_high": others and others["high"],
        "cka_debiased": row.cka_debiased,
        "cka_biased": row.cka_biased,
        "seconds": row.seconds,
    }
