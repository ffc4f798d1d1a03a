"""What a plan is made of: stages, and trials as paths through them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kdscale.core.config import Distill, Recipe
from kdscale.core.storage import StageStore, Storage
from kdscale.core.trained import student_key
from kdscale.sweep.cost import Work
from kdscale.sweep.grid import Trial


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One distinct stage.

    Attributes:
        name: For people.
        inputs: Keys of the stages it needs.
        num_samples: Samples of its data set, None where nothing is known of it.
        total_steps: Optimizer steps, or shards of an embed stage; likewise.
        flops: Work, None where a tower's or the data set's size is not known.
        bytes_out: Size of the output, estimated.
        estimated: The data are not at hand: all this follows from the samples that the data
            spec says there are.
        data_hash: Manifest of the data that the key stands for, None where none was at hand.
        note: Why a finished stage is run again.
        identity: What the key is the digest of.
    """

    kind: str
    key: str
    name: str
    recipe: Recipe
    inputs: tuple[str, ...]
    num_samples: int | None
    total_steps: int | None
    flops: float | None
    bytes_out: float | None
    reused: bool
    estimated: bool = False
    data_hash: str | None = None
    note: str = ""
    identity: dict[str, Any] = field(default_factory=dict)

    @property
    def training(self) -> Distill:
        """The recipe of a stage that trains."""
        assert isinstance(self.recipe, Distill)
        return self.recipe

    @property
    def work(self) -> Work:
        """The recipe beside its amount of data."""
        return Work(recipe=self.recipe, num_samples=self.num_samples, total_steps=self.total_steps)

    def store(self, storage: Storage) -> StageStore:
        """The stage's directory."""
        return StageStore(storage, self.kind, self.key)


@dataclass(frozen=True, kw_only=True)
class PlannedTrial:
    """A trial as a path through stages, inputs first.

    Attributes:
        key: Key of the stage whose outcome is the trial's; only comparisons come after it.
        epoch: Where a distillation's outcome is read, None for its end.
    """

    sweep: str
    trial: Trial
    path: tuple[str, ...]
    key: str
    epoch: int | None = None

    @property
    def student(self) -> str:
        """Names a distillation's outcome: the key, with the epoch where there is one."""
        return student_key(self.key, self.epoch)
