"""How workers heed a request to stop (`kdscale.core.stop`): all of them after the same step.

A notice that one of their processes or machines is to go away soon is heeded as a request is. It
lies in no storage, so that the stage's next attempt, which begins at once, is not asked to stop.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NoReturn

import torch

from kdscale.core.checkpoints import Checkpoints
from kdscale.core.stop import stop_asked, stop_here
from kdscale.core.types import StageStopped
from kdscale.stages.jobs import Job
from kdscale.stages.loop import World

LOOK_EVERY_S = 5.0
ASK_EVERY_S = 1.0


def _at_once(_: float) -> bool:
    """Tells that there is nothing to wait for."""
    return True


class Requests:
    """Tells the workers of an attempt whether it is to end.

    Args:
        job: What is being done.
        world: This worker.
    """

    def __init__(self, job: Job, world: World) -> None:
        self._job, self._world = job, world
        self._looked = time.monotonic()

    def have_come(self, look: bool = False, ready: Callable[[float], bool] = _at_once) -> bool:
        """Tells whether to end here; called by every worker after the same steps, and all agree.

        Whoever has its next batch waits here for the others. As nobody has begun the next step, a
        request is heeded, and a checkpoint of the last step written, while data are waited for too.

        Args:
            look: Look at the storage, which the first worker does every `LOOK_EVERY_S` anyhow.
            ready: Waits for what the next step needs, so many seconds at most, and tells whether
                it has come.
        """
        while True:
            waiting = not ready(ASK_EVERY_S)
            flags = torch.tensor([float(self._sees_one(look)), float(waiting)])
            found, waiting = self._world.sum(flags.to(self._world.device)).tolist()
            if found or not waiting:
                return bool(found)
            look = False

    def _sees_one(self, look: bool) -> bool:
        """Tells whether this worker knows of a request."""
        world, now = self._world, time.monotonic()
        if world.noticed():
            return True
        if not world.is_first or not (look or now - self._looked > LOOK_EVERY_S):
            return False
        self._looked = now
        return stop_asked(self._job.stage, self._job.lease) is not None


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
