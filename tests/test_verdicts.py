"""The rule that judges claims, on numbers made by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from kdscale.eval.scoring.totals import Part, influences, summarise
from kdscale.sweep.places import (
    Estimate,
    Influence,
    Place,
    combined,
    encoder,
    mean_influence,
    student,
)
from kdscale.sweep.verdicts import Claim, Comparison, contrast, holm, judge

A, B, C = (student("imagenet", name) for name in ("CLIP-ViT-B", "CLIP-ViT-L", "SigLIP-so400m"))


def estimates(*values: float, error: float | None = 0.2) -> list[Estimate]:
    """One number a seed."""
    return [Estimate(value=v, seed=seed, standard_error=error) for seed, v in enumerate(values)]


def claim(*pairs: tuple[Place, Place], need: str = "all", least: float = 0.0) -> Claim:
    """A claim that each first place is above its second."""
    comparisons = tuple(
        Comparison(name="", terms=((1.0, first), (-1.0, second)), least=least)
        for first, second in pairs
    )
    return Claim(name="", text="", source="", comparisons=comparisons, need=need)  # type: ignore[arg-type]


def test_a_claim_holds_fails_or_stays_open() -> None:
    said = claim((A, B), (A, C))
    clear = {A: estimates(36.0, 36.2, 36.1), B: estimates(34.0, 34.1, 34.2)}
    low, near = estimates(33.0, 33.1, 33.0), estimates(35.9, 36.3, 36.1)
    assert judge(said, clear | {C: low}).verdict == "supported"
    assert judge(said, clear | {C: near}).verdict == "undecided at this n"
    assert judge(said, clear | {C: estimates(39.0, 39.1, 39.3)}).verdict == "not supported"
    part = judge(said, clear)
    assert (part.verdict, part.count("not run")) == ("undecided at this n", 1)
    assert judge(said, {A: clear[A]}).verdict == "not run"


def test_one_of_several_is_enough_where_the_claim_says_so() -> None:
    said = claim((A, B), (A, C), need="any")
    high, low = estimates(36.0, 36.1), estimates(30.0, 30.2)
    assert judge(said, {A: high, B: low, C: high}).verdict == "supported"
    assert judge(said, {A: low, B: high, C: high}).verdict == "not supported"
    assert judge(said, {A: low, B: high, C: low}).verdict == "undecided at this n"


def test_no_worse_than_takes_a_margin() -> None:
    alike = {A: estimates(30.0, 30.1, 30.1), B: estimates(30.0, 30.1, 30.0)}
    assert judge(claim((A, B)), alike).verdict == "undecided at this n"
    assert judge(claim((A, B), least=-1.0), alike).verdict == "supported"
    assert judge(claim((A, B), least=1.0), alike).verdict == "not supported"


def test_a_premise_decides_whether_a_comparison_counts() -> None:
    small, large = (encoder("average", "TinyLLaVA", "Qwen2-0.5B", name) for name in ("B", "L"))
    stronger = Comparison(name="L is stronger", terms=((1.0, large), (-1.0, small)))
    one, other = claim((A, B), (A, C)).comparisons
    though_weaker = replace(one, premise=stronger)
    said = replace(claim((A, B)), comparisons=(though_weaker,))
    students = {A: estimates(36.0), B: estimates(34.0), C: estimates(35.0)}
    low, near, high = estimates(33.0), estimates(34.9), estimates(37.0)
    middle = {small: estimates(35.0)}

    assert judge(said, students | middle | {large: high}).verdict == "supported"
    fails = judge(said, students | middle | {large: low})
    (judged,) = fails.judged
    assert (fails.verdict, judged.outcome, judged.p) == ("does not apply",) * 2 + (None,)
    assert judged.premise is not None
    assert judged.premise.found is not None
    assert judged.premise.found.parts == (33.0, 35.0)
    assert (fails.seeds, fails.detectable) == (0, None)
    unclear = judge(said, students | middle | {large: near})
    assert (unclear.verdict, unclear.judged[0].outcome) == ("undecided at this n", "undecided")
    assert judge(said, students | middle).verdict == "not run"
    # It counts neither for nor against, and takes no share of Holm's correction.
    both = replace(said, comparisons=(though_weaker, other))
    alone = judge(claim((A, C)), students)
    rest = judge(both, students | middle | {large: low})
    assert (rest.verdict, rest.judged[1].p) == (alone.verdict, alone.judged[0].p)
    against = students | {C: estimates(38.0)} | middle | {large: low}
    assert judge(replace(both, need="any"), against).verdict == "not supported"


def test_those_that_are_decided_have_to_agree_where_the_claim_says_so() -> None:
    said = claim((A, B), (A, C), need="agree")
    high, low, near = estimates(36.0), estimates(34.0), estimates(35.0)
    assert judge(said, {A: high, B: low, C: high}).verdict == "supported"
    assert judge(said, {A: low, B: high, C: low}).verdict == "not supported"
    assert judge(said, {A: near, B: low, C: high}).verdict == "undecided at this n"
    assert judge(said, {A: near, B: near, C: near}).verdict == "undecided at this n"
    assert judge(said, {}).verdict == "not run"


def test_seeds_that_scatter_leave_a_claim_open() -> None:
    said = claim((A, B))
    calm = {A: estimates(36.0, 36.1, 35.9), B: estimates(35.0, 35.1, 35.0)}
    wild = {A: estimates(38.0, 33.0, 37.0), B: estimates(35.0, 35.1, 35.0)}
    single = {A: calm[A][:1], B: calm[B][:1]}
    assert [judge(said, runs).verdict for runs in (calm, wild)] == [
        "supported",
        "undecided at this n",
    ]
    alone = judge(said, single)
    assert (alone.verdict, alone.seeds) == ("supported", 1)


def test_seeds_that_are_close_by_chance_decide_nothing() -> None:
    said = claim((A, B), (A, C))
    numbers = {
        A: estimates(20.0, 20.1),
        B: estimates(18.0, 18.1),  # beside A its two seeds do not scatter at all
        C: estimates(14.0, 24.0),  # beside A they do
    }
    lucky = judge(claim((A, B)), numbers).judged[0]
    together = judge(said, numbers).judged[0]
    assert lucky.outcome == "holds"
    assert together.outcome == "undecided"
    assert lucky.found is not None
    assert together.found is not None
    assert (together.found.value, together.found.seeds_dof) == (lucky.found.value, 2)
    other = replace(said.comparisons[1], alike="another column")
    apart = judge(replace(said, comparisons=(said.comparisons[0], other)), numbers)
    assert apart.judged[0].outcome == "holds"


def test_two_seeds_are_wrong_as_seldom_as_the_rule_says() -> None:
    rng = np.random.default_rng(0)
    places = [student("imagenet", f"teacher {i}") for i in range(16)]
    said = claim(*((place, places[0]) for place in places[1:]))
    wrong = 0
    for _ in range(200):
        found = judge(said, {p: estimates(*rng.normal(20, 1, 2), error=0.3) for p in places})
        wrong += bool(found.count("holds") + found.count("contradicted"))
    assert wrong / 200 <= 0.07


def test_without_any_spread_nothing_is_decided() -> None:
    bare = {A: estimates(0.79, error=None), B: estimates(0.68, error=None)}
    found = judge(claim((A, B)), bare)
    assert (found.verdict, found.judged[0].outcome) == ("undecided at this n", "no interval")
    seeds = {
        A: estimates(0.79, 0.80, 0.79, error=None),
        B: estimates(0.68, 0.69, 0.69, error=None),
    }
    assert judge(claim((A, B)), seeds).verdict == "supported"


def test_shared_questions_are_paired() -> None:
    rng = np.random.default_rng(0)
    hard = rng.random(2000) < 0.5
    right = [hard | (rng.random(2000) < p) for p in (0.12, 0.08)]
    keys = range(2000)
    a, b = (mean_influence(dict(zip(keys, r.tolist(), strict=True))) for r in right)
    values = [100 * float(r.mean()) for r in right]
    runs = {
        place: [Estimate(value=value, influence=influence)]
        for place, value, influence in zip((A, B), values, (a, b), strict=True)
    }
    paired = contrast(((1.0, A), (-1.0, B)), runs)
    expected = 100 * np.std(right[0].astype(float) - right[1]) / math.sqrt(2000)
    assert paired is not None
    assert paired.standard_error == pytest.approx(expected)
    assert paired.standard_error < 0.5 * math.sqrt(a.variance + b.variance)
    apart = combined([(1.0, a), (-1.0, Influence(tuple(map(str, keys)), b.values))])
    assert apart.variance == pytest.approx(a.variance + b.variance)


def test_holm() -> None:
    assert holm([0.01, 0.04, None, 0.03]) == [pytest.approx(0.03), pytest.approx(0.06), None,
                                              pytest.approx(0.06)]  # fmt: skip
    pairs = [(A, B)] * 5
    runs = {A: estimates(30.6), B: estimates(30.0)}
    assert judge(claim((A, B)), runs).verdict == "supported"
    assert judge(claim(*pairs), runs).verdict == "undecided at this n"


def test_the_detectable_difference_is_detected_in_four_of_five() -> None:
    said = claim((A, B))
    wanted = judge(said, {A: estimates(0.0), B: estimates(0.0)}).detectable
    assert wanted is not None
    rng = np.random.default_rng(1)
    found = sum(
        judge(
            said,
            {A: estimates(wanted + rng.normal(0, 0.2)), B: estimates(rng.normal(0, 0.2))},
        ).verdict
        == "supported"
        for _ in range(600)
    )
    assert found / 600 == pytest.approx(0.8, abs=0.05)


def test_influences_give_the_width_of_the_bootstrap() -> None:
    rng = np.random.default_rng(2)
    parts = [
        Part(
            category, ("group", f"{category}{group}"), (float(rng.random() < 0.3), 1.0), (1.0, 2.0)
        )
        for category in "ab"
        for group in range(150)
        for _ in range(2)
    ]
    moved = influences(parts)
    width = summarise(parts).interval[1] - summarise(parts).interval[0]
    spread = math.sqrt(sum(value**2 for value in moved.values()))
    assert 2 * 1.96 * spread == pytest.approx(width, rel=0.1)
    assert len(moved) == 300
