"""What fits on a cluster at once: trials, workers, data tasks, threads."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import get_args

from kdscale.core.config import Distill
from kdscale.core.nodes import GpuRole, on_gpus_for
from kdscale.core.types import ImpossibleResources
from kdscale.core.vlm_config import VlmStage
from kdscale.stages.shares import allowed_workers, gpus_for
from kdscale.sweep.plan import Plan, Stage


def workers_of(stage: Stage) -> tuple[int, dict[str, float]]:
    """Returns how many workers a stage needs at least, and what each takes of one node."""
    run = stage.recipe.run
    assert run is not None
    each = {"CPU": run.cpus_per_worker}
    if run.gpus_per_worker:
        each["GPU"] = run.gpus_per_worker
        each |= on_gpus_for(gpus_for(stage.recipe), run.gpus_per_worker)
    least = run.world_size if run.min_workers is None else allowed_workers(stage.recipe)[0]
    return least, each


def demand(stage: Stage) -> dict[str, float]:
    """Returns what one running stage needs at once: its workers and the tasks that feed them."""
    run = stage.recipe.run
    assert run is not None
    count, each = workers_of(stage)
    need = {resource: count * amount for resource, amount in each.items()}
    return need | {"CPU": need["CPU"] + run.data_cpus}


def room(bundle: Mapping[str, float], nodes: Sequence[Mapping[str, float]]) -> int:
    """Returns how many equal bundles of resources nodes hold, none of them on two nodes."""
    needed = {resource: amount for resource, amount in bundle.items() if amount > 0}
    if not needed:
        return sys.maxsize
    # Ray counts resources in ten-thousandths.
    return sum(int(min(n.get(r, 0.0) / a + 1e-4 for r, a in needed.items())) for n in nodes)


def trial_resources(stages: Sequence[Stage]) -> dict[str, float]:
    """Returns what a trial's own process takes: nothing, unless it trains itself."""
    own = [s for s in stages if s.recipe.run is not None and s.recipe.run.num_workers == 0]
    if not own:
        return {"memory": 1.0}  # Tune wants a resource; the trial only waits for its workers
    runs = [stage.recipe.run for stage in own if stage.recipe.run is not None]
    resources = {"CPU": max(run.cpus_per_worker for run in runs)}
    gpus = max(run.gpus_per_worker for run in runs)
    if not gpus:
        return resources
    trains = any(gpus_for(stage.recipe) == "training" for stage in own)
    role: GpuRole = "training" if trains else "inference"
    return resources | {"GPU": gpus} | on_gpus_for(role, gpus)


def concurrent_trials(
    stages: Sequence[Stage],
    available: Mapping[str, float],
    nodes: Sequence[Mapping[str, float]] = (),
) -> int:
    """Returns how many stages fit on the cluster at once.

    Args:
        stages: What is left to run.
        available: Resources of the whole cluster.
        nodes: Resources of every node; none where they are not known.

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
        if nodes:
            count, _ = workers_of(stage)
            fits.append(_checked_room(stage, nodes) // count)
    return max(1, min(fits, default=1))


def _checked_room(stage: Stage, nodes: Sequence[Mapping[str, float]]) -> int:
    """Returns how many of a stage's workers the nodes hold, if it is enough.

    Raises:
        ImpossibleResources: It is not, though they have enough of each resource together.
    """
    count, each = workers_of(stage)
    found = room(each, nodes)
    if found >= count:
        _check_room_beside(stage, nodes)
        return found
    lacks = min(
        ([r for r, amount in each.items() if node.get(r, 0.0) < amount] for node in nodes),
        key=lambda found: (len(found), "GPU" in found),
    )
    scarce = " and ".join(lacks) if lacks else "room on single nodes"
    amounts = " and ".join(f"{amount:g} {resource}" for resource, amount in each.items())
    raise ImpossibleResources(
        f"{stage.kind} {stage.name!r} needs {count} workers with {amounts} each on one node, the "
        f"nodes hold {found} such: {scarce} lacks; ask for less (run.num_workers, "
        "run.cpus_per_worker, run.gpus_per_worker), or bring other nodes"
    )


def _check_room_beside(stage: Stage, nodes: Sequence[Mapping[str, float]]) -> None:
    """Refuses workers that leave no node with room for one of the tasks that feed them.

    Raises:
        ImpossibleResources: However they are placed.
    """
    run, (count, each) = stage.recipe.run, workers_of(stage)
    assert run is not None
    if not isinstance(stage.recipe, Distill | VlmStage):  # nothing feeds the others
        return
    task = max(1.0, run.cpus_per_data_task)  # Ray Data's repartition takes a whole one
    for place, node in enumerate(nodes):
        left = {**node, "CPU": node.get("CPU", 0.0) - task}
        if left["CPU"] > -1e-4 and room(each, [*nodes[:place], left, *nodes[place + 1 :]]) >= count:
            return
    raise ImpossibleResources(
        f"{stage.kind} {stage.name!r} needs {count} workers with {each['CPU']:g} CPU each and, "
        f"beside them, {task:g} CPU on one node for a data task: no node has that left; lower "
        "run.cpus_per_worker or run.cpus_per_data_task, or bring nodes"
    )


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
