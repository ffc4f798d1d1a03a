"""Stages by their keys, or by as much of a key as is unambiguous."""

from __future__ import annotations

from collections.abc import Sequence

from kdscale.core.storage import StageStore, Storage, all_stages
from kdscale.core.types import AmbiguousStage, UnfinishedStage, UnknownStage, WrongStage

MAX_LISTED = 6


def find_stage(storage: Storage, key: str, kinds: Sequence[str], purpose: str) -> StageStore:
    """Finds the finished stage of certain kinds that a key, or the beginning of one, names.

    Args:
        storage: Where stages live.
        key: All of a key or its first digits.
        kinds: The kinds that serve.
        purpose: What the stage is wanted for, for messages ("--to hf").

    Raises:
        UnknownStage: No stage begins like that.
        WrongStage: Only stages of other kinds do.
        AmbiguousStage: Several do.
        UnfinishedStage: The one that does is not finished.
    """
    found = _beginning_with(storage, key)
    fitting = [stage for stage in found if stage.kind in kinds]
    if not found:
        raise UnknownStage(_unknown(storage, key, kinds))
    if not fitting:
        raise WrongStage(
            f"{purpose} takes a {' or '.join(kinds)} stage, and {key} is {_listed(found)}"
            f"{_hint(found[0])}"
        )
    if len(fitting) > 1:
        raise AmbiguousStage(f"{key} may be {_listed(fitting)}; give more of the key")
    if not fitting[0].is_done():
        raise UnfinishedStage(
            f"{_listed(fitting)} in {storage.root} is not finished; run its sweep again, and look "
            "at `kdscale status SWEEP.py`"
        )
    return fitting[0]


def find_any(storage: Storage, key: str) -> StageStore:
    """Finds the stage that a key, or the beginning of one, names, finished or not.

    Raises:
        UnknownStage: No stage begins like that.
        AmbiguousStage: Several do.
    """
    found = _beginning_with(storage, key)
    if not found:
        raise UnknownStage(
            f"no stage in {storage.root} has a key that begins with {key}: none has been begun "
            "there (--storage), or it was removed; `kdscale status SWEEP.py --all` names them"
        )
    if len(found) > 1:
        raise AmbiguousStage(f"{key} may be {_listed(found)}; give more of the key")
    return found[0]


def _beginning_with(storage: Storage, key: str) -> list[StageStore]:
    """Every stage whose key begins so; a whole key hides longer ones."""
    known = all_stages(storage)
    return [s for s in known if s.key == key] or [s for s in known if s.key.startswith(key)]


def _unknown(storage: Storage, key: str, kinds: Sequence[str]) -> str:
    """Words the error for a key that nothing has, with what could have been meant."""
    known = [
        stage
        for kind in kinds
        for name in storage.folders("stages", kind)
        if (stage := StageStore(storage, kind, name)).is_done()
    ]
    there = f"finished there: {_listed(known)}" if known else f"no {' or '.join(kinds)} is finished"
    return f"no stage in {storage.root} has a key that begins with {key}; {there} (--storage)"


def _listed(stages: Sequence[StageStore]) -> str:
    """Names some stages."""
    names = [f"{stage.kind} {stage.key}" for stage in stages]
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more


def _hint(stage: StageStore) -> str:
    """Says what to take instead, where the stage itself tells."""
    if stage.kind == "evaluate" and stage.is_done():
        model = str(stage.record().get("recipe", {}).get("model", "")).rpartition("/")[2]
        return f", which asked finetune {model}" if model else ""
    if stage.kind == "pretrain":
        return ", which holds a projector alone; its finetune stage holds the whole model"
    return ""
