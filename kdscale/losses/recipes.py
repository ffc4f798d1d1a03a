"""Loss names, recipes and behaviour flags, readable without torch.

A recipe is a named set of term weights; a flag is one point where the code released with
CLIP-KD departs from the formula it implements. Flags are off in "corrected" mode and on in
"paper" mode, except `frozen_heads`, which is off in both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from kdscale.core.types import ConfigError, unknown_name

Mode = Literal["paper", "corrected"]
Reduction = Literal["mean", "sum"]

TERMS = ("task", "fd", "mfd", "icl", "ckd", "cross_kd", "gd", "afd", "sigmoid")
ALIASES = {"crd": "ckd"}
TEACHER_TERMS = frozenset(TERMS) - {"task", "sigmoid"}
CROSS_SCALE_TERMS = frozenset({"icl", "cross_kd"})
PROJECTED_TERMS = frozenset({"fd", "mfd", "icl", "cross_kd", "gd"})

FD_WEIGHT_MEAN = 2000.0
# A mean over 512 entries times 2000 is a sum times this: the same loss at the usual width.
FD_WEIGHT_SUM = FD_WEIGHT_MEAN / 512

RECIPES: dict[str, tuple[str, ...]] = {
    "clip": ("task",),
    "clip_kd": ("task", "fd", "icl", "ckd"),
    "mse": ("task", "fd"),
    "icl": ("task", "icl"),
    "kl": ("task", "ckd"),
}


@dataclass(frozen=True, kw_only=True)
class LossFlags:
    """Behaviour of the losses and of their trainable state; defaults are the corrected ones.

    Attributes:
        raw_cross_scale: The learnt scales of ICL, cross-KD and AFD multiply the logits as they
            are, unbounded, in place of their exponential with the parameter in [0, ln 100].
        fd_reduction: FD and MFD average over the width ("mean") or sum over it ("sum").
        decay_unused_scale: The cross scale is trained, hence decayed, even if no term reads it.
        gd_scale_as_tau: GD divides the logits by the logit scale in place of multiplying.
        unsynced_heads: Every rank draws other heads and no gradient of theirs is averaged.
        head_wd: Heads, biases and scales decay at 0.01 whatever the recipe says, unclipped.
        drop_heads_on_resume: Checkpoints leave heads and scales out; resuming redraws them.
        detached_gather: Gathered features carry no gradient to the other ranks.
        afd_projected: AFD fuses the projected student features, so that only equal widths work.
        mfd_noop: MFD reads the unmasked image features, which makes it FD.
        betas_by_name: AdamW's betas and eps depend on "vit" occurring in the student's name.
        frozen_heads: Heads and scales stay as drawn.
    """

    raw_cross_scale: bool = False
    fd_reduction: Reduction = "sum"
    decay_unused_scale: bool = False
    gd_scale_as_tau: bool = False
    unsynced_heads: bool = False
    head_wd: bool = False
    drop_heads_on_resume: bool = False
    detached_gather: bool = False
    afd_projected: bool = False
    mfd_noop: bool = False
    betas_by_name: bool = False
    frozen_heads: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            allowed = ("mean", "sum") if field.name == "fd_reduction" else (False, True)
            if value not in allowed or isinstance(value, str) != isinstance(allowed[0], str):
                raise ConfigError(f"flag {field.name} must be one of {allowed}, got {value!r}")

    @classmethod
    def for_mode(cls, mode: str, **overrides: Any) -> LossFlags:
        """Returns the flags of a mode with some of them set otherwise.

        Args:
            mode: "paper" or "corrected".
            overrides: Flag values by name.

        Raises:
            UnknownName: Neither mode nor flag goes by that name.
            ConfigError: A flag's value is not one it can take.
        """
        if mode not in get_args(Mode):
            raise unknown_name("mode", mode, get_args(Mode))
        names = [field.name for field in fields(cls)]
        for name in overrides:
            if name not in names:
                raise unknown_name("loss flag", name, names)
        return replace(_PAPER if mode == "paper" else cls(), **overrides)


_PAPER = LossFlags(
    raw_cross_scale=True,
    fd_reduction="mean",
    decay_unused_scale=True,
    gd_scale_as_tau=True,
    unsynced_heads=True,
    head_wd=True,
    drop_heads_on_resume=True,
    detached_gather=True,
    afd_projected=True,
    mfd_noop=True,
    betas_by_name=True,
)


def as_flags(mode: Mode | LossFlags) -> LossFlags:
    """Returns the flags of a mode, or the flags themselves."""
    return mode if isinstance(mode, LossFlags) else LossFlags.for_mode(mode)


def weights_for(
    loss: str | Mapping[str, float], mode: Mode | LossFlags = "corrected"
) -> dict[str, float]:
    """Resolves a loss to term weights.

    Args:
        loss: A string is a recipe's name; a mapping gives weights by term, used as given.
        mode: Mode or flags; decides the weight of FD inside a recipe (2000 for the mean over
            the width, 2000/512 for the sum).

    Returns:
        Weights by term, `crd` spelt `ckd`, in the order given.

    Raises:
        UnknownName: No such recipe, term or mode.
        ConfigError: A weight is negative, not finite or not a number, a term occurs under two
            names, or no weight is positive.

    Source:
        CLIP-KD (CVPR 2024) for `clip_kd`. The single-term recipes keep the task loss.
    """
    flags = as_flags(mode)
    if isinstance(loss, str):
        if loss not in RECIPES:
            raise unknown_name("loss recipe", loss, RECIPES)
        fd_weight = FD_WEIGHT_MEAN if flags.fd_reduction == "mean" else FD_WEIGHT_SUM
        return {term: fd_weight if term == "fd" else 1.0 for term in RECIPES[loss]}
    if not isinstance(loss, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(f"a loss is a recipe's name or a mapping of terms, got {loss!r}")
    weights: dict[str, float] = {}
    for name, weight in loss.items():
        term = ALIASES.get(name, name)
        if term not in TERMS:
            raise unknown_name("loss term", name, (*TERMS, *ALIASES))
        if term in weights:
            raise ConfigError(f"loss term {term} is given twice (once as {name!r})")
        weights[term] = _checked_weight(term, weight)
    if not active_terms(weights):
        raise ConfigError(f"no loss term has a positive weight, got {dict(loss)}")
    return weights


def active_terms(weights: Mapping[str, float]) -> tuple[str, ...]:
    """Returns the terms of positive weight in one fixed order, whatever the mapping's."""
    return tuple(term for term in TERMS if weights.get(term, 0.0) > 0)


def needs_teacher(terms: Iterable[str]) -> bool:
    """Returns whether any of these terms reads the teacher."""
    return not TEACHER_TERMS.isdisjoint(terms)


def _checked_weight(term: str, weight: object) -> float:
    """Returns a usable weight as a float."""
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise ConfigError(f"weight of loss term {term} must be a number, got {weight!r}")
    if not math.isfinite(weight) or weight < 0:
        raise ConfigError(f"weight of loss term {term} must be finite and >= 0, got {weight!r}")
    return float(weight)
