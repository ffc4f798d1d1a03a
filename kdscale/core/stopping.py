"""Ending one attempt at a stage early: a mark that asks for it, a note that says it was done.

`kdscale.core.stop` asks whoever runs a stage, for the sake of a whole sweep. This is a scheduler's
word on one trial, and another sweep may need the same stage: `STOP_ATTEMPT` asks the attempt that
holds the stage's lease, and no later one. Training loops look for it every `log_every` steps, write
a checkpoint and end; `STOPPED` then says where and why. The stage is not finished, and its next
attempt resumes it.
"""

from __future__ import annotations

import time
from typing import Any

from kdscale.core.lease import holder_token
from kdscale.core.storage import StageStore

ASKED, NOTE = "STOP_ATTEMPT", "STOPPED"
EARLY = "stopped early"


def ask_stop(stage: StageStore, reason: str, token: str | None = None) -> bool:
    """Asks the running attempt at a stage to write a checkpoint and end.

    Args:
        stage: The stage.
        reason: For people.
        token: Lease of the attempt that is meant; None for whichever holds it.

    Returns:
        Whether there is an attempt to ask.
    """
    token = token or holder_token(stage)
    if token is None or stage.is_done():
        return False
    mark = {"token": token, "reason": reason, "time": time.time()}
    stage.storage.write_json(mark, *stage.parts, ASKED)
    return True


def stop_asked(stage: StageStore, token: str | None) -> str | None:
    """Returns why the attempt with this lease is to stop, None where nobody has asked it to."""
    if not stage.storage.exists(*stage.parts, ASKED):
        return None
    mark = stage.storage.read_json(*stage.parts, ASKED)
    return str(mark["reason"]) if mark["token"] == token else None


def note_stopped(stage: StageStore, step: int, reason: str) -> None:
    """Notes that an attempt has ended early, its checkpoint of that step being on storage."""
    note = {"step": step, "reason": reason, "time": time.time()}
    stage.storage.write_json(note, *stage.parts, NOTE)
    stage.storage.remove(*stage.parts, ASKED)


def stopped(stage: StageStore) -> dict[str, Any] | None:
    """Returns `step`, `reason` and `time` of a stage that was stopped early, None for others."""
    if stage.is_done() or not stage.storage.exists(*stage.parts, NOTE):
        return None
    return stage.storage.read_json(*stage.parts, NOTE)


def early_in_words(stage: StageStore) -> tuple[str, str]:
    """Returns where a stage was stopped early and why, in words; empty where it was not."""
    note = stopped(stage)
    return ("", "") if note is None else (f"{EARLY} at step {note['step']}", note["reason"])


def forget_stop(stage: StageStore) -> None:
    """Takes mark and note away, as a new attempt begins."""
    for name in (ASKED, NOTE):
        stage.storage.remove(*stage.parts, name)
