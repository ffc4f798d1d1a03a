"""Garbage of a storage: stages that no sweep needs, and what killed processes have left.

A stage is found by its key, so a recipe that was changed leaves the stages of its former text
behind. Only the user knows which sweeps still matter: what their plans reach is kept.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kdscale.core.lease import Lease, clear
from kdscale.core.storage import StageStore, Storage
from kdscale.core.types import StorageError
from kdscale.sweep.plan import Plan

CHECKPOINTS = "checkpoints"
DAY_S = 86_400.0
Why = Literal["no sweep needs it", "never finished", "checkpoints of a finished stage"]


@dataclass(frozen=True, kw_only=True)
class Garbage:
    """Something that can be removed.

    Attributes:
        store: The stage.
        part: What of it: a directory, or "" for all of it.
        why: For people.
        size: Bytes.
        age_s: Seconds since the newest of its files was written.
    """

    store: StageStore
    part: str
    why: Why
    size: int
    age_s: float


def find_garbage(plan: Plan, *, older_than_s: float) -> list[Garbage]:
    """Finds what the sweeps of a plan do not need.

    Stages that a living process writes are no garbage, whatever their age.

    Args:
        plan: Of every sweep that still matters.
        older_than_s: Only what was last written so long ago.

    Returns:
        What can be removed, the largest first.
    """
    found: list[Garbage] = []
    storage, now = plan.storage, time.time()
    for kind in storage.names("stages"):
        for key in storage.names("stages", kind):
            store = StageStore(storage, kind, key)
            why = _why(store, needed=key in plan.stages)
            if why is None or Lease.seems_held(store):
                continue
            part = CHECKPOINTS if why == "checkpoints of a finished stage" else ""
            size, newest = storage.usage(*store.parts, *([part] if part else []))
            if now - newest >= older_than_s:
                age = now - newest
                found.append(Garbage(store=store, part=part, why=why, size=size, age_s=age))
    return sorted(found, key=lambda one: (-one.size, one.store.key))


def _why(store: StageStore, *, needed: bool) -> Why | None:
    """Says why a stage or a part of it is garbage; None where it is not."""
    is_done = store.is_done()
    if needed:
        has_checkpoints = is_done and store.storage.exists(*store.parts, CHECKPOINTS)
        return "checkpoints of a finished stage" if has_checkpoints else None
    return "no sweep needs it" if is_done else "never finished"


def remove(garbage: Sequence[Garbage]) -> list[Garbage]:
    """Removes garbage; what another process has begun to write meanwhile stays.

    Returns:
        What was removed.
    """
    removed: list[Garbage] = []
    for one in garbage:
        storage, parts = one.store.storage, one.store.parts
        with ExitStack() as leases:
            lease = Lease.acquire(one.store)
            if lease is None:
                continue
            leases.enter_context(lease)
            if one.part:
                storage.remove(*parts, one.part)
            else:
                clear(one.store)
            removed.append(one)
        if not one.part and not storage.names(*parts):
            storage.remove(*parts)
    return removed


def name_of(store: StageStore) -> str:
    """Returns what a stage calls itself, or nothing where it never finished."""
    try:
        return str(store.record().get("name", ""))
    except (StorageError, ValueError):
        return ""


def print_garbage(garbage: Sequence[Garbage], storage: Storage, console: Console) -> None:
    """Prints what was found."""
    if not garbage:
        console.print(f"nothing to remove from {storage.root}")
        return
    table = Table("stage", "key", "name", "why", "MB", "days old", title="Garbage")
    for one in garbage:
        what = f"{one.store.kind}/{one.part}" if one.part else one.store.kind
        size, age = f"{one.size / 1e6:,.1f}", f"{one.age_s / DAY_S:.1f}"
        table.add_row(what, one.store.key, escape(name_of(one.store)), one.why, size, age)
    console.print(table)
    total = sum(one.size for one in garbage)
    console.print(f"{len(garbage)} to remove, {total / 1e6:,.1f} MB")


def print_young(young: Sequence[Garbage], days: float, console: Console) -> None:
    """Says how much stays since it was written within so many days."""
    if young:
        count = f"{len(young)} unneeded {'stage' if len(young) == 1 else 'stages'}"
        size = sum(one.size for one in young) / 1e6
        console.print(
            f"{count} ({size:,.1f} MB) written within {days:g} days stay: --older-than takes them, "
            "with fewer days"
        )
