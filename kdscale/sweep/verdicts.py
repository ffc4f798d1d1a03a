"""The rule that judges a claim: differences over seeds and questions, Holm's correction.

docs/claims.md states it in words. Nothing here knows where numbers come from.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, variance
from typing import Any, Literal, cast

from scipy import stats  # pyright: ignore[reportMissingTypeStubs]

from kdscale.sweep.places import Estimate, Numbers, Terms, combined

ALPHA, POWER, LEVEL = 0.05, 0.8, 0.95
Need = Literal["all", "any", "agree"]
SUPPORTED, NOT_SUPPORTED = "supported", "not supported"
UNDECIDED, NOT_RUN, DOES_NOT_APPLY = "undecided at this n", "not run", "does not apply"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A statement about one weighted sum of numbers: it is more than `least`.

    Attributes:
        name: For people.
        terms: The sum, mostly a difference of two.
        least: 0 says that there is a difference; a negative number that a loss is at most so
            large.
        premise: What has to hold for the statement to say what its claim says.
        alike: Of a claim's comparisons of one metric, those that share this word and the weights
            are taken to differ by as much from seed to seed.
    """

    name: str
    terms: Terms
    least: float = 0.0
    premise: Comparison | None = None
    alike: str = ""

    @property
    def kind(self) -> Hashable:
        """What comparisons have in common whose seeds are taken to scatter alike."""
        return self.alike, tuple((weight, place.metric) for weight, place in self.terms)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What the paper says, as comparisons.

    Attributes:
        name: Short, for files.
        text: The claim.
        source: Where the paper says or prints it.
        need: Whether all comparisons have to hold, any of them, or those that are decided.
    """

    name: str
    text: str
    source: str
    comparisons: tuple[Comparison, ...]
    need: Need = "all"


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """A weighted sum of measured numbers.

    Attributes:
        over_questions: Its variance over the choice of questions, None where nothing is known.
        over_seeds: Variance of one seed's sum, None where no two seeds are known.
        seeds_dof: Degrees of freedom of the latter.
        seeds: That the sum was computed for.
        parts: The numbers that were summed, without their weights.
    """

    value: float
    over_questions: float | None
    over_seeds: float | None
    seeds_dof: int
    seeds: int
    parts: tuple[float, ...]

    @property
    def standard_error(self) -> float | None:
        """Over questions and seeds; None where nothing is known of the spread."""
        total = (self.over_questions or 0.0) + (self.over_seeds or 0.0) / self.seeds
        return math.sqrt(total) if total > 0 else None

    @property
    def dof(self) -> float:
        """Degrees of freedom by Welch and Satterthwaite; the error over questions is known."""
        over_seeds = (self.over_seeds or 0.0) / self.seeds
        if over_seeds == 0:
            return math.inf
        return self.seeds_dof * ((over_seeds + (self.over_questions or 0.0)) / over_seeds) ** 2

    def half_width(self, level: float = LEVEL) -> float:
        """Returns half of the interval's width; NaN without an error."""
        if self.standard_error is None:
            return math.nan
        return self.standard_error * _quantile((1 + level) / 2, self.dof)


def contrast(terms: Terms, numbers: Numbers) -> Contrast | None:
    """Computes a weighted sum with its error over questions and, from two seeds on, over seeds.

    Seeds that all places have are paired. Where they share none, each place's mean counts as one
    run. Questions are paired where all answers are at hand.

    Args:
        terms: (weight, place) each.
        numbers: The runs of every place.

    Returns:
        None where a place has no run.
    """
    runs = [numbers.get(place, ()) for _, place in terms]
    if not all(runs):
        return None
    weights = [weight for weight, _ in terms]
    shared = {run.seed for run in runs[0]}
    for place in runs[1:]:
        shared &= {run.seed for run in place}
    used = [[run for run in place if run.seed in shared] if shared else [*place] for place in runs]
    parts = tuple(fmean(run.value for run in place) for place in used)
    value = sum(w * part for w, part in zip(weights, parts, strict=True))
    seeds = max(1, len(shared))
    sums = [_sum_of(weights, used, seed) for seed in shared] if seeds > 1 else []
    return Contrast(
        value=value,
        over_questions=_over_questions(weights, used),
        over_seeds=variance(sums) if sums else None,
        seeds_dof=seeds - 1,
        seeds=seeds,
        parts=parts,
    )


