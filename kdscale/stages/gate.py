"""The gate before a paper-scale run: a teacher must reach its published accuracy."""

from __future__ import annotations

from kdscale.core.config import TowerSpec
from kdscale.core.types import ConfigError, DataError, WeightsError
from kdscale.core.zero_shot_config import ZeroShot
from kdscale.stages.zeroshot import ZeroShotResult

TOLERANCE = 0.1


class GateFailed(WeightsError):
    """A teacher that misses its published accuracy."""


class GateUndecided(DataError):
    """A score that cannot be held against the published one: of another set of images."""


def teacher_gate(
    tower: TowerSpec, top1: float, published: float, tolerance: float = TOLERANCE
) -> None:
    """Passes a teacher whose top-1 lies within the tolerance of the published one.

    Args:
        tower: Who was evaluated.
        top1: Found, in percent.
        published: Expected, in percent.
        tolerance: Largest difference, in points, either way: a higher score is as suspicious.

    Raises:
        GateFailed: It does not, or it is not a number.
    """
    # Both are decimals with two digits; their difference carries binary rounding.
    if abs(top1 - published) <= tolerance + 1e-9:
        return
    raise GateFailed(
        f"{tower.name} ({tower.weights}) reaches {top1:.2f} % top-1, published are "
        f"{published:.2f} +- {tolerance:g}: weights, QuickGELU, image size, resizing, tokenizer or "
        "labels are not those of the publication"
    )


def gate(recipe: ZeroShot, result: ZeroShotResult, tolerance: float = TOLERANCE) -> None:
    """Holds a result against the published top-1 of its recipe.

    Raises:
        ConfigError: The recipe names none.
        GateUndecided: The result is not of the whole set.
        GateFailed: As `teacher_gate`.
    """
    if recipe.published is None:
        raise ConfigError(
            f"no top-1 of {recipe.tower.name} on {recipe.images.name} is on record; give published"
        )
    if not result.complete:
        raise GateUndecided(
            f"{recipe.images.name}: {result.n} images were scored and {result.num_unreadable} "
            f"could not be read, the whole set holds {recipe.images.num_images}; a gate needs all"
        )
    teacher_gate(recipe.tower, result.metrics["top1"].value, recipe.published, tolerance)
