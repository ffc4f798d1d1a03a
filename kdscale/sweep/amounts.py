"""How much a planned stage has to do: samples, steps, and what else decides its numbers."""

from __future__ import annotations

import math
from typing import Any

from kdscale.core.config import DataSpec, Distill, Embed, Recipe
from kdscale.core.eval_config import BenchmarkImages, Cka
from kdscale.core.types import DataError
from kdscale.core.vlm_config import Evaluate, Features, Language, VlmStage
from kdscale.core.zero_shot_config import Gate
from kdscale.stages.inputs import Source
from kdscale.stages.shares import needs_workers
from kdscale.sweep.cost import Work


def total_steps(recipe: Distill | VlmStage, num_samples: int) -> int:
    """Returns the optimizer steps of a recipe on so many samples.

    Raises:
        DataError: If the data do not fill one global batch.
    """
    per_epoch = num_samples // recipe.global_batch_size
    if per_epoch == 0:
        raise DataError(
            f"{num_samples} samples do not fill one global batch of {recipe.global_batch_size}; "
            "lower global_batch_size or bring more data"
        )
    steps = per_epoch * recipe.epochs
    return steps if recipe.max_steps is None else min(steps, recipe.max_steps)


def amount(recipe: Recipe, data: Source | None) -> Work:
    """Returns a recipe beside its amount of data: counted, or what the data spec says."""
    if isinstance(recipe, Language):
        return Work(recipe=recipe, num_samples=None, total_steps=recipe.num_steps)
    if isinstance(recipe, Evaluate):
        return Work(recipe=recipe, num_samples=recipe.questions.mini.num_samples, total_steps=1)
    if isinstance(recipe, Gate):
        count = recipe.images.num_images if data is None else data.num_samples
        return Work(recipe=recipe, num_samples=count, total_steps=1)
    if isinstance(recipe, Cka):
        return Work(recipe=recipe, num_samples=_num_images(recipe, data), total_steps=1)
    if data is not None:
        return Work(recipe=recipe, num_samples=data.num_samples, total_steps=_units(recipe, data))
    assert isinstance(recipe, Distill | Embed | Features | VlmStage)
    assert isinstance(recipe.data, DataSpec)
    said = recipe.data.num_samples
    steps = total_steps(recipe, said) if said and isinstance(recipe, Distill | VlmStage) else None
    return Work(recipe=recipe, num_samples=said, total_steps=steps)


def beside_recipe(recipe: Recipe) -> dict[str, Any]:
    """Returns what decides a stage's numbers though its execution otherwise does not."""
    if not isinstance(recipe, Distill) or recipe.run is None:
        return {}
    return {"world_size": recipe.run.world_size} if needs_workers(recipe) else {}


def _num_images(recipe: Cka, data: Source | None) -> int | None:
    """Returns how many images a comparison takes at most, None where that is not known."""
    if isinstance(recipe.images, BenchmarkImages):
        found = recipe.images.num_images
    else:
        found = recipe.images.num_samples if data is None else data.num_samples
    return found if found is None or recipe.n is None else min(found, recipe.n)


def _units(recipe: Recipe, data: Source) -> int:
    """Returns a stage's optimizer steps, or the shards that it embeds."""
    if isinstance(recipe, Distill | VlmStage):
        return total_steps(recipe, data.num_samples)
    limit = recipe.max_samples if isinstance(recipe, Embed) else None
    share = min(1.0, (limit or data.num_samples) / data.num_samples)
    return math.ceil(share * data.num_shards)
