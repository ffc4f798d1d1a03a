"""A sweep from plan to report: prepare data, run trials, mirror to MLflow, write the report."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from kdscale.core.types import NoShards
from kdscale.sweep.grid import Sweep
from kdscale.sweep.plan import Plan
from kdscale.sweep.progress import Follower, Progress, print_plan
from kdscale.sweep.render import print_report, write_html
from kdscale.sweep.report import build_report
from kdscale.sweep.tracking import Mirror, Tracker, default_tracking_uri, viewing


def execute(
    plan: Plan,
    sweeps: Sequence[Sweep],
    *,
    console: Console,
    tracking_uri: str | None,
    command: str,
) -> None:
    """Runs what a plan still lacks and reports.

    Args:
        plan: What to run.
        sweeps: The sweeps it was made from.
        console: Where progress and tables go.
        tracking_uri: MLflow server; None for SQLite in the storage.
        command: What runs the rest of a study that did not finish.

    Raises:
        NoShards: If input data are not at hand.
        StageFailed: After everything else has finished, naming the trials that failed.
    """
    from kdscale.sweep.prepare import prepare
    from kdscale.sweep.schedule import raise_failures, run_plan

    if plan.missing:
        raise NoShards("; ".join(sorted(set(plan.missing))))
    uri = tracking_uri or default_tracking_uri(plan.storage)
    progress = Progress(console)
    print_plan(plan, console)
    if not plan.remaining():
        progress.say("[green]every stage is finished already: nothing to run[/]")
    prepare(plan, progress.say)

    def connect() -> list[Tracker]:
        return [Tracker(uri, sweep.name, plan) for sweep in sweeps]

    with Follower(plan, progress), Mirror(connect) as mirror:
        failures = run_plan(plan)
    _publish(plan, sweeps, mirror, console, command)
    _print_place(console, "look", viewing(uri))
    raise_failures(failures)


def _publish(
    plan: Plan, sweeps: Sequence[Sweep], mirror: Mirror, console: Console, command: str
) -> None:
    """Writes each sweep's report, locally and to MLflow."""
    for sweep in sweeps:
        report = build_report(plan, [sweep], command=command)
        print_report(report, console)
        with tempfile.TemporaryDirectory() as scratch:
            path = os.path.join(scratch, "report.html")
            write_html(report, plan, path)
            name = ("reports", sweep.name, "report.html")
            with open(path, "rb") as file:
                plan.storage.write(file.read(), *name)
            _print_place(console, "report", plan.storage.url(*name))
            mirror.publish(sweep.name, {"report": path})


def _print_place(console: Console, name: str, place: str) -> None:
    """Prints a path or command to be copied: neither wrapped nor read as markup."""
    console.print(Text.assemble((f"{name:6}", "bold"), f" {place}"), soft_wrap=True, markup=False)
