"""The command line: thin; every command builds a plan and hands it on."""

from __future__ import annotations

import inspect
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from kdscale.cli_bench import bench
from kdscale.cli_cka import cka
from kdscale.cli_cluster import cluster_app
from kdscale.cli_data import data_app
from kdscale.cli_doctor import doctor
from kdscale.cli_evaluate import evaluate
from kdscale.cli_export import export
from kdscale.cli_gc import collect_garbage
from kdscale.cli_logs import logs
from kdscale.cli_plan import (
    AcceleratorName,
    Efficiency,
    MaxCost,
    MaxGpuHours,
    Prices,
    RedoDependants,
    RedoKey,
    Spot,
    WhyKey,
    Yes,
    make_room,
    show,
    to_run_again,
)
from kdscale.cli_request import (
    Request,
    common_scale,
    load_sweep,
    narrowed,
    parse_data,
    parse_seeds,
    parse_settings,
)
from kdscale.cli_zero_shot import zero_shot
from kdscale.core.redaction import redacted
from kdscale.core.scale import Scale, scale_named
from kdscale.core.storage import Storage
from kdscale.core.types import ConfigError
from kdscale.sweep.budget import Budget, Limits
from kdscale.sweep.grid import Sweep
from kdscale.sweep.plan import Plan, make_plan
from kdscale.sweep.prices import DEFAULT_ACCELERATOR, DEFAULT_EFFICIENCY, find_rates
from kdscale.sweep.walk import WALK, walk_of
from kdscale.terminal import AsJson, StorageRoot, console, guarded

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
data_app.command("bench")(bench)
app.add_typer(data_app, name="data")
app.add_typer(cluster_app, name="cluster")

Files = Annotated[list[Path], typer.Argument(help="Sweep files.", exists=True, dir_okay=False)]
ScaleName = Annotated[str | None, typer.Option("--scale", help="paper, mini or true_size_cpu.")]
Uri = Annotated[
    str | None,
    typer.Option("--tracking-uri", envvar="MLFLOW_TRACKING_URI", help="MLflow; SQLite by default."),
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Recipe field, e.g. lr=1e-3, run.num_workers=1.")
]
Data = Annotated[
    list[str] | None, typer.Option("--data", help="Shards: PATTERN, or NAME=PATTERN per data set.")
]
RandomWeights = Annotated[bool, typer.Option("--random-weights", help="Pretrained towers drawn.")]
Gates = Annotated[
    bool, typer.Option("--gates/--no-gates", help="Check pretrained teachers on ImageNet first.")
]
Seeds = Annotated[str | None, typer.Option("--seeds", help="Instead of the sweep's: 0,1,2.")]
Paper = Annotated[bool, typer.Option("--paper", help="Beside the numbers of arXiv 2511.17886.")]
Details = Annotated[
    bool, typer.Option("--details", help="The tables of each trial, however many there are.")
]
Out = Annotated[Path | None, typer.Option("--out", help="With --paper: folder for its files.")]
Only = Annotated[
    str | None, typer.Option("--only", help="Only trials that end so: distill, or vlm.")
]
Page = Annotated[
    Path | None, typer.Option("--out", help="Markdown page whose blocks are written anew.")
]
EveryStage = Annotated[bool, typer.Option("--all", help="Stages that are done or wait, too.")]
ResumeStopped = Annotated[
    bool, typer.Option("--resume-stopped", help="Go on with trials that a scheduler stopped.")
]
MaxSteps = Annotated[int | None, typer.Option("--max-steps", help="Stop every stage there.", min=1)]


def _request(
    files: Files,
    scale: ScaleName = None,
    storage: StorageRoot = "runs",
    tracking_uri: Uri = None,
    settings: Settings = None,
    data: Data = None,
    random_weights: RandomWeights = False,
    max_steps: MaxSteps = None,
    gates: Gates = True,
    seeds: Seeds = None,
    only: Only = None,
    resume_stopped: ResumeStopped = False,
    as_json: AsJson = False,
    *,
    usual: Scale | None,
) -> Request:
    """Reads the options that all commands on sweeps take; `usual` as of `sweep_command`."""
    sweeps = _sweeps(files, seeds, only)
    found = scale_named(scale or usual or common_scale(sweeps))
    found = found.replace(data_paths=parse_data(data or []), gates=found.gates and gates)
    if random_weights:
        found = found.replace(random_weights=True)
    overrides = parse_settings(settings or [], found)
    if max_steps is not None:
        overrides["max_steps"] = max_steps
    return Request(
        sweeps=sweeps,
        storage=Storage(storage),
        scale=found,
        overrides=overrides,
        tracking_uri=tracking_uri,
        as_json=as_json,
        command=_run_command(),
        resume_stopped=resume_stopped,
    )


