"""Garbage of a storage: stages that no sweep needs, and what killed processes have left.

A stage is found by its key, so a recipe that was changed leaves the stages of its former text
behind. Only the user knows which sweeps still matter: what their plans reach is kept, and what
written plans name, which are those with other options (another scale, other fields set).
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kdscale.core.lease import Lease, clear
from kdscale.core.storage import StageStore, all_stages
from kdscale.core.types import ConfigError, StorageError
from kdscale.sweep.plan import Plan
from kdscale.sweep.why import compared, field_name, finished_record

CHECKPOINTS = "checkpoints"
DAY_S = 86_400.0
MAX_FIELDS = 3
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

    @property
    def is_result(self) -> bool:
        """Whether it is a finished stage."""
        return self.why == "no sweep needs it"


def find_garbage(plan: Plan, *, older_than_s: float, kept: Collection[str] = ()) -> list[Garbage]:
    """Finds what the sweeps of a plan do not need.

    Stages that a living process writes are no garbage, whatever their age.

    Args:
        plan: Of every sweep that still matters.
        older_than_s: Only what was last written so long ago.
        kept: Keys of stages that are needed beside.

    Returns:
        What can be removed, the largest first.
    """
    found: list[Garbage] = []
    storage, now, needed = plan.storage, time.time(), {*plan.stages, *kept}
    for store in all_stages(storage):
        why = _why(store, needed=store.key in needed)
        if why is None or Lease.seems_held(store):
            continue
        part = CHECKPOINTS if why == "checkpoints of a finished stage" else ""
        size, newest = storage.usage(*store.parts, *([part] if part else []))
        if now - newest >= older_than_s:
            age = now - newest
            found.append(Garbage(store=store, part=part, why=why, size=size, age_s=age))
    return sorted(found, key=lambda one: (-one.size, one.store.key))


def kept_keys(files: Sequence[Path]) -> set[str]:
    """Returns the keys of all stages of written plans.

    Args:
        files: What `kdscale plan --json` has written.

    Raises:
        ConfigError: One is no such plan, or was made without its data.
    """
    return {key for file in files for key in _keys_in(file)}


def _keys_in(file: Path) -> set[str]:
    """Returns the keys of all stages of a written plan; errors as of `kept_keys`."""
    how = "write it by `kdscale plan SWEEP.py --json > PLAN.json`, with the options of its run"
    try:
        document = json.loads(file.read_bytes())
        keys = {stage["key"] for stage in document["stages"]}
        used = {key for trial in document["trials"] for key in trial["stages"]}
        missing = document["cost"]["missing"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--keep {file} is no plan: {how}") from error
    if not used or not used <= keys:
        raise ConfigError(f"--keep {file} is no whole plan: {how}")
    if missing:
        raise ConfigError(
            f"--keep {file} was planned without its data, so that its keys are not those of a run "
            f"({missing[0]}): {how}"
        )
    return keys


def _why(store: StageStore, *, needed: bool) -> Why | None:
    """Says why a stage or a part of it is garbage; None where it is not."""
    is_done = store.is_done()
    if needed:
        has_checkpoints = is_done and store.storage.exists(*store.parts, CHECKPOINTS)
        return "checkpoints of a finished stage" if has_checkpoints else None
    return "no sweep needs it" if is_done else "never finished"


def remove(garbage: Sequence[Garbage]) -> list[Garbage]:
    """Removes garbage; what another process has begun or finished meanwhile stays.

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
            if one.why == "never finished" and one.store.is_done():
                continue
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


def other_fields(store: StageStore, plan: Plan) -> list[str]:
    """Returns what distinguishes a finished stage from the plan's nearest of its kind and name.

    Empty where the plan has none, or the stage says too little of itself.
    """
    record = finished_record(store.storage, store.kind, store.key) or {}
    named = [
        compared(stage, record).differences
        for stage in plan.stages.values()
        if record and (stage.kind, stage.name) == (store.kind, record.get("name"))
    ]
    fields = [field_name(found.field) for found in min(named, key=len, default=())]
    return sorted(fields, key=lambda field: field.count("."))


def print_garbage(
    garbage: Sequence[Garbage], taken: Sequence[Garbage], plan: Plan, console: Console
) -> None:
    """Prints what was found, and how results are kept where there are some.

    Args:
        garbage: What was found.
        taken: What of it is to be removed.
        plan: What it was compared with.
        console: Where to.
    """
    if not garbage:
        console.print(f"nothing to remove from {plan.storage.root}")
        return
    table = Table("stage", "key", "name", "why", "MB", "days old", title="Garbage")
    for one in garbage:
        what = f"{one.store.kind}/{one.part}" if one.part else one.store.kind
        size, age = f"{one.size / 1e6:,.1f}", f"{one.age_s / DAY_S:.1f}"
        name, why = name_of(one.store), one.why + _in_brackets(one, plan)
        table.add_row(what, one.store.key, escape(name), escape(why), size, age)
    console.print(table)
    console.print(f"{len(taken)} to remove, {_size(taken)}")
    results = [one for one in garbage if one.is_result]
    if results:
        count = "1 finished stage" if len(results) == 1 else f"{len(results)} finished stages"
        stay = "" if results[0] in taken else "; only --finished removes such"
        console.print(
            f"no plan names {count} ({_size(results)}){stay}. To keep results of another --scale, "
            "--set, --seeds or --data: `kdscale plan SWEEPS OPTIONS --json > PLAN.json`, and here "
            "--keep PLAN.json",
            highlight=False,
        )


def _in_brackets(one: Garbage, plan: Plan) -> str:
    """Says what is other about a finished stage than about the needed one of its name."""
    fields = other_fields(one.store, plan) if one.is_result else []
    if not fields:
        return ""
    more = f" and {len(fields) - MAX_FIELDS} more" if len(fields) > MAX_FIELDS else ""
    return f" (other {', '.join(fields[:MAX_FIELDS])}{more})"


def _size(garbage: Sequence[Garbage]) -> str:
    """Writes how much it is together."""
    return f"{sum(one.size for one in garbage) / 1e6:,.1f} MB"


def print_young(young: Sequence[Garbage], days: float, console: Console) -> None:
    """Says how much stays since it was written within so many days."""
    if young:
        count = f"{len(young)} unneeded {'stage' if len(young) == 1 else 'stages'}"
        console.print(
            f"{count} ({_size(young)}) written within {days:g} days stay: --older-than takes them, "
            "with fewer days"
        )
