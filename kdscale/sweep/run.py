"""A sweep from plan to report: prepare data, run trials, mirror to MLflow, write the report."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from kdscale.core.types import NoShards
from kdscale.sweep.budget import NO_LIMITS, Budget, Limits
from kdscale.sweep.chosen import is_left, split
from kdscale.sweep.grid import Sweep
from kdscale.sweep.interrupt import Interrupt
from kdscale.sweep.mirror import Mirror
from kdscale.sweep.plan import Plan
from kdscale.sweep.progress import Follower, Progress, print_plan
from kdscale.sweep.render import print_report
from kdscale.sweep.report import build_report, check_fields
from kdscale.sweep.report_files import write_files
from kdscale.sweep.tracked_facts import score_trial, trial_scores
from kdscale.sweep.tracking import Tracker, address, default_tracking_uri, viewing
from kdscale.sweep.tree import rounded

if TYPE_CHECKING:
    from kdscale.sweep.schedule import TrialFailure


def execute(
    plan: Plan,
    sweeps: Sequence[Sweep],
    *,
    console: Console,
    tracking_uri: str | None,
    command: str,
    limits: Limits = NO_LIMITS,
    resume_stopped: bool = False,
) -> None:
    """Runs what a plan still lacks and reports.

    Args:
        plan: What to run.
        sweeps: The sweeps it was made from.
        console: Where progress and tables go.
        tracking_uri: MLflow server; None for SQLite in the storage.
        command: What runs the rest of a study that did not finish.
        limits: What the run may use.
        resume_stopped: Go on with trials that a scheduler has stopped, to their end.

    Raises:
        NoShards: If input data are not at hand.
        UnknownName: If a sweep's table or baseline names a field that recipes do not have.
        OverBudget: If what is left would take more than the limits allow, or nobody knows.
        ImpossibleResources: If a stage fits on no machine; nothing has been prepared then.
        StageFailed: After everything else has finished, naming the trials that failed.
        LimitReached: After all stages have stopped.
        Interrupted: Likewise, where a signal has come; without a report, for there is little time.
    """
    from kdscale.sweep.prepare import prepare
    from kdscale.sweep.schedule import check_room, raise_failures

    check_inputs(plan)
    for sweep in sweeps:
        check_fields(sweep)
    uri = tracking_uri or default_tracking_uri(plan.storage)
    progress = Progress(console)
    print_plan(plan, console)
    budget = Budget(plan, limits, progress.say)
    budget.check()
    parts = split(plan, sweeps, resume_stopped)
    if not is_left(plan, sweeps, resume_stopped):
        ended = "finished" if not plan.remaining() else "finished or stopped early"
        progress.say(f"[green]every stage is {ended} already: nothing to run[/]")
    check_room(parts[0])
    prepare(plan, progress.say)
    connect = partial(_trackers, uri, plan, sweeps, command)
    interrupt = Interrupt(plan, progress.say)
    with Follower(plan, progress), Mirror(connect) as mirror, budget, interrupt:
        failures = _run_parts(plan, *parts, budget, interrupt, progress.say)
    if interrupt.has_come:
        mirror.end()
        interrupt.raise_if_stopped(command)
    if limits:
        progress.say(f"used about {rounded(budget.hours)} {budget.unit}")
    pages = _publish(plan, sweeps, mirror, console, command)
    _print_pages(console, uri, pages)
    raise_failures(failures, plan.storage)
    budget.raise_if_stopped()


def _trackers(uri: str, plan: Plan, sweeps: Sequence[Sweep], command: str) -> list[Tracker]:
    """Connects every sweep with MLflow."""
    return [
        Tracker(uri, s.name, plan, command, s.question, partial(score_trial, plan, s))
        for s in sweeps
    ]


def _run_parts(
    plan: Plan,
    alone: Plan,
    steered: Sequence[Sweep],
    budget: Budget,
    interrupt: Interrupt,
    say: Callable[[str], None],
) -> list[TrialFailure]:
    """Runs what no scheduler steers, then the searches one after the other."""
    from kdscale.sweep.schedule import run_plan

    def is_over() -> bool:
        return bool(budget.reason) or interrupt.has_come

    failures = run_plan(alone, interrupt.run)
    for sweep in steered:
        from kdscale.sweep.steer import run_search

        failures += run_search(plan, sweep, say, is_over, interrupt.run)
    return failures


def check_inputs(plan: Plan) -> None:
    """Raises NoShards if input data are not at hand."""
    if plan.missing:
        raise NoShards("; ".join(sorted(set(plan.missing))))


def _publish(
    plan: Plan, sweeps: Sequence[Sweep], mirror: Mirror, console: Console, command: str
) -> list[str]:
    """Writes each sweep's report, locally and to MLflow, and returns MLflow's pages of them."""
    pages: list[str] = []
    for sweep in sweeps:
        report = build_report(plan, [sweep], command=command)
        scores = trial_scores(report, sweep.name)
        print_report(report, console)
        with tempfile.TemporaryDirectory() as scratch:
            files = write_files(report, plan, scratch)
            for name, path in files.items():
                plan.storage.write(Path(path).read_bytes(), "reports", sweep.name, name)
            place = plan.storage.url("reports", sweep.name, "report.html")
            _print_place(console, "report", place)
            pages.append(mirror.publish(sweep.name, files, scores))
    return [page for page in pages if page]


def _print_pages(console: Console, uri: str, pages: Sequence[str]) -> None:
    """Prints where MLflow shows the sweeps."""
    _print_place(console, "look", viewing(uri))
    for page in pages:
        _print_place(console, "table", address(uri, page))


def _print_place(console: Console, name: str, place: str) -> None:
    """Prints a path or command to be copied: neither wrapped nor read as markup."""
    console.print(Text.assemble((f"{name:6}", "bold"), f" {place}"), soft_wrap=True, markup=False)
