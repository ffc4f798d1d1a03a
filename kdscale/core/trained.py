"""Names of what a stage has trained: its last student, and those kept at earlier epochs."""

from __future__ import annotations

from collections.abc import Iterable

from kdscale.core.config import STAGE_WEIGHTS
from kdscale.core.storage import StageStore


def trained_weights(kind: str, key: str, epoch: int | None = None) -> str:
    """Returns the `weights` of a tower that a stage trains: `stage:<kind>/<key>[@<epoch>]`."""
    return f"{STAGE_WEIGHTS}{kind}/{student_key(key, epoch)}"


def student_key(key: str, epoch: int | None) -> str:
    """Names one of a stage's students: `<key>`, or `<key>@<epoch>`."""
    return key if epoch is None else f"{key}@{epoch}"


def trained_by(weights: str) -> tuple[str, str, int | None]:
    """Returns kind, key and epoch of such weights; the epoch is None for the last one."""
    kind, key = weights.removeprefix(STAGE_WEIGHTS).split("/")
    key, _, epoch = key.partition("@")
    return kind, key, int(epoch) if epoch else None


def epoch_suffix(epoch: int | None) -> str:
    """Returns what the files of a kept student have at the end of their names in `output/`."""
    return "" if epoch is None else f"-epoch-{epoch:04d}"


def missing_epochs(stage: StageStore, epochs: Iterable[int]) -> list[int]:
    """Returns the epochs whose students a stage does not hold, or not whole."""
    names = set(stage.storage.names(*stage.parts, "output"))
    return [epoch for epoch in epochs if f"metrics{epoch_suffix(epoch)}.json" not in names]
