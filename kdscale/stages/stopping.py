"""How a training loop ends early: at a checkpoint, on all workers at once."""

from __future__ import annotations

from kdscale.core.checkpoints import Checkpoints
from kdscale.core.stopping import note_stopped, stop_asked
from kdscale.core.types import EndedEarly
from kdscale.stages.jobs import DistillJob, VlmJob
from kdscale.stages.loop import World


def asked_to_stop(job: DistillJob | VlmJob, world: World) -> bool:
    """Tells whether this attempt is to end; called by every worker at the same step.

    The first worker looks, and all of them agree.
    """
    return world.any(world.is_first and stop_asked(job.stage, job.lease) is not None)


def end_early(job: DistillJob | VlmJob, world: World, checkpoints: Checkpoints, step: int) -> None:
    """Ends an attempt after a checkpoint; called by every worker.

    Args:
        job: What was being done.
        world: This worker.
        checkpoints: Those of this attempt; the step's is written or on its way.
        step: Of the checkpoint.

    Raises:
        EndedEarly: Always.
    """
    checkpoints.wait()
    reason = "asked to"
    if world.is_first:
        reason = stop_asked(job.stage, job.lease) or reason
        note_stopped(job.stage, step, reason)
    raise EndedEarly(f"{job.kind} {job.key} stopped early at step {step}: {reason}")
