"""How workers heed a request to stop (`kdscale.core.stop`): all of them after the same step."""

from __future__ import annotations

from typing import NoReturn

from kdscale.core.checkpoints import Checkpoints
from kdscale.core.stop import stop_asked, stop_here
from kdscale.core.types import StageStopped
from kdscale.stages.jobs import Job
from kdscale.stages.loop import World


def asked_to_stop(job: Job, world: World) -> bool:
    """Tells whether this attempt is to end; called by every worker at the same step.

    The first worker looks, and all of them agree.
    """
    return world.any(world.is_first and stop_asked(job.stage, job.lease) is not None)


def stop_at_checkpoint(job: Job, world: World, checkpoints: Checkpoints) -> NoReturn:
    """Ends an attempt that was asked to stop; called by every worker.

    Args:
        job: What was being done.
        world: This worker.
        checkpoints: Those of this attempt; the newest is written or on its way.

    Raises:
        StageStopped: Always.
    """
    if world.is_first:
        checkpoints.wait()
        stop_here(job.stage, job.lease, checkpoints.latest_step())
    raise StageStopped(f"{job.kind} {job.key} was asked to stop")
