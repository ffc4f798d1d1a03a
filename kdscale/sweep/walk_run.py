"""Walks: runs the reduced plan trial by trial, keeps records instead of weights, and tells."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console
from rich.table import Table

from kdscale.core.types import StageFailed
from kdscale.core.vlm_config import Finetune
from kdscale.sweep.plan import PlannedTrial
from kdscale.sweep.progress import Follower, Progress
from kdscale.sweep.walk import CHANGED, SUMMARY, Walk


def run_walk(walk: Walk, console: Console) -> None:
    """Walks what is not walked yet, and writes the summary into the storage.

    A model of true size takes gigabytes: once no later trial needs it, its weights are removed.

    Args:
        walk: From `kdscale.sweep.walk.walk_of`.
        console: Where progress and the summary go.

    Raises:
        StageFailed: After everything else was walked, naming what could not be.
    """
    from kdscale.sweep.prepare import prepare
    from kdscale.sweep.schedule import TrialFailure, run_plan

    plan, failures = walk.plan, list[TrialFailure]()
    progress = Progress(console)
    progress.say(f"{len(walk.cells)} cells, {len(plan.stages)} builds; changed: {CHANGED}")
    prepare(plan, progress.say)
    for number, trial in enumerate(plan.trials, start=1):
        progress.say(f"[bold]{number}/{len(plan.trials)}[/] {trial.sweep}: {trial.trial.name}")
        done = walk.done()
        stages = {key: replace(plan.stages[key], reused=key in done) for key in trial.path}
        part = replace(plan, trials=[trial], stages=stages)
        with Follower(part, progress):
            failures += run_plan(part)
        _drop_weights(walk, trial, plan.trials[number:])
    document = walk.document()
    plan.storage.write_json(document, *SUMMARY)
    console.print(summary_table(walk))
    console.print(f"summary {plan.storage.url(*SUMMARY)}", soft_wrap=True)
    if failures:
        lines = [f"  {f.trial.sweep}: {f.trial.trial.name}: {f.message}" for f in failures]
        raise StageFailed(f"{len(failures)} trial(s) could not be walked:\n" + "\n".join(lines))


def summary_table(walk: Walk) -> Table:
    """Returns how many cells of each sweep are covered."""
    document = walk.document()
    table = Table("sweep", "cells", "covered", title=f"Walk ({document['changed']})")
    for name, covered in document["sweeps"].items():
        table.add_row(name, str(len(covered)), str(sum(covered)))
    built = ", ".join(f"{count} {kind}" for kind, count in document["stages"].items())
    table.caption = f"{document['covered']} of {document['cells']} cells covered by {built}"
    return table


def _drop_weights(walk: Walk, trial: PlannedTrial, later: list[PlannedTrial]) -> None:
    """Removes the weights of whole VLMs that no later trial reads."""
    needed = {key for other in later for key in other.path}
    for key in trial.path:
        stage = walk.plan.stages[key]
        if stage.kind == Finetune.kind and key not in needed:
            store = stage.store(walk.plan.storage)
            if store.is_done():
                walk.plan.storage.remove(*store.parts, "output", "model")
