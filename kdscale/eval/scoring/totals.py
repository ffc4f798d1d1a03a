"""From item scores to a benchmark's: what is averaged, what must be right together.

Shape suffixes: G clusters, K terms of a category's score, R resamples.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kdscale.eval.scoring.items import Item, refuse

NUM_RESAMPLES = 1000
SEED = 0
PERCENT = 100.0
_DRAWS_AT_ONCE = 1 << 20  # bounds the memory of a resampling step to a few tens of MB


class Part(NamedTuple):
    """What one item or group adds to the total.

    The total is 100 times the sum, over categories and over the terms of their scores, of points
    divided by units.

    Attributes:
        category: Categories are added up; one where the benchmark is a plain average.
        cluster: What the bootstrap draws as a whole.
        points: One per term.
        units: What the points are divided by, one per term.
    """

    category: str
    cluster: tuple[str, str]
    points: tuple[float, ...]
    units: tuple[float, ...]

    def minus(self, other: Part) -> Part:
        """What this adds more than another part of the same item or group."""
        points = (a - b for a, b in zip(self.points, other.points, strict=True))
        return self._replace(points=tuple(points))


Total = Callable[[Sequence[Item], Sequence[float]], list[Part]]


class Summary(NamedTuple):
    """A total with its 95 % bootstrap interval.

    Attributes:
        value: The total.
        num_groups: Clusters that were drawn from.
        interval: Lower and upper end.
    """

    value: float
    num_groups: int
    interval: tuple[float, float]


def per_item(items: Sequence[Item], scores: Sequence[float]) -> list[Part]:
    """Every item counts for itself."""
    return [_whole(i.cluster, s) for i, s in zip(items, scores, strict=True)]


def paper_pairs(items: Sequence[Item], scores: Sequence[float]) -> list[Part]:
    """Neighbours count if both are right, whatever they show: 2 of 2; a last single one by itself.

    Equal to MMVP's counter, which the first of a pair raises and the second raises or takes back.
    """
    parts: list[Part] = []
    for first in range(0, len(items), 2):
        together = math.prod(scores[first : first + 2])
        parts += [_whole(item.cluster, together) for item in items[first : first + 2]]
    return parts


def whole_pairs(items: Sequence[Item], scores: Sequence[float]) -> list[Part]:
    """A pair counts if all of its items that are given are right."""
    return [_whole(pair[0][0].cluster, _together(pair)) for pair in _pairs(items, scores)]


def whole_rotations(items: Sequence[Item], scores: Sequence[float]) -> list[Part]:
    """A question counts if all of its rows that are given are right."""
    return [_whole(group[0][0].cluster, _together(group)) for group in _groups(items, scores)]


def paper_mme(items: Sequence[Item], scores: Sequence[float]) -> list[Part]:
    """Accuracy and acc+ per category, acc+ by a counter over the order of all items.

    Args:
        items: All items in the order of the file; those of cognition take a place in it.
        scores: 0 or 1 each.
    """
    counters: dict[str, int] = defaultdict(int)
    parts: list[Part] = []
    for place, (item, score) in enumerate(zip(items, scores, strict=True)):
        before, second = counters[item.category], place % 2 == 1
        if score:
            counters[item.category] += not second or before % 2 == 1
        elif second and before % 2 == 1:
            counters[item.category] -= 1
        added = float(counters[item.category] - before)
        parts.append(Part(item.category, item.cluster, (score, added), (1.0, 1.0)))
    return parts


def whole_mme(items: Sequence[Item], scores: Sequence[float]) -> list[Part]:
    """Accuracy per category, and the share of images with both questions right."""
    return [
        Part(
            pair[0][0].category,
            pair[0][0].cluster,
            (sum(score for _, score in pair), _together(pair) if len(pair) == 2 else 0.0),
            (float(len(pair)), 1.0),
        )
        for pair in _pairs(items, scores)
    ]


def total(parts: Sequence[Part]) -> float:
    """Computes the total of parts that were checked to be at least one."""
    categories = _categories(parts)
    return PERCENT * math.fsum(
        points / units
        for _, points_GK, units_GK in categories
        for points, units in zip(points_GK.sum(axis=0), units_GK.sum(axis=0), strict=True)
    )


def summarise(parts: Sequence[Part]) -> Summary:
    """Computes the total and its interval.

    Whole clusters are drawn with replacement within their category, as many as it has. A single
    cluster always gives the value itself: it holds nothing about the spread.

    Args:
        parts: At least one, in an order that does not depend on that of the input.

    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", percentile interval.
    """
    rng = np.random.default_rng(SEED)
    categories = _categories(parts)
    totals_R = np.zeros(NUM_RESAMPLES)
    for _, points_GK, units_GK in categories:
        num_clusters = len(points_GK)
        step = max(1, _DRAWS_AT_ONCE // num_clusters)
        for start in range(0, NUM_RESAMPLES, step):
            rows = min(step, NUM_RESAMPLES - start)
            drawn_RG = rng.integers(num_clusters, size=(rows, num_clusters), dtype=np.int32)
            for points_G, units_G in zip(points_GK.T, units_GK.T, strict=True):
                alike = units_G.min() == units_G.max()  # then every draw has the same sum
                units = units_G.sum() if alike else units_G[drawn_RG].sum(axis=1)
                totals_R[start : start + rows] += points_G[drawn_RG].sum(axis=1) / units
    low, high = np.quantile(PERCENT * totals_R, (0.025, 0.975))
    num_groups = sum(len(points_GK) for _, points_GK, _ in categories)
    return Summary(total(parts), num_groups, (float(low), float(high)))


def influences(parts: Sequence[Part]) -> dict[tuple[str, tuple[str, str]], float]:
    """Computes how far each cluster moves the total from what it would be without its deviation.

    Their squares add up to the total's variance over the choice of clusters, to first order.

    Returns:
        {(category, cluster): influence}, in the unit of the total.
    """
    found: dict[tuple[str, tuple[str, str]], float] = {}
    for category, clusters in _sums(parts).items():
        sums_G2K = np.stack([*clusters.values()])
        points_GK, units_GK = sums_G2K[:, 0], sums_G2K[:, 1]
        units_K = units_GK.sum(axis=0)
        rates_K = points_GK.sum(axis=0) / units_K
        moved_G = PERCENT * ((points_GK - rates_K * units_GK) / units_K).sum(axis=1)
        found |= {(category, c): m for c, m in zip(clusters, moved_G.tolist(), strict=True)}
    return found


def _sums(
    parts: Sequence[Part],
) -> dict[str, dict[tuple[str, str], npt.NDArray[np.float64]]]:
    """Sums points and units (2, K) per cluster, for each category."""
    sums: dict[str, dict[tuple[str, str], npt.NDArray[np.float64]]] = {}
    for part in parts:
        clusters = sums.setdefault(part.category, {})
        row = np.array((part.points, part.units))
        clusters[part.cluster] = clusters.get(part.cluster, 0.0) + row
    return sums


def _categories(
    parts: Sequence[Part],
) -> list[tuple[str, npt.NDArray[np.float64], npt.NDArray[np.float64]]]:
    """Sums points (G, K) and units (G, K) per cluster, for each category."""
    stacked = {name: np.stack([*clusters.values()]) for name, clusters in _sums(parts).items()}
    return [(name, sums_G2K[:, 0], sums_G2K[:, 1]) for name, sums_G2K in stacked.items()]


Scored = list[tuple[Item, float]]


def _whole(cluster: tuple[str, str], score: float) -> Part:
    """One unit of a plain average."""
    return Part("", cluster, (score,), (1.0,))


def _together(group: Scored) -> float:
    """The product of a group's scores."""
    return math.prod(score for _, score in group)


def _groups(items: Sequence[Item], scores: Sequence[float]) -> list[Scored]:
    """Gathers what must be right together."""
    groups: dict[tuple[str, str], Scored] = defaultdict(list)
    for item, score in zip(items, scores, strict=True):
        if not item.group:
            refuse(item, "has no group, so that nothing tells what must be right together")
        groups[item.cluster].append((item, score))
    return [*groups.values()]


def _pairs(items: Sequence[Item], scores: Sequence[float]) -> list[Scored]:
    """Gathers groups of one or two."""
    groups = _groups(items, scores)
    for group in groups:
        if len(group) > 2:
            refuse(group[2][0], f"is the third in the pair {group[2][0].group!r}")
    return groups
