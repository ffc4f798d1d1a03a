"""How workers share a global batch, and how many may, without any number being another.

Nothing here builds a tower: what the configs say is enough.
"""

from __future__ import annotations

import math
from typing import Any, cast

from kdscale.core.config import Distill, Execution, Recipe, TowerSpec
from kdscale.core.nodes import GpuRole
from kdscale.core.types import ConfigError
from kdscale.core.vlm_config import Language, VlmStage
from kdscale.losses.recipes import LossFlags

# Families of timm trunks that normalise by BatchNorm; others are found out when they are built.
BATCHNORM_TRUNKS = ("efficientnet", "ghostnet", "mobilenet", "mobilevit", "regnet", "resnet")
GROUPNORM_TRUNKS = ("resnetv2",)


def allowed_workers(recipe: Recipe) -> tuple[int, ...]:
    """Returns the numbers of training processes that a stage may have, the smallest first.

    Args:
        recipe: A resolved recipe with an execution.

    Raises:
        ConfigError: None of those asked for can share its batches equally.
    """
    run = recipe.run
    assert run is not None
    counts = [run.num_workers]
    if run.min_workers is not None and not why_fixed(recipe):
        counts = list(range(run.min_workers, run.num_workers + 1))
    found = tuple(count for count in counts if not _problem(recipe, count))
    if not found:
        raise ConfigError(_problem(recipe, run.num_workers) + _others(recipe, counts))
    return found


def why_fixed(recipe: Recipe) -> str:
    """Returns why a stage's number of workers may not change on the way; empty where it may."""
    if isinstance(recipe, Distill) and needs_workers(recipe):
        return "the released code's losses depend on the number of workers"
    if isinstance(recipe, VlmStage) and recipe.run is not None and recipe.run.deepspeed:
        return "DeepSpeed's checkpoints cannot be dealt out anew"
    return ""


def workers_note(recipe: Distill | VlmStage) -> str:
    """Says how many workers a stage may have, where they may be fewer; empty elsewhere."""
    run = recipe.run
    if run is None or run.min_workers is None:
        return ""
    if why := why_fixed(recipe):
        return f"{recipe.kind}: always {run.num_workers} workers, for {why}"
    return f"{recipe.kind}: {', '.join(map(str, allowed_workers(recipe)))} workers"


def gpus_for(recipe: Recipe) -> GpuRole:
    """Returns which GPUs of a cluster a stage is for: those that train, or those that only look."""
    return "training" if isinstance(recipe, Distill | VlmStage | Language) else "inference"


def needs_workers(recipe: Distill) -> bool:
    """Tells whether a distillation's numbers depend on the number of workers."""
    flags = LossFlags.for_mode(recipe.mode, **recipe.flags)
    return flags.detached_gather or flags.unsynced_heads


def rows_at_once(recipe: Distill, num_workers: int) -> int:
    """Returns the samples of one forward pass of a worker, of which its share is a multiple.

    Workers that are fewer than they might be do in turns what they would do together: the memory
    of each was chosen for the share of the most.
    """
    run = recipe.run or Execution()
    share = recipe.global_batch_size // max(1, num_workers)
    if run.micro_batch_size is not None or run.min_workers is None or why_fixed(recipe):
        return run.micro_batch_size or share
    unit = recipe.bn_group if recipe.bn_group and has_batchnorm(recipe.student) else 1
    counts = range(run.num_workers, 0, -1)
    most = next((n for n in counts if recipe.global_batch_size % (n * unit) == 0), 1)
    return math.gcd(share, recipe.global_batch_size // most)


def _problem(recipe: Recipe, num_workers: int) -> str:
    """Returns why a number of workers cannot do a stage, in words; empty where it can."""
    if isinstance(recipe, Distill):
        return _distill_problem(recipe, max(1, num_workers))
    if isinstance(recipe, VlmStage):
        parts = recipe.global_batch_size // recipe.micro_batch_size
        if parts % max(1, num_workers):
            return (
                f"a {recipe.kind} step has {parts} micro-batches (global_batch_size "
                f"{recipe.global_batch_size} / micro_batch_size {recipe.micro_batch_size}), which "
                f"{max(1, num_workers)} workers cannot share equally; choose a divisor of {parts} "
                "workers"
            )
    return ""


def _distill_problem(recipe: Distill, num_workers: int) -> str:
    """Returns why workers, micro-batches and BatchNorm groups do not divide a global batch."""
    rows, rest = divmod(recipe.global_batch_size, num_workers)
    if rest:
        return (
            f"a global batch of {recipe.global_batch_size} cannot be shared equally by "
            f"{num_workers} workers; choose a run.num_workers that divides it"
        )
    micro = rows_at_once(recipe, num_workers)
    if rows % micro:
        return (
            f"micro_batch_size {micro} does not divide the {rows} rows of a worker; "
            "choose a divisor"
        )
    group = recipe.bn_group
    if group is not None and has_batchnorm(recipe.student) and micro % group:
        return (
            f"{getattr(recipe.student, 'name', recipe.student)!r} has BatchNorm, and a forward "
            f"pass of {micro} samples is not a multiple of bn_group={group}; use fewer workers or "
            f"larger micro-batches, or lower bn_group to a divisor of {micro} (which changes "
            "numbers)"
        )
    return ""


def _others(recipe: Recipe, counts: list[int]) -> str:
    """Says which numbers of workers could do a stage, where a range was asked for."""
    if len(counts) < 2:
        return ""
    alone = recipe.replace(run=(recipe.run or Execution()).replace(min_workers=None))
    batch = getattr(recipe, "global_batch_size", 1)
    could = ", ".join(str(n) for n in range(1, batch + 1) if not _problem(alone, n))
    return f" (none of {counts[0]} to {counts[-1]} can; these could: {could or 'none'})"


def vision_of(tower: Any) -> dict[str, Any] | None:
    """Returns the config of an image tower, None where only open_clip knows it."""
    if not isinstance(tower, TowerSpec) or isinstance(tower.clip_config, str):
        return None
    return cast("dict[str, Any] | None", tower.clip_config.get("vision_cfg"))


def has_batchnorm(tower: Any) -> bool:
    """Tells whether an image tower is known to have BatchNorm."""
    vision = vision_of(tower) or {}
    trunk = str(vision.get("timm_model_name", "")).rsplit("/", 1)[-1].removeprefix("tf_")
    if isinstance(vision.get("layers"), list | tuple):
        return True  # open_clip's ResNet
    return trunk.startswith(BATCHNORM_TRUNKS) and not trunk.startswith(GROUPNORM_TRUNKS)
