"""What a plan refuses: recipes that would fail after they have started, hours later perhaps.

Nothing here builds a tower: what the configs say is enough.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from kdscale.core.config import Distill, Execution
from kdscale.core.types import ConfigError, PrecisionError, unknown_name
from kdscale.core.vlm_config import VlmStage
from kdscale.data.templates import TEMPLATES
from kdscale.losses.recipes import LossFlags, active_terms, needs_teacher, weights_for
from kdscale.stages.shares import allowed_workers, vision_of

CAPTION_TEMPLATES = tuple(name for name, spec in TEMPLATES.items() if not spec.terminator)


def check_recipe(recipe: Distill) -> None:
    """Refuses a resolved recipe that cannot run.

    Raises:
        PrecisionError: If fp16 is asked for without GPUs.
        ConfigError: If loss, towers, numbers or shares contradict each other.
    """
    check_loss(recipe)
    _check_numbers(recipe)
    _check_towers(recipe)
    if recipe.run is not None:
        allowed_workers(recipe)


def check_vlm(recipe: VlmStage) -> None:
    """Refuses a resolved VLM stage that cannot run.

    Raises:
        PrecisionError: If fp16 is asked for without GPUs.
        ConfigError: If the workers cannot share the micro-batches equally, or conversations are
            longer than the language model's context.
    """
    recipe.check_length()
    run = recipe.run
    if run is None:
        return
    check_fp16(recipe.precision, run)
    allowed_workers(recipe)
    if recipe.length_grouping and recipe.group_size % recipe.micro_batch_size:
        raise ConfigError(
            f"group_size {recipe.group_size} is no multiple of micro_batch_size "
            f"{recipe.micro_batch_size}: micro-batches would mix modalities"
        )


def check_stages(first: VlmStage, second: VlmStage) -> None:
    """Refuses two resolved stages of a VLM that do not fit together.

    Raises:
        ConfigError: The projector would meet other features than it was trained on, what
            pretraining trains would be lost, or fine-tuning has no words for conversations.
    """
    for name in ("siglip_tokens", "hierarchical_tokens"):
        before, after = getattr(first, name), getattr(second, name)
        if before != after:
            raise ConfigError(
                f"pretrain.{name} is {before!r} and finetune.{name} is {after!r}: the projector "
                "would meet other features than those it was trained on; set both alike"
            )
    if first.trainable != "projector":
        raise ConfigError(
            f"pretrain.trainable is {first.trainable!r}, and fine-tuning takes the projector alone "
            "from there; use trainable='projector'"
        )
    if second.template in CAPTION_TEMPLATES:
        chat = ", ".join(name for name in TEMPLATES if name not in CAPTION_TEMPLATES)
        raise ConfigError(
            f"finetune.template is {second.template!r}, which says one image and one caption; "
            f"conversations of {_name(second.data)!r} need one of {chat}"
        )


def check_paths(paths: Mapping[str, str], read: Set[str]) -> None:
    """Refuses paths of data sets that nothing reads.

    Args:
        paths: {data set: path}, "" for every set without a path of its own.
        read: Names of data sets whose path is read; "" among them if one reads that path.

    Raises:
        UnknownName: A name is of no data set that is read.
        ConfigError: A path without a name is read by none.
    """
    for name in paths.keys() - read:
        if name:
            raise unknown_name("data set", name, read - {""})
        raise ConfigError(
            f"--data {paths['']}: no data set takes this path, for each is drawn or has one of "
            "its own; leave it out, name a data set, or choose another --scale"
        )


def check_fp16(precision: str | None, run: Execution) -> None:
    """Refuses fp16 where it is emulated.

    Raises:
        PrecisionError: With what to choose instead.
    """
    if precision == "fp16" and run.gpus_per_worker == 0:
        raise PrecisionError(
            "fp16 on a CPU is emulated and unusably slow; use precision='fp32' or 'bf16', "
            "or give the workers GPUs (run.gpus_per_worker=1)"
        )


def check_cacheable(recipe: Distill) -> None:
    """Refuses a distillation that a teacher cache cannot feed.

    Raises:
        ConfigError: If crops are drawn anew each epoch, or the loss wants the teacher itself.
    """
    if recipe.views is None:
        raise ConfigError(
            "teacher_outputs='cached' needs views=N, the crops per sample that are embedded; "
            "views=None draws a new crop each epoch"
        )
    if getattr(recipe.loss, "needs_online_teacher", False):
        raise ConfigError(
            f"the loss {recipe.loss.__qualname__} declares needs_online_teacher: a cache holds "  # pyright: ignore
            "embeddings only; use teacher_outputs='online'"
        )


def check_references(recipe: Distill) -> None:
    """Refuses a distillation that names stages, which a plan fills in.

    Raises:
        ConfigError: With what to say instead.
    """
    if recipe.teacher_outputs not in ("online", "cached"):
        raise ConfigError(
            f"teacher_outputs={recipe.teacher_outputs!r} names a stage, which a plan fills in; "
            "say teacher_outputs='cached': what is in the storage already is read, not made anew"
        )
    if recipe.eval_outputs is not None:
        raise ConfigError(
            f"eval_outputs={recipe.eval_outputs!r} names a stage, which a plan fills in where "
            "teacher_outputs='cached'; leave it out"
        )


def check_loss(recipe: Distill) -> None:
    """Validates a recipe's loss against its mode, teacher and student.

    Raises:
        ConfigError: If the loss is unknown or needs a teacher, or a student, that is not there.
    """
    flags = LossFlags.for_mode(recipe.mode, **recipe.flags)
    if flags.unsynced_heads and not flags.drop_heads_on_resume:
        raise ConfigError(
            "unsynced_heads needs drop_heads_on_resume: a checkpoint holds one set of heads"
        )
    if callable(recipe.loss):
        return
    terms = active_terms(weights_for(recipe.loss, flags))
    if recipe.teacher is None and needs_teacher(terms):
        raise ConfigError(f"the loss {recipe.loss} compares with a teacher and none is given")
    if "mfd" in terms and not flags.mfd_noop and _is_vit(recipe.student) is False:
        raise ConfigError(
            f"mfd masks the patches of open_clip's ViT, and {_name(recipe.student)!r} has another "
            "image tower; use fd, or a ViT student"
        )


def _check_numbers(recipe: Distill) -> None:
    """Refuses numbers out of range, and fp16 where it is emulated."""
    if recipe.run is not None:
        check_fp16(recipe.precision, recipe.run)
    if not all(0 <= beta < 1 for beta in recipe.betas):
        raise ConfigError(f"betas must lie in [0, 1), got {recipe.betas}")
    low, high = recipe.crop_scale
    if not 0 < low <= high <= 1:
        raise ConfigError(
            f"crop_scale is (smallest, largest) share of the image, each above 0 and at most 1, "
            f"got {recipe.crop_scale}"
        )


def _check_towers(recipe: Distill) -> None:
    """Refuses drop path where the student's image tower has none."""
    vision = vision_of(recipe.student)
    if recipe.drop_path > 0 and vision is not None and "timm_model_name" not in vision:
        raise ConfigError(
            f"drop_path is {recipe.drop_path}, and the image tower of {_name(recipe.student)!r} is "
            "open_clip's own, which has no drop path; use drop_path=0 for this student"
        )


def _is_vit(tower: Any) -> bool | None:
    """Tells whether an image tower is open_clip's own ViT; None where that is not known."""
    vision = vision_of(tower)
    if vision is None:
        return None
    return "timm_model_name" not in vision and not isinstance(vision.get("layers"), list | tuple)


def _name(tower: Any) -> str:
    """Returns what people call a tower."""
    return str(getattr(tower, "name", tower))
