"""What a number of the study is of: names of the paper, places in its tables, estimates.

A place says which model was trained how and which metric was read, in the paper's names; printed
and measured numbers that have the same place stand beside each other.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

AVERAGE, IMAGENET, CKA = "average", "imagenet", "cka:"
RELEASED = "CLIP-KD-ViT-T"  # table 1's name of a ViT-T/16 that CLIP-ViT-B has taught

# Every role of the catalogues, and what arXiv 2511.17886 calls it; None is not in the paper.
PAPER_NAMES: dict[str, str | None] = {
    "siglip_so400m": "SigLIP-so400m",
    "clip_l14": "CLIP-ViT-L",
    "clip_b16": "CLIP-ViT-B",
    "dfn_l14": "DFN-ViT-L",
    "dfn_b16": "DFN-ViT-B",
    "vit_t16": "ViT-T",
    "mobilevit_s": "Mobile-ViT",
    "swin_t": "Swin-Tiny",
    "convnext_t": "ConvNext-Tiny",
    "vit_s16": None,
    "vit_b16": None,
    "efficientnet_b0": None,
    "resnet18": None,
    "qwen2_0_5b": "Qwen2-0.5B",
    "smollm_360m": "SmolLM-360M",
    "tinyllava": "TinyLLaVA",
    "bunny": "Bunny",
    "tinyllava_modern": None,
    "bunny_modern": None,
    "cc12m": "CC12M",
    "cc12m_bunny": "CC12M + Bunny Pretrain",
    "cc12m_llava": "CC12M + TinyLLaVA Pretrain",
    "bunny_laion_2m": None,
    "llava_pretrain_558k": None,
    "llava_mix_665k": None,
    "bunny_695k": None,
    "clip_kd": "CLIP-KD",
    "mse": "MSE",
    "icl": "ICL",
    "kl": "KL",
    "clip": None,
    "imagenet": "ImageNet",
}


@dataclass(frozen=True, kw_only=True)
class Place:
    """What a number is of, in the paper's names.

    Attributes:
        metric: `average` of the 16 benchmarks, `imagenet`, a benchmark, or `cka:` and its images.
        model: The encoder or student.
        framework: Of the VLM that answered; None where the encoder alone was measured.
        teacher: None for a given encoder, whose loss, data and epochs are None as well.
        schedule: Epochs of the run on whose way the student was read; None at a run's end.
    """

    metric: str
    model: str
    framework: str | None = None
    llm: str | None = None
    teacher: str | None = None
    loss: str | None = None
    data: str | None = None
    epochs: int | None = None
    schedule: int | None = None


def encoder(metric: str, framework: str, llm: str, model: str) -> Place:
    """Returns the place of a VLM on a given encoder."""
    return Place(metric=metric, framework=framework, llm=llm, model=model)


def student(
    metric: str,
    teacher: str,
    *,
    model: str = "ViT-T",
    llm: str = "Qwen2-0.5B",
    loss: str = "CLIP-KD",
    how: tuple[str, int] = ("CC12M", 32),
) -> Place:
    """Returns the place of a student, or of a TinyLLaVA VLM on it.

    Args:
        metric: As in `Place`.
        teacher: Its name in the paper.
        model: The student's.
        llm: The language model's, for metrics of VLMs.
        loss: The loss's.
        how: Data and epochs.
    """
    alone = metric == IMAGENET or metric.startswith(CKA)
    return Place(
        metric=metric,
        model=model,
        framework=None if alone else "TinyLLaVA",
        llm=None if alone else llm,
        teacher=teacher,
        loss=loss,
        data=how[0],
        epochs=how[1],
    )


Terms = tuple[tuple[float, Place], ...]  # a weighted sum of numbers


@dataclass(frozen=True)
class Influence:
    """What each question, or cluster of questions, contributes to the error of a number.

    The squares add up to the number's variance. Two numbers of the same questions share keys, so
    that what makes a question hard for both cancels out of their difference.

    Attributes:
        keys: Of the questions or clusters.
        values: One each.
    """

    keys: tuple[Hashable, ...]
    values: npt.NDArray[np.float64]

    @property
    def variance(self) -> float:
        """The variance of the number over the choice of questions."""
        return float(self.values @ self.values)


def combined(parts: Sequence[tuple[float, Influence]]) -> Influence:
    """Returns the influence of a weighted sum of numbers, at least one."""
    keys = parts[0][1].keys
    if all(part.keys is keys or part.keys == keys for _, part in parts):
        return Influence(keys, np.sum([weight * part.values for weight, part in parts], axis=0))
    sums: dict[Hashable, float] = {}
    for weight, part in parts:
        for key, value in zip(part.keys, part.values.tolist(), strict=True):
            sums[key] = sums.get(key, 0.0) + weight * value
    return Influence(tuple(sums), np.array([*sums.values()]))


def mean_influence(scores: Mapping[Any, float]) -> Influence:
    """Returns the influence of the mean of independent items, in per cent."""
    values = np.array([*scores.values()], dtype=np.float64)
    return Influence(tuple(scores), 100.0 * (values - values.mean()) / values.size)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """One run's number.

    Attributes:
        value: The number.
        seed: Of the training.
        standard_error: Over the choice of questions, None where nothing is known of it.
        influence: The same by question, None where the answers are not at hand.
    """

    value: float
    seed: int = 0
    standard_error: float | None = None
    influence: Influence | None = None

    @property
    def error(self) -> float | None:
        """The standard error; the answers' where they show a spread."""
        if self.influence is not None and self.influence.variance > 0:
            return math.sqrt(self.influence.variance)
        return self.standard_error


Numbers = Mapping[Place, Sequence[Estimate]]