def pooled(found: Sequence[Contrast | None], kinds: Sequence[Hashable]) -> list[Contrast | None]:
    """Gives sums of one kind a common variance over seeds: what all their seeds say of it.

    Two seeds of one sum may be close by chance; its own variance, of one degree of freedom, would
    then say next to nothing of what a third seed would change.

    Args:
        found: Sums, None where one was not run.
        kinds: One each; those that are equal are taken to scatter alike.
    """
    spreads: dict[Hashable, float] = {}
    dofs: dict[Hashable, int] = {}
    for one, kind in zip(found, kinds, strict=True):
        if one is not None and one.over_seeds is not None:
            spreads[kind] = spreads.get(kind, 0.0) + one.over_seeds * one.seeds_dof
            dofs[kind] = dofs.get(kind, 0) + one.seeds_dof
    return [
        replace(one, over_seeds=spreads[kind] / dofs[kind], seeds_dof=dofs[kind])
        if one is not None and kind in dofs
        else one
        for one, kind in zip(found, kinds, strict=True)
    ]


def _sum_of(weights: Sequence[float], runs: Sequence[Sequence[Estimate]], seed: int) -> float:
    """Returns the weighted sum of one seed's numbers."""
    values = (next(r.value for r in place if r.seed == seed) for place in runs)
    return sum(w * value for w, value in zip(weights, values, strict=True))


def _over_questions(weights: Sequence[float], runs: Sequence[Sequence[Estimate]]) -> float | None:
    """Returns the variance over the choice of questions, paired where answers are at hand."""
    if all(run.influence is not None for place in runs for run in place):
        parts = [
            (w / len(place), run.influence)
            for w, place in zip(weights, runs, strict=True)
            for run in place
            if run.influence is not None
        ]
        paired = combined(parts).variance
        if paired > 0:
            return paired
    total = 0.0
    for w, place in zip(weights, runs, strict=True):
        errors = [run.error for run in place if run.error is not None]
        if len(errors) < len(place):
            return None
        # Every seed answers the same questions: their errors do not average out.
        total += w * w * fmean(error * error for error in errors)
    return total or None


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A comparison with what was found.

    Attributes:
        p: Two-sided, adjusted by Holm over the claim's comparisons; None where it has no error,
            or where the premise does not hold.
        outcome: `holds`, `contradicted`, `undecided`, `no interval`, `not run` or, where the
            premise is contradicted, `does not apply`.
        detectable: Smallest difference that would be found with a power of 0.8 at this n.
        premise: What was found about the comparison's premise.
    """

    comparison: Comparison
    found: Contrast | None
    p: float | None
    outcome: str
    detectable: float | None
    premise: Judged | None = None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A claim and what was found about it."""

    claim: Claim
    verdict: str
    judged: tuple[Judged, ...]

    def count(self, outcome: str) -> int:
        """Returns how many comparisons came out so."""
        return sum(one.outcome == outcome for one in self.judged)

    @property
    def seeds(self) -> int:
        """Fewest seeds of a comparison that was made and applies, 0 where none was."""
        made = [one.found for one in self.judged if one.found and one.outcome != DOES_NOT_APPLY]
        return min((found.seeds for found in made), default=0)

    @property
    def detectable(self) -> float | None:
        """Smallest difference that every comparison would find."""
        return max((one.detectable for one in self.judged if one.detectable), default=None)


