"""Asking a stage to stop, through the storage: whoever runs it may be another process or machine.

There is one kind of stop and three who may ask for it. A budget asks everybody who runs a stage or
is about to (`STOP`), and takes that back when its run ends. A search's scheduler has its word on
one trial, and another sweep may need the same stage: it asks the attempt that holds the stage's
lease, and no later one (`STOP-` and the lease's token). A driver that gets a signal asks all
attempts of its own run, at once and for ever (`stops/` and the run's name, with which their tokens
begin). All are heeded alike, where nothing is lost: before anything starts, after a checkpoint,
which training loops write for it, or after a shard. A stage that was stopped has neither finished
nor failed, and its next attempt goes on from there.

An attempt that was asked itself notes in `STOPPED` where it ended and why: a search leaves such a
trial alone until somebody wants it.
"""

from __future__ import annotations

import time
from typing import Any, NoReturn

from kdscale.core.lease import holder_token
from kdscale.core.storage import StageStore, Storage
from kdscale.core.types import StageStopped

ASKED, NOTE, RUNS = "STOP", "STOPPED", "stops"
EARLY = "stopped early"


def ask_to_stop(stage: StageStore, reason: str) -> None:
    """Asks whoever runs a stage, or is about to, to stop.

    Args:
        stage: The stage.
        reason: For people.
    """
    stage.storage.write(reason.encode(), *stage.parts, ASKED)


def let_run(stage: StageStore) -> None:
    """Takes back what `ask_to_stop` has asked."""
    stage.storage.remove(*stage.parts, ASKED)


def ask_run_to_stop(storage: Storage, run: str, reason: str) -> None:
    """Asks every attempt of a run to stop, those included that have not begun."""
    storage.write(reason.encode(), RUNS, run)


def forget_run(storage: Storage, run: str) -> None:
    """Takes away what a run that has ended was asked."""
    storage.remove(RUNS, run)


def ask_attempt_to_stop(stage: StageStore, reason: str, token: str | None = None) -> bool:
    """Asks the running attempt at a stage to stop.

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
    stage.storage.write(reason.encode(), *stage.parts, _asked(token))
    return True


def stop_asked(stage: StageStore, token: str | None) -> str | None:
    """Returns why the attempt with this lease is to stop, None where nobody has asked it to.

    Args:
        stage: The stage.
        token: The lease's; before there is one, the name of the run.
    """
    storage, names = stage.storage, stage.storage.names(*stage.parts)
    asked = [(*stage.parts, name) for name in (_asked(token), ASKED) if name in names]
    run = (token or "").partition(".")[0]
    if not asked and run and storage.exists(RUNS, run):
        asked = [(RUNS, run)]
    return storage.read(*asked[0]).decode() if asked else None


def check_stop(stage: StageStore, token: str | None = None) -> None:
    """Checks that a stage may go on.

    Args:
        stage: The stage.
        token: Lease of the attempt that asks; the name of its run before there is one.

    Raises:
        StageStopped: It was asked to stop.
    """
    reason = stop_asked(stage, token)
    if reason is not None:
        raise StageStopped(f"{stage.kind} {stage.key} {EARLY}: {reason}")


def stop_here(stage: StageStore, token: str | None, step: int) -> NoReturn:
    """Ends an attempt that was asked to stop, and notes it where it was asked itself.

    Args:
        stage: The stage.
        token: The attempt's lease.
        step: What is on storage of it.

    Raises:
        StageStopped: Always.
    """
    reason = stop_asked(stage, token) or "asked to"
    if stage.storage.exists(*stage.parts, _asked(token)):
        note_stopped(stage, step, reason)
    raise StageStopped(f"{stage.kind} {stage.key} {EARLY} at step {step}: {reason}")


def stop_if_asked(stage: StageStore, token: str | None, step: int) -> None:
    """Ends an attempt as `stop_here` does, if it was asked to stop."""
    if stop_asked(stage, token) is not None:
        stop_here(stage, token, step)


def note_stopped(stage: StageStore, step: int, reason: str) -> None:
    """Notes that an attempt has ended early, what it has done up to that step being on storage."""
    note = {"step": step, "reason": reason, "time": time.time()}
    stage.storage.write_json(note, *stage.parts, NOTE)


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
    """Takes away what earlier attempts were asked and what they noted, as a new one begins."""
    for name in stage.storage.names(*stage.parts):
        if name == NOTE or name.startswith(_asked("")):
            stage.storage.remove(*stage.parts, name)


def _asked(token: str | None) -> str:
    """Names the request to the attempt with this lease."""
    return f"{ASKED}-{token}"
