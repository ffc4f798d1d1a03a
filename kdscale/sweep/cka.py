"""Comparisons in a plan: a trial's tower and another one, on each benchmark's images.

They come after everything else of a trial, and no stage needs them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from kdscale.core.config import STAGE_WEIGHTS, CkaSpec, DataSpec, Distill, Tap, TowerSpec
from kdscale.core.eval_config import BenchmarkImages, Cka, ImageModelSpec
from kdscale.core.scale import Scale, benchmark_of
from kdscale.core.trained import trained_by
from kdscale.core.vlm_config import Vlm
from kdscale.sweep.gates import BENCHMARK
from kdscale.sweep.grid import Trial
from kdscale.sweep.suite import images_of, suite_of
from kdscale.sweep.vlm import tower_named

if TYPE_CHECKING:
    from kdscale.sweep.plan import Planner


def add_cka(planner: Planner, trial: Trial, tower: TowerSpec, path: list[str]) -> None:
    """Adds a comparison for each set of images and each tap that a trial asks for.

    Args:
        planner: Receives the stages.
        trial: Whose `cka_with` names the other tower; None adds nothing.
        tower: The trial's.
        path: The trial's, so far; the stage that trains the other tower may be added, too.

    Raises:
        UnknownName: A role is not known.
    """
    recipe = trial.recipe
    if recipe.cka_with is None:
        return
    run = planner.plan.stages[path[-1]].recipe.run
    finetune = next((k for k in path if planner.plan.stages[k].kind == "finetune"), None)
    before: list[str] = []
    other = tower_named(planner, recipe.cka_with, before)
    path += before
    for images in image_sets(planner, recipe):
        for tap in recipe.cka.taps:
            own = _model(tower, finetune, tap)
            stage = Cka(
                a=own,
                b=other,
                images=images,
                tap=tap,
                layers=recipe.cka.layers,
                n=recipe.cka.n,
                run=run,
            )
            inputs = dict.fromkeys((_stage_of(other), _stage_of(own)))
            known = tuple(key for key in inputs if key in planner.plan.stages)
            name = f"{own.name} with {other.name} on {images.name}"
            planner.add_stage(Cka.kind, name, stage, path, known)


def image_sets(planner: Planner, recipe: Distill | Vlm) -> Iterator[DataSpec | BenchmarkImages]:
    """Yields the sets of images that a trial is compared on: benchmarks', then zero-shot."""
    spec: CkaSpec = recipe.cka
    scale = planner.plan.scale
    own = recipe.suite if isinstance(recipe, Vlm) else None
    suite = suite_of(spec.suite or own, scale)
    if suite is not None:
        yield from images_of(planner, suite)
    if spec.zero_shot:
        found = _zero_shot(recipe, scale)
        yield from [] if found is None else [found]


def _zero_shot(recipe: Distill | Vlm, scale: Scale) -> DataSpec | None:
    """Returns the images of the student's zero-shot benchmark, or else of the scale's."""
    student = recipe.vision if isinstance(recipe, Vlm) else recipe
    value = student.zero_shot if isinstance(student, Distill) else scale.zero_shot.get(BENCHMARK)
    spec = benchmark_of(value, scale)
    return spec and spec.data


def _model(tower: TowerSpec, finetune: str | None, tap: Tap) -> TowerSpec | ImageModelSpec:
    """Returns what is compared: the tower, or what a VLM's projector makes of its tokens."""
    if tap != "vlm" or finetune is None:
        return tower
    weights = f"{STAGE_WEIGHTS}finetune/{finetune}"
    return ImageModelSpec(name=f"VLM of {tower.name}", library="vlm", weights=weights)


def _stage_of(model: TowerSpec | ImageModelSpec) -> str:
    """Returns the key of the stage that trained a model, empty where none has."""
    return trained_by(model.weights)[1] if model.weights.startswith(STAGE_WEIGHTS) else ""
