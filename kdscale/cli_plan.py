"""What `kdscale plan` and `kdscale run` are asked beside sweeps: costs, reasons, repetition."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kdscale.sweep.budget import Budget, Limits
from kdscale.sweep.plan import Plan
from kdscale.sweep.progress import print_plan
from kdscale.sweep.redo import find_redo
from kdscale.sweep.why import explain
from kdscale.terminal import console

AcceleratorName = Annotated[
    str, typer.Option("--accelerator", help="What hours and money are counted for: h100, a100, ...")
]
Efficiency = Annotated[
    float, typer.Option("--efficiency", help="Share of its peak that training sustains.")
]
Prices = Annotated[
    Path | None, typer.Option("--prices", help="TOML of your own peaks and prices.", dir_okay=False)
]
WhyKey = Annotated[
    str | None, typer.Option("--why", metavar="KEY", help="Why a stage is not finished already.")
]
RedoKey = Annotated[
    str | None, typer.Option("--redo", metavar="KEY", help="Do a finished stage again.")
]
RedoDependants = Annotated[
    bool, typer.Option("--redo-dependants", help="And those of the plan that were made from it.")
]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask before something is removed.")]
MaxGpuHours = Annotated[
    float | None, typer.Option("--max-gpu-hours", help="Refuse more, and stop there.", min=0)
]
MaxCost = Annotated[
    float | None, typer.Option("--max-cost", help="Refuse dearer plans, and stop there.", min=0)
]
Spot = Annotated[bool, typer.Option("--spot", help="Count --max-cost at the spot price.")]


def show(plan: Plan, why: str | None, *, as_json: bool) -> None:
    """Shows a plan, or why one of its stages would run."""
    if why is not None:
        reason = explain(plan, why)
        if as_json:
            print(json.dumps(reason.document(), indent=2))
        else:
            console.print(reason.tree())
    elif as_json:
        print(json.dumps(plan.document(), indent=2))
    else:
        print_plan(plan, console)


def make_room(
    plan: Plan, key: str, limits: Limits, console: Console, *, dependants: bool, yes: bool
) -> frozenset[str]:
    """Removes a stage that is to be done again, after a question and if it can be done again.

    Args:
        plan: The plan that has the stage; afterwards the stages that are removed are unfinished.
        key: Of the stage, or its first digits.
        limits: What doing it again may take.
        console: Where it is shown.
        dependants: Remove those of the plan, too, that were made from it.
        yes: Do not ask.

    Returns:
        The keys of all that is to be done again.
    """
    from kdscale.sweep.run import check_inputs

    redo = find_redo(plan, key, dependants=dependants)
    redo.show(console)
    again = frozenset([redo.stage.key, *(store.key for store in redo.again)])
    for name in again:
        plan.stages[name] = replace(plan.stages[name], reused=False)
    check_inputs(plan)
    Budget(plan, limits, lambda _: None).check()
    if not yes:
        typer.confirm("Remove and do again?", abort=True, err=True)
    redo.make_room(plan.storage)
    return again


# What only other commands than `run` take, or `run` is to be told only once.
FLAGS = ("--redo-dependants", "--yes", "--json", "--paper", "--all", "--dry-run", "--finished")
VALUED = ("--redo", "--why", "--out", "--older-than", "--keep")


def to_run_again(options: Sequence[str]) -> list[str]:
    """Returns a command's options as `run` takes them, without those that do stages again."""
    kept: list[str] = []
    for before, option in zip(["", *options], options, strict=False):
        name = option.partition("=")[0]
        if name not in (*FLAGS, *VALUED) and before not in VALUED:
            kept.append(option)
    return kept
