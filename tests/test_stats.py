"""Intervals and paired differences of scores."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from kdscale.analysis.stats import (
    Interval,
    PairedDifference,
    bootstrap_interval,
    paired_difference,
    wilson_interval,
)
from kdscale.core.types import ConfigError, DataError


def width(interval):
    """Gives the length of an interval."""
    return interval.high - interval.low


def clustered_scores(rng, num_groups, size):
    """Draws 0/1 scores whose chance of success is shared within a group."""
    chance = np.repeat(rng.beta(0.5, 0.5, num_groups), size)
    return (rng.random(num_groups * size) < chance).astype(float)


def coverage(draw, truth, trials=250):
    """Counts how often the intervals of simulated data hold the true mean."""
    intervals = [draw(np.random.default_rng(seed)) for seed in range(trials)]
    return np.mean([i.low <= truth <= i.high for i in intervals])


def test_covers_the_mean_of_independent_items():
    held = coverage(lambda rng: bootstrap_interval(rng.random(200) < 0.3, num_resamples=400), 0.3)
    assert 0.90 <= held <= 0.985


def test_clusters_need_their_groups_for_coverage():
    groups = np.repeat(np.arange(60), 8)

    def interval(rng, given):
        scores = clustered_scores(rng, 60, 8)
        return bootstrap_interval(scores, groups=given, num_resamples=400)

    assert 0.89 <= coverage(lambda rng: interval(rng, groups), 0.5) <= 0.99
    assert coverage(lambda rng: interval(rng, None), 0.5) < 0.75


def test_matches_the_normal_interval():
    scores = np.random.default_rng(0).normal(2.0, 3.0, 2000)
    interval = bootstrap_interval(scores, num_resamples=4000, level=0.9)
    half = 1.644854 * scores.std() / math.sqrt(2000)
    assert interval.low == pytest.approx(scores.mean() - half, abs=0.05 * half)
    assert interval.high == pytest.approx(scores.mean() + half, abs=0.05 * half)


def test_uneven_groups_give_the_ratio_of_sums():
    scores = [1.0] * 9 + [0.0]
    groups = ["big"] * 9 + ["small"]
    interval = bootstrap_interval(scores, groups=groups, num_resamples=2000, level=0.9)
    assert interval == Interval(0.0, 1.0)
    middle = bootstrap_interval(scores, groups=groups, num_resamples=2000, level=0.2)
    assert middle.low == pytest.approx(0.9)  # one draw of each: nine of ten, not one of two


def test_clustering_widens_the_interval():
    scores = clustered_scores(np.random.default_rng(1), 80, 10)
    apart = bootstrap_interval(scores)
    together = bootstrap_interval(scores, groups=np.repeat(np.arange(80), 10))
    assert width(together) > 1.8 * width(apart)


def test_repeats_and_ignores_group_names():
    rng = np.random.default_rng(2)
    scores, groups = rng.random(300), rng.integers(40, size=300)
    wanted = bootstrap_interval(scores, groups=groups)
    assert bootstrap_interval(scores, groups=groups) == wanted
    assert bootstrap_interval(scores, groups=[f"image-{g}" for g in groups]) == wanted
    assert bootstrap_interval(scores, groups=[(-g, "x") for g in groups]) == wanted
    assert bootstrap_interval(scores, groups=groups, seed=1) != wanted
    assert bootstrap_interval(scores, groups=range(300)) == bootstrap_interval(scores)


def test_a_higher_level_is_wider():
    scores = np.random.default_rng(3).random(100)
    widths = [width(bootstrap_interval(scores, level=level)) for level in (0.5, 0.9, 0.99)]
    assert widths == sorted(widths)
    assert widths[0] < widths[2]


def test_more_items_than_are_drawn_at_once():
    scores = np.random.default_rng(4).random(600_000)
    interval = bootstrap_interval(scores, num_resamples=10)
    assert interval.low < scores.mean() < interval.high
    assert width(interval) < 0.003


def test_one_group_has_no_interval():
    for interval in (bootstrap_interval([1.0]), bootstrap_interval([0, 1], groups=["a", "a"])):
        assert math.isnan(interval.low)
        assert math.isnan(interval.high)


def test_pairing_cancels_what_the_items_share():
    rng = np.random.default_rng(5)
    shared = rng.normal(0, 5, 500)
    a, b = shared + rng.normal(0.5, 1, 500), shared + rng.normal(0, 1, 500)
    paired = paired_difference(a, b)
    assert paired.n == 500
    assert paired.difference == pytest.approx(a.mean() - b.mean())
    assert 0 < paired.interval.low < paired.difference < paired.interval.high
    assert width(paired.interval) < 0.4 * width(bootstrap_interval(a))


def test_paired_difference_changes_sign_with_its_arguments():
    rng = np.random.default_rng(6)
    a, b, groups = rng.random(90) < 0.6, rng.random(90) < 0.5, np.repeat(np.arange(30), 3)
    there, back = paired_difference(a, b, groups=groups), paired_difference(b, a, groups=groups)
    assert there.difference == -back.difference
    assert there.interval.low == pytest.approx(-back.interval.high)
    same = paired_difference(a, a)
    assert same == PairedDifference(0.0, Interval(0.0, 0.0), 90)


def test_paired_coverage_under_no_difference():
    def interval(rng):
        return paired_difference(rng.random(150), rng.random(150), num_resamples=300).interval

    assert 0.90 <= coverage(interval, 0.0) <= 0.985


def test_wilson_against_printed_values():
    ten = wilson_interval(8, 10)
    assert ten.low == pytest.approx(0.4901625, abs=1e-6)
    assert ten.high == pytest.approx(0.9433178, abs=1e-6)
    assert wilson_interval(0, 20).low == 0.0
    assert wilson_interval(0, 20).high == pytest.approx(1.959964**2 / (20 + 1.959964**2), rel=1e-6)
    assert wilson_interval(20, 20).high == 1.0
    assert width(wilson_interval(5, 10, level=0.5)) < width(wilson_interval(5, 10))


@pytest.mark.parametrize(
    ("values", "groups", "message"),
    [
        ([], None, "at least one"),
        ([[1.0, 0.0]], None, "shape"),
        (0.5, None, "shape"),
        ([0.0, math.nan], None, "item 1"),
        ([0.0, math.inf], None, "item 1"),
        (["yes"], None, "not numbers"),
        ([0.0, 1.0], ["a"], "1 group labels for 2 items"),
        ([0.0, 1.0], ["a", "b", "c"], "3 group labels for 2 items"),
    ],
)
def test_unusable_scores(values, groups, message):
    with pytest.raises(DataError, match=message):
        bootstrap_interval(values, groups=groups)


def test_unusable_pairs_and_counts():
    with pytest.raises(DataError, match="same items"):
        paired_difference([1.0, 0.0], [1.0])
    with pytest.raises(DataError, match="b hold nan"):
        paired_difference([1.0], [math.nan])
    for successes, n in ((0, 0), (-1, 5), (6, 5)):
        with pytest.raises(DataError, match="proportion"):
            wilson_interval(successes, n)


@pytest.mark.parametrize(
    "options", [{"level": 0.0}, {"level": 1.0}, {"num_resamples": 0}, {"seed": -1}]
)
def test_unusable_options(options):
    with pytest.raises(ConfigError):
        bootstrap_interval([0.0, 1.0], **options)
    with pytest.raises(ConfigError):
        paired_difference([0.0, 1.0], [1.0, 1.0], **options)


def test_results_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Interval(0.0, 1.0).low = 0.5  # pyright: ignore[reportAttributeAccessIssue]
