"""What fits on a cluster at once: trials, workers, data tasks, threads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import get_args

from kdscale.core.answers_config import Answers
from kdscale.core.config import Embed
from kdscale.core.nodes import GpuRole, on_gpus_for
from kdscale.core.types import ImpossibleResources
from kdscale.core.vlm_config import Features
from kdscale.sweep.plan import Plan, Stage


def demand(stage: Stage) -> dict[str, float]:
    """Returns what one running stage needs at once: its workers and the tasks that feed them."""
    run = stage.recipe.run
    assert run is not None
    need = {"CPU": run.world_size * run.cpus_per_worker + run.data_cpus}
    if gpus := run.world_size * run.gpus_per_worker:
        need["GPU"] = gpus
        if run.num_workers:
            by_shard = isinstance(stage.recipe, Embed | Features | Answers)
            need |= on_gpus_for("inference" if by_shard else "training", gpus)
    return need


def trial_resources(stages: Sequence[Stage]) -> dict[str, float]:
    """Returns what a trial's own process takes: nothing, unless it trains itself."""
    own = [
        s.recipe.run for s in stages if s.recipe.run is not None and s.recipe.run.num_workers == 0
    ]
    if not own:
        return {"memory": 1.0}  # Tune wants a resource; the trial only waits for its workers
    resources = {"CPU": max(run.cpus_per_worker for run in own)}
    gpus = max(run.gpus_per_worker for run in own)
    return resources | ({"GPU": gpus} if gpus else {})


def concurrent_trials(
    stages: Sequence[Stage],
    available: Mapping[str, float],
    nodes: Sequence[Mapping[str, float]] = (),
) -> int:
    """Returns how many stages fit on the cluster at once.

    Args:
        stages: What is left to run.
        available: Resources of the whole cluster.
        nodes: Resources of each node; none where they are not known.

    Raises:
        ImpossibleResources: If one stage alone does not fit, naming the resource that lacks.
    """
    fits: list[int] = []
    for stage in stages:
        for resource, amount in demand(stage).items():
            have = available.get(resource, 0.0)
            if amount > have:
                what, field = (resource, f"{resource.lower()}s_per_worker")
                if resource in get_args(GpuRole):
                    what, field = f"GPUs for {resource}", "gpus_per_worker"
                raise ImpossibleResources(
                    f"{stage.kind} {stage.name!r} needs {amount:g} {what}, the cluster has "
                    f"{have:g}; lower run.num_workers or run.{field} "
                    "(--set run.num_workers=1), or bring nodes"
                )
            fits.append(int(have // amount))
        check_tasks(stage, nodes)
    return max(1, min(fits, default=1))


def sharing_cores(plan: Plan, concurrency: int, cores: int) -> Plan:
    """Returns a plan whose stages take their share of this machine's cores as threads, at most.

    Trials that train in their own processes run side by side on it, and threads that wait for a
    core hold up all others of their process: two trials of two threads on two cores were four
    times slower than two of one thread.

    Args:
        plan: What is to be run.
        concurrency: Trials at once.
        cores: Of this machine.
    """
    share = max(1, cores // concurrency)
    stages: dict[str, Stage] = {}
    for key, stage in plan.stages.items():
        run = stage.recipe.run
        if run is not None and run.num_workers == 0:
            threads = min(share, run.threads_per_worker or share)
            limited = stage.recipe.replace(run=run.replace(threads_per_worker=threads))
            stage = replace(stage, recipe=limited)
        stages[key] = stage
    return replace(plan, stages=stages)


def check_tasks(stage: Stage, nodes: Sequence[Mapping[str, float]]) -> None:
    """Refuses workers and data tasks that fit on no node; Ray would wait for ever.

    Raises:
        ImpossibleResources: Naming the task, the resource and the largest node.
    """
    run, who = stage.recipe.run, f"{stage.kind} {stage.name!r}"
    assert run is not None
    if run.cpus_per_data_task > run.data_cpus:
        raise ImpossibleResources(
            f"a data task of {who} needs {run.cpus_per_data_task:g} CPU, all of them together may "
            f"use {run.data_cpus:g}; lower run.cpus_per_data_task or raise run.data_cpus"
        )
    for what, field, resource in (
        ("worker", "cpus_per_worker", "CPU"),
        ("worker", "gpus_per_worker", "GPU"),
        ("data task", "cpus_per_data_task", "CPU"),
    ):
        amount = getattr(run, field)
        largest = max((node.get(resource, 0.0) for node in nodes), default=amount)
        if amount > largest:
            raise ImpossibleResources(
                f"a {what} of {who} needs {amount:g} {resource}, the largest node has "
                f"{largest:g}; lower run.{field}, or bring a larger node"
            )
