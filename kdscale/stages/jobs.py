"""What a worker is told to do: picklable, and light enough for processes that only pass it on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kdscale.core.config import Distill
from kdscale.core.storage import StageStore, Storage
from kdscale.data.shards import Manifest


@dataclass(frozen=True)
class DistillJob:
    """Everything a worker needs to run the stage; picklable.

    Attributes:
        kind: `teacher` or `distill`.
        key: Content key.
        storage_root: Where the stage store is.
        recipe: Resolved recipe.
        total_steps: Optimizer steps.
        data: Manifest of the training data.
        zero_shot_data: Manifest of the benchmark's images.
        record: What `stage.json` will say.
    """

    kind: str
    key: str
    storage_root: str
    recipe: Distill
    total_steps: int
    data: Manifest
    zero_shot_data: Manifest | None
    record: dict[str, Any]

    @property
    def stage(self) -> StageStore:
        """The stage's directory."""
        return StageStore(Storage(self.storage_root), self.kind, self.key)
