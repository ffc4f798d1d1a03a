"""Retrieval between images and captions: recall at 1, 5 and 10, both ways.

Shape suffixes: I images, T captions, D embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import torch
from torch import Tensor

from kdscale.core.types import DataError
from kdscale.core.zero_shot_config import Captions
from kdscale.eval.ranking import check_embeddings, right_ranks

KS = (1, 5, 10)


@dataclass(frozen=True)
class Recalls:
    """One direction of retrieval.

    Attributes:
        ranks: Per query, how many candidates stood before its best right one.
        chance: {k: recall at k in percent of a random order}.
    """

    ranks: Tensor
    chance: dict[int, float]

    def at(self, k: int) -> float:
        """Returns recall at k in percent: queries with a right candidate among the first k."""
        return 100.0 * float((self.ranks < k).double().mean())


@dataclass(frozen=True)
class RetrievalScores:
    """Both directions.

    Attributes:
        owners: (T,) int64: each caption's image.
    """

    image_to_text: Recalls
    text_to_image: Recalls
    owners: Tensor


def chosen(captions: Sequence[Sequence[str]], which: Captions) -> tuple[list[str], Tensor]:
    """Lists the captions that take part, and the image of each.

    Args:
        captions: Per image, in the file's order.
        which: `all`, the usual protocol; `first` one per image, as CLIP-KD's loader keeps.

    Returns:
        T texts and their (T,) int64 images.

    Raises:
        DataError: An image without a caption.
    """
    empty = [place for place, texts in enumerate(captions) if not texts]
    if empty:
        raise DataError(f"{len(empty)} images have no caption, first number {empty[0]}")
    kept = [texts[:1] if which == "first" else texts for texts in captions]
    owners = [place for place, texts in enumerate(kept) for _ in texts]
    return [text for texts in kept for text in texts], torch.tensor(owners)


def score_retrieval(image_ID: Tensor, text_TD: Tensor, owner_T: Tensor) -> RetrievalScores:
    """Scores retrieval by cosine.

    An image finds its captions at k where any one of them is among the first k. Of equally
    similar candidates the one that comes first in the set counts as more similar.

    Args:
        image_ID: Raw image embeddings.
        text_TD: Raw caption embeddings.
        owner_T: (T,) int64: each caption's image, in [0, I).

    Raises:
        DataError: Nothing to rank, or an image without a caption.
        EmbeddingUnusable: An embedding is not finite or zero.

    Source:
        Karpathy and Fei-Fei 2015, arXiv 1412.2306, with CLIP's cosine for their score.
    """
    check_embeddings(image_ID, (), "images")
    check_embeddings(text_TD, (), "captions")
    owner_T = owner_T.to(image_ID.device)
    image_I = torch.arange(len(image_ID), device=image_ID.device)
    counts = torch.bincount(owner_T, minlength=len(image_ID)).tolist()
    return RetrievalScores(
        Recalls(right_ranks(image_ID, text_TD, image_I, owner_T), _chance(counts, len(text_TD))),
        Recalls(right_ranks(text_TD, image_ID, owner_T, image_I), _chance([1], len(image_ID))),
        owner_T.cpu(),
    )


def _chance(num_right: Sequence[int], num_candidates: int) -> dict[int, float]:
    """Recall of a random order, by how many candidates are right for each query."""
    found: dict[int, float] = {}
    for k in KS:
        drawn = min(k, num_candidates)
        every = comb(num_candidates, drawn)
        missed = sum(comb(num_candidates - right, drawn) / every for right in num_right)
        found[k] = 100.0 * (1 - missed / len(num_right))
    return found
