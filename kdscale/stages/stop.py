"""How workers heed a request to stop (`kdscale.core.stop`): all of them after the same step.

A notice that one of their processes or machines is to go away soon is heeded as a request is. It
lies in no storage, so that the stage's next attempt, which begins at once, is not asked to stop.
"""

from __future__ import annotations

import time
from typing import NoReturn

from kdscale.core.checkpoints import Checkpoints
from kdscale.core.stop import stop_asked, stop_here
from kdscale.core.types import StageStopped
from kdscale.stages.jobs import Job
from kdscale.stages.loop import World

LOOK_EVERY_S = 5.0


class Requests:
    """Tells the workers of an attempt whether it is to end.

    Args:
        job: What is being done.
        world: This worker.
    """

    def __init__(self, job: Job, world: World) -> None:
        self._job, self._world = job, world
        self._looked = time.monotonic()

    def have_come(self, look: bool = False) -> bool:
        """Tells whether to end here; called by every worker after the same steps, and all agree.

        Args:
            look: Look at the storage, which the first worker does every `LOOK_EVERY_S` anyhow.
        """
        world, now = self._world, time.monotonic()
        found = world.noticed()
        if world.is_first and not found and (look or now - self._looked > LOOK_EVERY_S):
            self._looked = now
            found = stop_asked(self._job.stage, self._job.lease) is not None
        return world.any(found)


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