def _sweeps(files: Sequence[Path], seeds: str | None, only: str | None) -> list[Sweep]:
    """Loads sweeps, with other seeds or fewer trials where that is asked for."""
    sweeps = [load_sweep(file) for file in files]
    if seeds is not None:
        sweeps = [replace(sweep, seeds=parse_seeds(seeds)) for sweep in sweeps]
    return sweeps if only is None else [narrowed(sweep, only) for sweep in sweeps]


def sweep_command(
    action: Callable[..., None], usual: Scale | None = None, *, reads: bool = False
) -> Callable[..., None]:
    """Makes a command of an action: all of them take the same options, and each its own.

    Args:
        action: What to do.
        usual: The scale without `--scale`; None takes that of the sweeps.
        reads: It reads what a run has left, so that a storage has to be there.
    """
    *shared, _ = inspect.signature(_request, eval_str=True).parameters.values()
    _, *more = inspect.signature(action, eval_str=True).parameters.values()

    def command(**options: Any) -> None:
        """Takes the shared options out and leaves the action its own."""
        common = {option.name: options.pop(option.name) for option in shared}
        with guarded():
            request = _request(**common, usual=usual)
            if reads:
                request.storage.check_made(f"`{request.command}`")
            action(request, **options)

    command.__doc__ = action.__doc__
    signature = inspect.Signature([*shared, *more])
    command.__dict__["__signature__"] = signature
    command.__annotations__ = {name: p.annotation for name, p in signature.parameters.items()}
    return command


def _run_command() -> str:
    """Returns the command that runs what this one was asked about, without passwords."""
    program, *options = map(redacted, sys.argv)
    options = to_run_again(options)
    if Path(program).suffix == ".py":
        return shlex.join(["python", program, *options])
    return shlex.join(["kdscale", "run", *options[1:]])


def run_sweep(
    request: Request,
    *,
    redo: RedoKey = None,
    redo_dependants: RedoDependants = False,
    yes: Yes = False,
    max_gpu_hours: MaxGpuHours = None,
    max_cost: MaxCost = None,
    spot: Spot = False,
    accelerator: AcceleratorName = DEFAULT_ACCELERATOR,
    efficiency: Efficiency = DEFAULT_EFFICIENCY,
    prices: Prices = None,
) -> None:
    """Run sweeps: every stage that is not finished, then the report."""
    from kdscale.sweep.run import execute

    shown = Console(stderr=request.as_json)
    limits = Limits(gpu_hours=max_gpu_hours, cost=max_cost, spot=spot)
    plan = request.plan()
    plan.rates = rates = find_rates(accelerator, efficiency, prices)
    if redo is not None:
        again = make_room(plan, redo, limits, shown, dependants=redo_dependants, yes=yes)
        plan = request.plan()
        plan.rates, plan.redo = rates, again
    execute(
        plan,
        request.sweeps,
        console=shown,
        tracking_uri=request.tracking_uri,
        command=request.command,
        limits=limits,
        resume_stopped=request.resume_stopped,
    )
    if request.as_json:
        show_report(request)


def show_plan(
    request: Request,
    *,
    why: WhyKey = None,
    max_gpu_hours: MaxGpuHours = None,
    max_cost: MaxCost = None,
    spot: Spot = False,
    accelerator: AcceleratorName = DEFAULT_ACCELERATOR,
    efficiency: Efficiency = DEFAULT_EFFICIENCY,
    prices: Prices = None,
) -> None:
    """Show what a run would do: trials, distinct stages, reuse, cost. Runs nothing.

    Above a limit it ends as `run` would, after the plan is shown.
    """
    plan = request.plan()
    plan.rates = find_rates(accelerator, efficiency, prices)
    show(plan, why, as_json=request.as_json)
    limits = Limits(gpu_hours=max_gpu_hours, cost=max_cost, spot=spot)
    Budget(plan, limits, Console(stderr=request.as_json).print).check()


