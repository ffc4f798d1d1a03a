"""Distillation losses: `compute` is the stateless entry, `DistillHeads` the trainable one.

Names resolve on first use, so that `kdscale.losses.recipes` can be read without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kdscale.losses.distillation import LossCallable, LossInputs, compute, total
    from kdscale.losses.heads import DistillHeads
    from kdscale.losses.recipes import RECIPES, TERMS, LossFlags, Mode, weights_for

__all__ = [
    "RECIPES",
    "TERMS",
    "DistillHeads",
    "LossCallable",
    "LossFlags",
    "LossInputs",
    "Mode",
    "compute",
    "total",
    "weights_for",
]

_HOMES = {
    "distillation": ("LossCallable", "LossInputs", "compute", "total"),
    "heads": ("DistillHeads",),
    "recipes": ("RECIPES", "TERMS", "LossFlags", "Mode", "weights_for"),
}


def __getattr__(name: str) -> object:
    """Loads the module that defines a public name."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