def judge(claim: Claim, numbers: Numbers) -> Verdict:
    """Judges a claim on numbers.

    Args:
        claim: What is said.
        numbers: The runs of every place.
    """
    stated = dict.fromkeys(c.premise for c in claim.comparisons if c.premise is not None)
    premises = {one.comparison: one for one in _judged([*stated], numbers, {})}
    judged = _judged(claim.comparisons, numbers, premises)
    outcomes = [one.outcome for one in judged if one.outcome != DOES_NOT_APPLY]
    verdict = _verdict(outcomes, claim.need) if outcomes else DOES_NOT_APPLY
    return Verdict(claim=claim, verdict=verdict, judged=judged)


def _judged(
    comparisons: Sequence[Comparison], numbers: Numbers, premises: Mapping[Comparison, Judged]
) -> tuple[Judged, ...]:
    """Judges comparisons together; those whose premise does not hold are only looked at."""
    own = [None if c.premise is None else premises[c.premise] for c in comparisons]
    counts = [premise is None or premise.outcome == "holds" for premise in own]
    alone = [contrast(comparison.terms, numbers) for comparison in comparisons]
    found = pooled(alone, [comparison.kind for comparison in comparisons])
    pairs = zip(comparisons, found, counts, strict=True)
    adjusted = holm([_p_value(c, f) if is_counted else None for c, f, is_counted in pairs])
    count = sum(p is not None for p in adjusted)
    return tuple(
        Judged(
            comparison=comparison,
            found=one,
            p=p,
            outcome=_outcome(comparison, one, p, premise),
            detectable=None if p is None else _detectable(one, count),
            premise=premise,
        )
        for comparison, one, p, premise in zip(comparisons, found, adjusted, own, strict=True)
    )


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjusts p-values by Holm's step-down procedure; None stays None and does not count.

    Source: Holm 1979, "A Simple Sequentially Rejective Multiple Test Procedure".
    """
    known = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, place) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[place] = largest
    return adjusted


def _p_value(comparison: Comparison, found: Contrast | None) -> float | None:
    """Returns the two-sided p-value of a comparison, None without an error."""
    if found is None or found.standard_error is None:
        return None
    distance = abs(found.value - comparison.least) / found.standard_error
    return float(2 * cast(Any, stats).t.sf(distance, found.dof))


def _outcome(
    comparison: Comparison, found: Contrast | None, p: float | None, premise: Judged | None
) -> str:
    """Names what a comparison has shown; a premise that is open leaves it open."""
    if premise is not None and premise.outcome == "contradicted":
        return DOES_NOT_APPLY
    if found is None:
        return NOT_RUN
    if premise is not None and premise.outcome != "holds":
        return premise.outcome
    if p is None:
        return "no interval"
    if p >= ALPHA:
        return "undecided"
    return "holds" if found.value > comparison.least else "contradicted"


def _verdict(outcomes: Sequence[str], need: Need) -> str:
    """Puts the outcomes of a claim's comparisons together."""
    if all(outcome == NOT_RUN for outcome in outcomes):
        return NOT_RUN
    if need == "agree":
        decided = set(outcomes) & {"holds", "contradicted"}
        if len(decided) != 1:
            return UNDECIDED
        return SUPPORTED if "holds" in decided else NOT_SUPPORTED
    decisive, opposite = ("contradicted", "holds") if need == "all" else ("holds", "contradicted")
    if decisive in outcomes:
        return NOT_SUPPORTED if need == "all" else SUPPORTED
    if all(outcome == opposite for outcome in outcomes):
        return SUPPORTED if need == "all" else NOT_SUPPORTED
    return UNDECIDED


def _detectable(found: Contrast | None, count: int) -> float | None:
    """Returns the difference found with `POWER` at Holm's strictest step of `count`."""
    if found is None or found.standard_error is None:
        return None
    strictest = _quantile(1 - ALPHA / (2 * count), found.dof)
    return found.standard_error * (strictest + _quantile(POWER, found.dof))


def _quantile(share: float, dof: float) -> float:
    """Returns a quantile of Student's t."""
    return float(cast(Any, stats).t.ppf(share, dof))