def say_if_untouched(plan: Plan, request: Request) -> None:
    """Says first of all if a storage holds none of a plan's stages: it may be another's."""
    if not plan.begun():
        told = Console(stderr=request.as_json, soft_wrap=True, markup=False)
        told.print(f"{request.storage.root} holds nothing of these sweeps. Run: {request.command}")


def show_report(
    request: Request, *, paper: Paper = False, out: Out = None, details: Details = False
) -> None:
    """Show what came out: the table with intervals; with --out, files as well."""
    from kdscale.sweep.render import print_report
    from kdscale.sweep.report import build_report

    if out is not None and not paper:
        raise ConfigError("--out is the folder of what --paper writes: give both")
    if paper:
        show_paper(request, out, details=details)
        return
    plan = request.plan()
    say_if_untouched(plan, request)
    report = build_report(plan, request.sweeps, command=request.command)
    if request.as_json:
        print(json.dumps(report.document(), indent=2))
    else:
        print_report(report, console, details=details)


def show_paper(request: Request, out: Path | None, *, details: bool) -> None:
    """Show what came out beside the paper's numbers, and write it to a folder."""
    from kdscale.sweep.paper_report import print_beside, write_paper
    from kdscale.sweep.render import print_report
    from kdscale.sweep.report import build_report

    plan, target = request.plan(), Console(stderr=request.as_json)
    say_if_untouched(plan, request)
    found = build_report(plan, request.sweeps, command=request.command)
    print_report(found, target, details=details)
    every = print_beside(found, plan, target)
    if request.as_json:
        beside = [one.document() for one in every]
        print(json.dumps(found.document() | {"paper": beside}, indent=2))
    for path in write_paper(found, plan, every, out) if out else ():
        print(path, file=sys.stderr if request.as_json else sys.stdout)


def show_findings(request: Request, *, out: Page = None) -> None:
    """Show how a sweep's cells differ from its baseline, over seeds; with --out, write them down.

    What is not finished is left out: more seeds of one kind of trial than of another are fine.
    """
    from kdscale.sweep.findings import find
    from kdscale.sweep.findings_views import finding_grid, write_findings
    from kdscale.sweep.render import print_grid
    from kdscale.sweep.report import build_report

    plan = request.plan()
    for sweep in request.sweeps:
        found = find(build_report(plan, [sweep], command=request.command), plan, sweep)
        if not found:
            raise ConfigError(f"{sweep.name}: nothing is finished yet. Run: {request.command}")
        console.rule(sweep.name)
        for finding in found:
            print_grid(finding_grid(finding), console)
        if out is not None:
            command = request.command.replace("kdscale run", "kdscale findings", 1)
            command += f" --out {out}"
            for path in write_findings(out, sweep.name, sweep.question, found, command):
                console.print(path)


def show_status(
    request: Request,
    *,
    every_stage: EveryStage = False,
    accelerator: AcceleratorName = DEFAULT_ACCELERATOR,
    prices: Prices = None,
) -> None:
    """Show how far the sweeps are: stages by state, throughput, what was used, what is left."""
    from kdscale.sweep.status import look, print_status

    plan = request.plan()
    plan.rates = find_rates(accelerator, DEFAULT_EFFICIENCY, prices)
    say_if_untouched(plan, request)
    status = look(plan)
    if request.as_json:
        print(json.dumps(status.document(), indent=2))
    else:
        print_status(status, console, every_stage=every_stage)


def walk_sweeps(request: Request) -> None:
    """Walk every cell at true size with random weights: one step of each stage, one question.

    With --json nothing is run: it tells which build covers which cell, and what is walked already.
    """
    from kdscale.sweep.walk_run import run_walk

    overrides = {"max_steps": 1} | request.overrides
    walk = walk_of(make_plan(request.sweeps, request.storage, request.scale, overrides))
    if request.as_json:
        print(json.dumps(walk.document(), indent=2))
    else:
        run_walk(walk, console)


app.command("run")(sweep_command(run_sweep))
app.command("walk")(sweep_command(walk_sweeps, WALK))
app.command("plan")(sweep_command(show_plan))
app.command("report")(sweep_command(show_report, reads=True))
app.command("findings")(sweep_command(show_findings, reads=True))
app.command("status")(sweep_command(show_status, reads=True))
app.command("logs")(logs)
app.command("gc")(sweep_command(collect_garbage, reads=True))
app.command("doctor")(doctor)
app.command("export")(export)
app.command("evaluate")(evaluate)
app.command("cka")(cka)
app.command("zero-shot")(zero_shot)
