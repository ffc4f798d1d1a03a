"""Uncertainty of benchmark scores: intervals for one model, paired differences for two.

Shapes: N scored items, G groups of items, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from statistics import NormalDist
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from kdscale.core.types import ConfigError, DataError

Array: TypeAlias = npt.NDArray[np.float64]

_DRAWS_AT_ONCE = 1 << 20  # bounds the memory of a resampling step to a few tens of MB


@dataclass(frozen=True)
class Interval:
    """A confidence interval; both ends are NaN where the data cannot give one.

    Attributes:
        low: Lower end, in the unit of the scores.
        high: Upper end.
    """

    low: float
    high: float


@dataclass(frozen=True)
class PairedDifference:
    """Difference of two models' mean scores on the same items.

    Attributes:
        difference: Mean of the first model minus mean of the second.
        interval: Confidence interval of the difference.
        n: Number of items.
    """

    difference: float
    interval: Interval
    n: int


def bootstrap_interval(
    values: npt.ArrayLike,
    *,
    groups: Iterable[Hashable] | None = None,
    num_resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Computes the percentile bootstrap interval of a mean score.

    Whole groups are drawn with replacement, as many as there are, and the mean of a draw is
    its summed score over its number of items. Questions about one image share a group, since
    their scores move together. The same arguments always give the same interval; the names of
    the groups do not matter, and groups of one item each give what no groups give.

    Args:
        values: (N,) score per item, any real or boolean dtype; N >= 1.
        groups: N labels, equal for items that belong together; None makes items independent.
        num_resamples: Draws, >= 1.
        level: Coverage, in (0, 1).
        seed: Seed of the draws, >= 0.

    Returns:
        The interval; NaN for a single group, from which no spread can be learnt.

    Raises:
        DataError: No item, not one dimension, a value that is not finite, or another number of
            labels than of items.
        ConfigError: `num_resamples`, `level` or `seed` out of range.

    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", percentile interval.
    """
    _check_level(level)
    if num_resamples < 1 or seed < 0:
        raise ConfigError(
            f"num_resamples={num_resamples} and seed={seed}: need at least 1 and at least 0"
        )
    sums_G, counts_G = _group_totals(_scores(values, "values"), groups)
    if sums_G.size < 2:
        return Interval(math.nan, math.nan)
    means_R = _resampled_means(sums_G, counts_G, num_resamples, np.random.default_rng(seed))
    tail = (1 - level) / 2
    return Interval(float(np.quantile(means_R, tail)), float(np.quantile(means_R, 1 - tail)))


def paired_difference(
    a: npt.ArrayLike,
    b: npt.ArrayLike,
    *,
    groups: Iterable[Hashable] | None = None,
    num_resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> PairedDifference:
    """Computes how much better one model scores than another on the same items.

    The bootstrap draws items, not scores, so that what makes an item hard for both models
    cancels out of the interval.

    Args:
        a: (N,) score per item of the first model.
        b: (N,) score per item of the second model, items in the same order.
        groups: As in `bootstrap_interval`.
        num_resamples: As in `bootstrap_interval`.
        level: As in `bootstrap_interval`.
        seed: As in `bootstrap_interval`.

    Returns:
        The difference of the means with its interval.

    Raises:
        DataError: As `bootstrap_interval`, or different numbers of items.
        ConfigError: As `bootstrap_interval`.
    """
    a_N, b_N = _scores(a, "a"), _scores(b, "b")
    if a_N.size != b_N.size:
        raise DataError(f"a scores {a_N.size} items and b {b_N.size}; score both on the same items")
    difference_N = a_N - b_N
    interval = bootstrap_interval(
        difference_N, groups=groups, num_resamples=num_resamples, level=level, seed=seed
    )
    return PairedDifference(float(difference_N.mean()), interval, difference_N.size)


def wilson_interval(successes: int, n: int, *, level: float = 0.95) -> Interval:
    """Computes the Wilson score interval of a proportion of independent items.

    Unlike the bootstrap, it keeps a width when every item or no item is right.

    Args:
        successes: Items answered right, in [0, n].
        n: Items, >= 1.
        level: Coverage, in (0, 1).

    Returns:
        The interval, within [0, 1].

    Raises:
        DataError: No item, or successes outside [0, n].
        ConfigError: `level` out of range.

    Source: Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference".
    """
    _check_level(level)
    if n < 1 or not 0 <= successes <= n:
        raise DataError(f"{successes} successes of {n} items is not a proportion")
    z = NormalDist().inv_cdf((1 + level) / 2)
    rate, scale = successes / n, 1 + z * z / n
    centre = (rate + z * z / (2 * n)) / scale
    half = z * math.sqrt(rate * (1 - rate) / n + (z / (2 * n)) ** 2) / scale
    low = 0.0 if successes == 0 else centre - half
    return Interval(low, 1.0 if successes == n else centre + half)


def _check_level(level: float) -> None:
    """Refuses a coverage that no interval has."""
    if not 0 < level < 1:
        raise ConfigError(f"level={level} is not between 0 and 1")


def _scores(values: npt.ArrayLike, name: str) -> Array:
    """Brings scores to a non-empty, finite float64 vector."""
    try:
        scores_N = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name} are not numbers: {error}") from error
    if scores_N.ndim != 1 or scores_N.size == 0:
        raise DataError(
            f"{name} have shape {scores_N.shape}; need one score per item, at least one"
        )
    if not np.isfinite(scores_N).all():
        item = int(np.argmin(np.isfinite(scores_N)))
        raise DataError(f"{name} hold {scores_N[item]} at item {item}; score or drop that item")
    return scores_N


def _group_totals(values_N: Array, groups: Iterable[Hashable] | None) -> tuple[Array, Array]:
    """Sums scores and counts items per group, in order of first appearance."""
    if groups is None:
        return values_N, np.ones_like(values_N)
    codes: dict[Hashable, int] = {}
    code_N = [codes.setdefault(group, len(codes)) for group in groups]
    if len(code_N) != values_N.size:
        raise DataError(f"{len(code_N)} group labels for {values_N.size} items; give one per item")
    sums_G = np.zeros(len(codes))
    np.add.at(sums_G, code_N, values_N)
    return sums_G, np.bincount(code_N).astype(np.float64)


def _resampled_means(
    sums_G: Array, counts_G: Array, num_resamples: int, rng: np.random.Generator
) -> Array:
    """Draws groups with replacement and gives the mean score of each draw."""
    num_groups = sums_G.size
    means_R = np.empty(num_resamples)
    step = max(1, _DRAWS_AT_ONCE // num_groups)
    for start in range(0, num_resamples, step):
        rows = min(step, num_resamples - start)
        drawn_RG = rng.integers(num_groups, size=(rows, num_groups))
        totals_R = sums_G[drawn_RG].sum(axis=1)
        means_R[start : start + rows] = totals_R / counts_G[drawn_RG].sum(axis=1)
    return means_R


def percent(interval: Interval) -> Interval:
    """Turns an interval of fractions into one of percent."""
    return Interval(100.0 * interval.low, 100.0 * interval.high)
