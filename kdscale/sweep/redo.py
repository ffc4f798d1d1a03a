"""Doing a finished stage again: what follows from it, and making room for it."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape

from kdscale.core.lease import Lease, clear
from kdscale.core.storage import StageStore, Storage, all_stages
from kdscale.core.types import StageBusy, StorageError
from kdscale.sweep.plan import Plan
from kdscale.sweep.stage import Stage
from kdscale.sweep.why import planned_stage

MAX_LISTED = 20


@dataclass(frozen=True, kw_only=True)
class Redo:
    """A stage that is to be done again.

    Attributes:
        stage: The stage.
        dependants: Stages in the storage that were made from it, directly or not.
        names: {key: name} of those.
        again: Those of them that are done again, too.
    """

    stage: Stage
    dependants: tuple[StageStore, ...]
    names: dict[str, str]
    again: tuple[StageStore, ...] = ()

    def show(self, console: Console) -> None:
        """Says what is done again and what happens with what follows from it."""
        stage = self.stage
        state = "is done again" if stage.reused else "is not finished and runs"
        console.print(f"[cyan]{stage.kind}[/] {escape(stage.name)} [dim]{stage.key}[/] {state}")
        if not self.dependants:
            console.print("nothing in the storage was made from it")
            return
        count = len(self.dependants)
        what = "1 stage in the storage was" if count == 1 else f"{count} stages in the storage were"
        console.print(f"{what} made from it:")
        chosen = {store.key for store in self.again}
        for store in self.dependants[:MAX_LISTED]:
            what = "done again" if store.key in chosen else "kept"
            name = escape(self.names[store.key])
            console.print(f"  [cyan]{store.kind}[/] {name} [dim]{store.key}[/]  {what}")
        if len(self.dependants) > MAX_LISTED:
            console.print(f"  and {len(self.dependants) - MAX_LISTED} more")
        if len(chosen) < len(self.dependants):
            console.print(
                "What is kept stays valid: a key stands for everything that decides the numbers, "
                "and the stage keeps its key (--redo-dependants does those of this plan again)"
            )

    def make_room(self, storage: Storage) -> None:
        """Removes what is to be done again.

        Raises:
            StageBusy: Another process writes one of the stages, or one that reads it; then
                nothing is removed.
        """
        stores = [self.stage.store(storage), *self.again]
        for store in self.dependants:
            if Lease.seems_held(store):
                raise _busy(store)
        with ExitStack() as leases:
            for store in stores:
                if not storage.exists(*store.parts):
                    continue
                lease = Lease.acquire(store)
                if lease is None:
                    raise _busy(store)
                leases.enter_context(lease)
            for store in reversed(stores):  # what follows first, so that nothing lacks its input
                clear(store)


def find_redo(plan: Plan, key: str, *, dependants: bool) -> Redo:
    """Finds a stage that is to be done again, and what follows from it.

    Args:
        plan: The plan; only its stages can be done again.
        key: Of the stage, or its first digits.
        dependants: Do those of the plan again that follow from it.

    Raises:
        UnknownStage, AmbiguousStage: As `planned_stage`.
    """
    stage = planned_stage(plan, key)
    found = dependants_of(plan.storage, stage.key)
    stores = tuple(StageStore(plan.storage, kind, key) for key, (kind, _) in found.items())
    return Redo(
        stage=stage,
        dependants=stores,
        names={key: name for key, (_, name) in found.items()},
        again=tuple(s for s in stores if dependants and s.key in plan.stages),
    )


def dependants_of(storage: Storage, key: str) -> dict[str, tuple[str, str]]:
    """Returns the finished stages that were made from one, nearest first: {key: (kind, name)}."""
    records = dict(_records(storage))
    found: dict[str, tuple[str, str]] = {}
    wave = {key}
    while wave:
        following = {
            name
            for name, record in records.items()
            if name not in found and name != key and wave & set(record.get("inputs", ()))
        }
        for name in sorted(following):
            found[name] = (records[name]["kind"], str(records[name].get("name", "")))
        wave = following
    return found


def _records(storage: Storage) -> list[tuple[str, dict[str, Any]]]:
    """Reads what every finished stage says of itself."""
    found: list[tuple[str, dict[str, Any]]] = []
    for store in all_stages(storage):
        try:
            record = store.record() if store.is_done() else None
        except (StorageError, ValueError):  # it is being removed, or half written
            continue
        if record is not None:
            found.append((store.key, record | {"kind": store.kind}))
    return found


def _busy(store: StageStore) -> StageBusy:
    """Words the error for a stage that is in use."""
    return StageBusy(
        f"{store.kind} {store.key} is being run by another process: nothing was removed; wait for "
        "it, or end it (`kdscale status` shows how far it is)"
    )
