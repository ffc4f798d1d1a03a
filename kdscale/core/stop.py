"""Asking a stage to stop, through the storage: whoever runs it may be another process or machine.

It stops where it loses nothing: before it starts, at a checkpoint, or after a shard.
"""

from __future__ import annotations

from collections.abc import Callable

from kdscale.core.storage import StageStore
from kdscale.core.types import StageStopped

STOP = "STOP"


def ask_to_stop(stage: StageStore, why: str) -> None:
    """Asks whoever runs a stage, or is about to, to stop.

    Args:
        stage: The stage.
        why: For people.
    """
    stage.storage.write(why.encode(), *stage.parts, STOP)


def check_stop(stage: StageStore, settle: Callable[[], None] | None = None) -> None:
    """Checks that a stage may go on; called where stopping loses nothing.

    Args:
        stage: The stage.
        settle: Called before it stops, to bring what is under way to the storage.

    Raises:
        StageStopped: It has been asked to stop.
    """
    if stage.storage.exists(*stage.parts, STOP):
        if settle is not None:
            settle()
        raise StageStopped(stage.storage.read(*stage.parts, STOP).decode())


def let_run(stage: StageStore) -> None:
    """Takes a request back, and the note that it has left: stopping is no failure."""
    if not stage.storage.exists(*stage.parts, STOP):
        return
    stage.storage.remove(*stage.parts, STOP)
    failure = stage.failure()
    if failure is not None and failure["message"].startswith(StageStopped.__name__):
        stage.forget_failure()
