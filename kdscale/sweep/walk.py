"""The walk: every cell of every table built once at true size, and one step taken.

Cells that differ in nothing that is built (data, seed, epochs, learning rate, the numbers in the
weights) share a build; each cell names the stages that cover it. What is walked is an ordinary
plan, run by the ordinary schedule, so a walk that is killed goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from kdscale.core.answers_config import Answers
from kdscale.core.config import DataSpec
from kdscale.core.eval_config import Cka
from kdscale.core.keys import describe
from kdscale.core.scale import MINI, TRUE_SIZE_CPU, Sizes
from kdscale.core.vlm_config import Evaluate
from kdscale.sweep.plan import Plan, PlannedTrial, Stage

SUMMARY = ("walk", "summary.json")
CHANGED = "global batch 2, accumulation 1, bf16, 4 new tokens"
WALK = TRUE_SIZE_CPU.replace(
    name="walk",
    precision="bf16",
    gates=False,
    data={
        role: spec.replace(mini=spec.mini.replace(num_samples=16, samples_per_shard=16))
        for role, spec in MINI.data.items()
        if spec.mini is not None
    },
    zero_shot={
        role: spec.replace(
            data=spec.data.replace(num_samples=8, mini=spec.data.mini.replace(num_samples=8))
        )
        for role, spec in MINI.zero_shot.items()
        if spec.data.mini is not None
    },
    suites={
        role: suite.replace(
            name="one question each",
            num_items=32,
            limit=1,
            blind=False,
            batch_size=1,
            precision="bf16",
            max_new_tokens=4,
        )
        for role, suite in MINI.suites.items()
    },
    sizes=Sizes(batch_divisor=2048),
    vlm_sizes={
        kind: sizes.replace(fields=sizes.fields | {"precision": "bf16"})
        for kind, sizes in TRUE_SIZE_CPU.vlm_sizes.items()
    },
    run=TRUE_SIZE_CPU.run.replace(num_workers=0),
)
# What may differ between cells without anything else being built.
SAME_BUILD = frozenset(
    {"data", "seed", "crop_seed", "epochs", "lr", "projector_lr", "warmup_steps", "warmup_ratio"}
    | {"model", "projector", "max_steps", "features", "teacher_outputs", "eval_outputs", "images"}
)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One trial of a sweep, and what stands for it.

    Attributes:
        builds: {signature of a stage of the trial: key of the stage that was run for it}.
    """

    sweep: str
    name: str
    builds: dict[str, str]

    def is_covered(self, done: Iterable[str]) -> bool:
        """Tells whether everything that stands for it is finished."""
        return set(self.builds.values()) <= set(done)


@dataclass(frozen=True, kw_only=True)
class Walk:
    """What is to be walked.

    Attributes:
        plan: The trials that are run, each with the stages that no earlier one covers.
        cells: Every trial of the sweeps.
    """

    plan: Plan
    cells: tuple[Cell, ...]

    def done(self) -> set[str]:
        """Returns the keys of the stages that are finished."""
        stages = self.plan.stages.values()
        return {stage.key for stage in stages if stage.store(self.plan.storage).is_done()}

    def document(self) -> dict[str, Any]:
        """Returns what was walked as JSON."""
        done = self.done()
        kinds = [stage.kind for stage in self.plan.stages.values()]
        return {
            "changed": CHANGED,
            "cells": len(self.cells),
            "covered": sum(cell.is_covered(done) for cell in self.cells),
            "stages": {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
            "sweeps": {
                name: [cell.is_covered(done) for cell in self.cells if cell.sweep == name]
                for name in dict.fromkeys(cell.sweep for cell in self.cells)
            },
            "builds": {f"{cell.sweep}: {cell.name}": cell.builds for cell in self.cells},
        }


def walk_of(plan: Plan) -> Walk:
    """Reduces a plan to the stages that differ in what they build.

    Args:
        plan: All cells, at a scale of true size.

    Returns:
        A plan whose trials run each distinct build once, with the stages that it needs.
    """
    known: dict[str, str] = {}
    trials: list[PlannedTrial] = []
    cells: list[Cell] = []
    for trial in plan.trials:
        signatures = {key: signature(plan.stages[key], plan.stages) for key in trial.path}
        fresh: list[str] = []
        for key in sorted(trial.path, key=lambda key: _is_late(plan.stages[key])):
            if signatures[key] not in known:
                known[signatures[key]] = key
                fresh.append(key)
        needed = _with_inputs(fresh, plan.stages)
        if needed:
            kept = tuple(key for key in trial.path if key in needed)
            trials.append(replace(trial, path=kept, key=kept[-1]))
        builds = {found: known[found] for found in signatures.values()}
        cells.append(Cell(sweep=trial.sweep, name=trial.trial.name, builds=builds))
    used = {key for trial in trials for key in trial.path}
    stages = {key: stage for key, stage in plan.stages.items() if key in used}
    return Walk(plan=replace(plan, trials=trials, stages=stages), cells=tuple(cells))


def signature(stage: Stage, stages: Mapping[str, Stage]) -> str:
    """Names what a stage builds: its kind and recipe without what changes numbers alone.

    A model that is asked is built like the stage that trains it.
    """
    built = [stage.kind, _pruned(describe(stage.recipe, {}))]
    if isinstance(stage.recipe, Answers | Evaluate):
        built.append(signature(stages[stage.inputs[-1]], stages))
    text = json.dumps(built, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _is_late(stage: Stage) -> bool:
    """Of comparisons that build the same, the one on the drawn images stands for the others."""
    return isinstance(stage.recipe, Cka) and not isinstance(stage.recipe.images, DataSpec)


def _pruned(value: Any) -> Any:
    """Leaves out the fields of `SAME_BUILD`, and which stage weights come from."""
    if isinstance(value, Mapping):
        items = cast("Mapping[str, Any]", value).items()
        return {k: _weights(v) if k == "weights" else _pruned(v) for k, v in items
                if k not in SAME_BUILD}  # fmt: skip
    if isinstance(value, list):
        return [_pruned(item) for item in cast("Sequence[Any]", value)]
    return value


def _weights(value: Any) -> Any:
    """A trained tower is read from a file, a random one is drawn: both are walked."""
    return value.split("/")[0] if isinstance(value, str) and value.startswith("stage:") else value


def _with_inputs(keys: Sequence[str], stages: Mapping[str, Stage]) -> set[str]:
    """Returns stages and, transitively, those that they need."""
    found: set[str] = set()
    left = list(keys)
    while left:
        key = left.pop()
        if key not in found:
            found.add(key)
            left += stages[key].inputs
    return found
