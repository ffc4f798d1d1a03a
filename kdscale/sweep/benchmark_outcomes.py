"""What VLMs scored in benchmarks, with the blind score, chance and intervals beside each.

Reads outcomes; needs neither torch nor Ray.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kdscale.analysis.stats import Interval, PairedDifference, wilson_interval
from kdscale.core.answers_config import Answers
from kdscale.core.config import Mode
from kdscale.core.storage import StageStore
from kdscale.core.types import DataError
from kdscale.eval import Score, average, difference, score
from kdscale.eval.answers import load_items
from kdscale.eval.benchmarks import BENCHMARKS
from kdscale.eval.scores import MME_MAXIMUM, scored_together
from kdscale.sweep.outcomes import Outcome


@dataclass(frozen=True, kw_only=True)
class BenchmarkRow:
    """One benchmark of one VLM.

    Attributes:
        score: None where it is not finished.
        blind: The same model without the images, None where it was not asked or is not finished.
        minus_blind: The score less the blind one, None unless there are both.
        limited: Only the first questions were asked.
        note: Why finished answers have no score, empty where they have.
    """

    benchmark: str
    mode: Mode
    score: Score | None
    blind: Score | None
    limited: bool
    minus_blind: PairedDifference | None = None
    note: str = ""

    @property
    def is_compared(self) -> bool:
        """Whether there are scores with and without the images."""
        return self.score is not None and self.blind is not None

    @property
    def sees(self) -> bool:
        """Whether the model beats its blind self on the same questions, and chance."""
        if self.score is None or self.minus_blind is None:
            return False
        above_chance = interval_of(self.benchmark, self.score).low > self.score.chance
        return above_chance and self.minus_blind.interval.low > 0

    def document(self) -> dict[str, Any]:
        """Returns the row as JSON, without the scores of items."""
        parts = {"score": self.score, "blind": self.blind}
        small = {name: part and self._without_items(part) for name, part in parts.items()}
        named = {"benchmark": self.benchmark, "mode": self.mode, "limited": self.limited}
        minus_blind = self.minus_blind and asdict(self.minus_blind)
        return named | small | {"minus_blind": minus_blind, "sees": self.sees, "note": self.note}

    def _without_items(self, found: Score) -> dict[str, Any]:
        """Returns a score's fields but those of its items, with the interval that is printed."""
        fields = {name: value for name, value in asdict(found).items() if name != "item_scores"}
        interval = interval_of(self.benchmark, found)
        return fields | {"interval": (interval.low, interval.high)}


def interval_of(benchmark: str, found: Score) -> Interval:
    """Returns a score's interval; Wilson's over its clusters where resampling finds no spread.

    All right, all wrong or one cluster alone would otherwise claim certainty.
    """
    if found.interval[0] < found.interval[1]:
        return Interval(*found.interval)
    maximum = MME_MAXIMUM if benchmark == "mme_p" else 100.0
    right = round(found.num_groups * found.value / maximum)
    wide = wilson_interval(right, found.num_groups)
    return Interval(min(found.value, maximum * wide.low), max(found.value, maximum * wide.high))


def counted(benchmark: str, mode: Mode, found: Score) -> str:
    """Returns what a score and its interval are over, in words: `96 pairs`, `1,200`."""
    what = scored_together(benchmark, mode)
    return f"{found.num_groups:,} {what}" if what else f"{found.n:,}"


def minus_blind(
    benchmark: str,
    seeing: Sequence[Mapping[str, Any]],
    blind: Sequence[Mapping[str, Any]],
    mode: Mode,
) -> PairedDifference:
    """Computes a score less that of the same model without the images, question by question.

    Where resampling finds no spread, the interval is the wider one of two independent scores: from
    the lower end of one less the upper end of the other to the reverse.

    Args:
        benchmark: One of the 16.
        seeing: Items as `kdscale.eval.score` takes them.
        blind: Answers to the same questions without the images.
        mode: As of `kdscale.eval.score`.

    Raises:
        DataError: As `kdscale.eval.scores.difference`.
    """
    found = difference(benchmark, seeing, blind, mode)
    low, high = found.interval
    if low == high:
        light, dark = (
            interval_of(benchmark, score(benchmark, items, mode)) for items in (seeing, blind)
        )
        low, high = min(low, light.low - dark.high), max(high, light.high - dark.low)
    return PairedDifference(found.value, Interval(low, high), len(seeing))


def is_limited(recipe: Answers, count: int | None) -> bool:
    """Tells whether a limit has left questions out.

    Args:
        recipe: What was asked.
        count: Questions that were asked; None where it is not known, then any limit counts.
    """
    if recipe.limit is None or count is None:
        return recipe.limit is not None
    known = BENCHMARKS.get(recipe.benchmark)
    is_whole = known is not None and count == known.num_asked
    return count >= recipe.limit and not is_whole


def score_metrics(recipe: Answers, stage: StageStore) -> dict[str, float]:
    """Scores finished answers in the mode of their recipe, as named numbers for a tracker.

    Raises:
        UnfinishedStage, DataError, StorageError: They cannot be read or scored.
    """
    found = score(recipe.benchmark, load_items(stage), recipe.mode)
    interval = interval_of(recipe.benchmark, found)
    return {
        "score": found.value,
        "score_low": interval.low,
        "score_high": interval.high,
        "n": float(found.n),
        "chance": found.chance,
        "constant_share": found.constant_share,
        "unparsed_share": found.unparsed_share,
    }


def benchmark_rows(path: Sequence[Outcome], mode: Mode) -> tuple[BenchmarkRow, ...]:
    """Scores the benchmarks among the outcomes of a trial, in the order of its path.

    Args:
        path: The outcomes.
        mode: The trial's; its answers may be shared with one of another mode.
    """
    found: dict[str, dict[bool, Outcome]] = {}
    for outcome in path:
        if isinstance(outcome.stage.recipe, Answers):
            recipe = outcome.stage.recipe
            found.setdefault(recipe.benchmark, {})[recipe.blind] = outcome
    return tuple(_row(name, asked, mode) for name, asked in found.items())


def _row(benchmark: str, asked: dict[bool, Outcome], mode: Mode) -> BenchmarkRow:
    """Scores one benchmark."""
    recipe = next(iter(asked.values())).stage.recipe
    assert isinstance(recipe, Answers)
    answers = {blind: found.items for blind, found in asked.items() if found.items is not None}
    notes = [found.note for found in asked.values() if found.items is None and found.done]
    scores: dict[bool, Score] = {}
    paired: PairedDifference | None = None
    try:
        for blind, items in answers.items():
            scores[blind] = score(benchmark, items, mode)
        if len(answers) == 2:
            paired = minus_blind(benchmark, answers[False], answers[True], mode)
    except DataError as error:
        notes.append(str(error))
    count = next((len(items) for items in answers.values()), None)
    return BenchmarkRow(
        benchmark=benchmark,
        mode=mode,
        score=scores.get(False),
        blind=scores.get(True),
        limited=is_limited(recipe, count),
        minus_blind=paired,
        note="; ".join(dict.fromkeys(notes)),
    )


def averages(rows: Sequence[BenchmarkRow]) -> tuple[float | None, float | None]:
    """Returns the average of all 16, seeing and blind; None unless all were asked whole."""
    if {row.benchmark for row in rows} != set(BENCHMARKS) or any(row.limited for row in rows):
        return None, None
    seeing, blind = (
        {row.benchmark: part.value for row in rows if (part := getattr(row, name)) is not None}
        for name in ("score", "blind")
    )
    first, second = (average(v) if len(v) == len(BENCHMARKS) else None for v in (seeing, blind))
    return first, second
