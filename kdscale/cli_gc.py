"""`kdscale gc`: what is removed from a storage, and what is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdscale.cli_plan import Yes
from kdscale.cli_request import Request
from kdscale.terminal import console

Keep = Annotated[
    list[Path] | None,
    typer.Option(
        "--keep",
        metavar="PLAN.json",
        help="Keep the stages of this plan, from `kdscale plan ... --json`, too; repeatable.",
        exists=True,
        dir_okay=False,
    ),
]
Finished = Annotated[bool, typer.Option("--finished", help="Remove unneeded results, too.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")]
OlderThan = Annotated[
    float, typer.Option("--older-than", help="Days since it was last written.", min=0)
]


def collect_garbage(
    request: Request,
    *,
    keep: Keep = None,
    finished: Finished = False,
    dry_run: DryRun = False,
    older_than: OlderThan = 7.0,
    yes: Yes = False,
) -> None:
    """Remove what killed runs have left behind and, with --finished, results no sweep needs.

    Give every sweep that still matters: what their plans reach is kept. Plans with other options
    (--scale, --set, --seeds, --data) are given by --keep.
    """
    from kdscale.sweep import gc
    from kdscale.sweep.run import check_inputs

    plan = request.plan()
    check_inputs(plan)  # without them keys are others, and all that a run has made seems unneeded
    every = gc.find_garbage(plan, kept=gc.kept_keys(keep or []), older_than_s=0.0)
    least_s = older_than * gc.DAY_S
    found = [one for one in every if one.age_s >= least_s]
    taken = [one for one in found if finished or not one.is_result]
    gc.print_garbage(found, taken, plan, console)
    gc.print_young([one for one in every if one.age_s < least_s], older_than, console)
    if not taken or dry_run:
        return
    if not yes:
        typer.confirm("Remove?", abort=True, err=True)
    removed = gc.remove(taken)
    console.print(f"removed {len(removed)}, {sum(one.size for one in removed) / 1e6:,.1f} MB")
