"""Evaluation: zero-shot classification and, per benchmark, scores one can trust.

Names resolve on first use, so that importing this loads neither numpy nor torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kdscale.eval.scores import BENCHMARKS, Score, average, difference, score
    from kdscale.eval.scoring.items import BadItem, NothingToScore

__all__ = [
    "BENCHMARKS",
    "BadItem",
    "NothingToScore",
    "Score",
    "average",
    "difference",
    "score",
]

_HOMES = {
    "scores": ("BENCHMARKS", "Score", "average", "difference", "score"),
    "scoring.items": ("BadItem", "NothingToScore"),
}


def __getattr__(name: str) -> object:
    """Loads a public name from its module."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
