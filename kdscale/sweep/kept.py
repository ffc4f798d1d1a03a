"""Students kept at the end of epochs: what a stage of a plan is to keep, and whether it has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kdscale.core.config import STAGE_WEIGHTS, Distill, Recipe, TowerSpec
from kdscale.core.journal import Line
from kdscale.core.storage import Storage
from kdscale.core.trained import missing_epochs, trained_by
from kdscale.sweep.cost import bytes_out
from kdscale.sweep.stage import PlannedTrial, Stage


def is_finished(stage: Stage, storage: Storage) -> bool:
    """Tells whether a stage is finished and has kept the students that the plan asks for."""
    return stage.store(storage).is_done() and not _missing(stage, storage)


def reopen_unless_finished(stage: Stage, storage: Storage) -> None:
    """Lets a stage be run again that is done without a student that it is to keep.

    For the holder of its lease: another writer may have finished it a moment ago.
    """
    if not is_finished(stage, storage):
        stage.store(storage).reopen()


def looked_up(stage: Stage, storage: Storage) -> Stage:
    """Returns a stage that says whether it is reused, and if it is run again, why."""
    if not stage.store(storage).is_done():
        return replace(stage, reused=False, note="")
    missing = _missing(stage, storage)
    epochs = " and ".join(map(str, missing))
    note = f"finished without the student of epoch {epochs}: trained again" if missing else ""
    return replace(stage, reused=not missing, note=note)


def keeping(stage: Stage, recipe: Recipe, storage: Storage) -> Stage:
    """Returns a stage that also keeps the students which another trial's recipe asks for."""
    if not isinstance(recipe, Distill):
        return stage
    both = tuple(sorted({*stage.training.keep_epochs, *recipe.keep_epochs}))
    if both == stage.training.keep_epochs:
        return stage
    more = replace(stage, recipe=stage.training.replace(keep_epochs=both))
    return looked_up(replace(more, bytes_out=bytes_out(more.work)), storage)


def until(epoch: int | None, stage: Stage, journal: list[Line]) -> list[Line]:
    """Returns a distillation's journal up to the end of an epoch, all of it for None."""
    if epoch is None or stage.num_samples is None:
        return journal
    last = epoch * (stage.num_samples // stage.training.global_batch_size)
    return [line for line in journal if line["step"] <= last]


def early_students(
    trials: Sequence[PlannedTrial], stages: Sequence[Stage]
) -> list[tuple[str, int]]:
    """Returns stage and epoch of the students and teachers that are read before their last one."""
    found = [(trial.key, trial.epoch) for trial in trials]
    for stage in stages:
        teacher = getattr(stage.recipe, "teacher", None)
        if isinstance(teacher, TowerSpec) and teacher.weights.startswith(STAGE_WEIGHTS):
            found.append(trained_by(teacher.weights)[1:])
    return [(key, epoch) for key, epoch in dict.fromkeys(found) if epoch is not None]


def _missing(stage: Stage, storage: Storage) -> list[int]:
    """Returns the epochs that the stage is to keep and has not kept."""
    if not isinstance(stage.recipe, Distill):
        return []
    return missing_epochs(stage.store(storage), stage.recipe.keep_epochs)
