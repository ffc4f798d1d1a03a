"""What VLMs scored in benchmarks, with the blind score, chance and interval beside each.

Reads outcomes; needs neither torch nor Ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kdscale.analysis.stats import Interval, wilson_interval
from kdscale.core.answers_config import Answers
from kdscale.core.config import Mode
from kdscale.core.types import DataError
from kdscale.eval import Score, average, score
from kdscale.eval.benchmarks import BENCHMARKS
from kdscale.eval.scores import MME_MAXIMUM
from kdscale.sweep.outcomes import Outcome


@dataclass(frozen=True, kw_only=True)
class BenchmarkRow:
    """One benchmark of one VLM.

    Attributes:
        score: None where it is not finished.
        blind: The same model without the images, None where it was not asked or is not finished.
        limited: Only the first questions were asked.
        note: Why finished answers have no score, empty where they have.
    """

    benchmark: str
    mode: str
    score: Score | None
    blind: Score | None
    limited: bool
    note: str = ""

    @property
    def is_compared(self) -> bool:
        """Whether there are scores with and without the images."""
        return self.score is not None and self.blind is not None

    @property
    def sees(self) -> bool:
        """Whether the model beats its blind self and chance, intervals apart."""
        if self.score is None or self.blind is None:
            return False
        light, dark = (
            interval_of(self.benchmark, self.score),
            interval_of(self.benchmark, self.blind),
        )
        return light.low > max(dark.high, self.score.chance)

    def document(self) -> dict[str, Any]:
        """Returns the row as JSON, without the scores of items."""
        parts = {"score": self.score, "blind": self.blind}
        small = {name: part and self._without_items(part) for name, part in parts.items()}
        named = {"benchmark": self.benchmark, "mode": self.mode, "limited": self.limited}
        return named | small | {"sees": self.sees, "note": self.note}

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
    scores: dict[bool, Score] = {}
    notes: list[str] = []
    for blind, found in asked.items():
        if found.items is None:
            notes += [found.note] if found.done else []
            continue
        try:
            scores[blind] = score(benchmark, found.items, mode)
        except DataError as error:
            notes.append(str(error))
    return BenchmarkRow(
        benchmark=benchmark,
        mode=mode,
        score=scores.get(False),
        blind=scores.get(True),
        limited=recipe.limit is not None,
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
