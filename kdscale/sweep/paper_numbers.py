"""The numbers that arXiv 2511.17886 prints, with the errors that its numbers of questions leave."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

from kdscale.eval.benchmarks import BENCHMARKS
from kdscale.eval.scores import MME_MAXIMUM
from kdscale.sweep.paper_tables import paper_tables, single_numbers
from kdscale.sweep.places import AVERAGE, IMAGENET, Estimate, Place

# What a printed percentage is a share of, found from the digits: docs/claims.md.
NUM_SCORED = {name: found.num_asked for name, found in BENCHMARKS.items()} | {
    IMAGENET: 50_000,
    "mmvp": 150,
}
NUM_BUNNY_MMBENCH = 2374  # the column holds MME's accuracy
MME_IMAGES = (30, 30, 30, 30, 147, 170, 200, 200, 200, 20)


@lru_cache(maxsize=1)
def paper_numbers() -> Mapping[Place, list[Estimate]]:
    """Returns what the paper prints, one seed each, with the error of independent questions.

    Where tables contradict each other, the earlier counts: ImageNet is table 2's, not table 3's.
    """
    printed = single_numbers(paper_tables())
    averages = [place for place in printed if place.metric == AVERAGE]
    errors = {place: _standard_error(place, value) for place, value in printed.items()}
    for place in averages:
        errors[place] = _average_error(place, printed)
    return {
        place: [Estimate(value=value, standard_error=errors[place])]
        for place, value in printed.items()
    }


def _standard_error(place: Place, value: float) -> float | None:
    """Returns the binomial standard error of a printed score, None for a CKA."""
    if place.metric == "mme_p":
        share = value / MME_MAXIMUM
        return 200.0 * math.sqrt(share * (1 - share) * sum(1 / images for images in MME_IMAGES))
    count = NUM_SCORED.get(place.metric)
    if place.metric == "mmbench" and place.framework == "Bunny":
        count = NUM_BUNNY_MMBENCH
    return None if count is None else math.sqrt(value * (100.0 - value) / count)


def _average_error(place: Place, printed: Mapping[Place, float]) -> float:
    """Returns the standard error of an average: of its own 16 scores, or of CLIP-KD's likewise."""
    variance = 0.0
    for name in BENCHMARKS:
        own = replace(place, metric=name)
        # Tables 4 and 5 print averages alone; scores near table 2's have nearly its error.
        near = replace(own, loss="CLIP-KD", data="CC12M")
        value = printed[own] if own in printed else printed[near]
        error = _standard_error(own, value) or 0.0
        variance += (error / 20.0 if name == "mme_p" else error) ** 2
    return math.sqrt(variance) / len(BENCHMARKS)
