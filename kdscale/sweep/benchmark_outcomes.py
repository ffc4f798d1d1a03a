"""What VLMs scored in benchmarks, with the blind score, chance and interval beside each.

Reads outcomes; needs neither torch nor Ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kdscale.core.answers_config import Answers
from kdscale.eval import Score, average, score
from kdscale.eval.benchmarks import BENCHMARKS
from kdscale.sweep.outcomes import Outcome


@dataclass(frozen=True, kw_only=True)
class BenchmarkRow:
    """One benchmark of one VLM.

    Attributes:
        score: None where it is not finished.
        blind: The same model without the images, None where it was not asked.
        limited: Only the first questions were asked.
    """

    benchmark: str
    mode: str
    score: Score | None
    blind: Score | None
    limited: bool

    @property
    def sees(self) -> bool:
        """Whether the model beats its blind self and chance, intervals apart."""
        if self.score is None or self.blind is None:
            return False
        return self.score.interval[0] > max(self.blind.interval[1], self.score.chance)

    def document(self) -> dict[str, Any]:
        """Returns the row as JSON, without the scores of items."""
        parts = {"score": self.score, "blind": self.blind}
        small = {name: part and _without_items(part) for name, part in parts.items()}
        named = {"benchmark": self.benchmark, "mode": self.mode, "limited": self.limited}
        return named | small | {"sees": self.sees}


def _without_items(found: Score) -> dict[str, Any]:
    """Returns a score's fields but those of its items."""
    return {name: value for name, value in asdict(found).items() if name != "item_scores"}


def benchmark_rows(path: Sequence[Outcome]) -> tuple[BenchmarkRow, ...]:
    """Scores the benchmarks among the outcomes of a trial, in the order of its path."""
    found: dict[str, dict[bool, Outcome]] = {}
    for outcome in path:
        if isinstance(outcome.stage.recipe, Answers):
            recipe = outcome.stage.recipe
            found.setdefault(recipe.benchmark, {})[recipe.blind] = outcome
    return tuple(_row(name, asked) for name, asked in found.items())


def _row(benchmark: str, asked: dict[bool, Outcome]) -> BenchmarkRow:
    """Scores one benchmark."""
    recipe = next(iter(asked.values())).stage.recipe
    assert isinstance(recipe, Answers)
    seeing, blind = (
        score(benchmark, found.items, recipe.mode)
        if (found := asked.get(key)) is not None and found.items is not None
        else None
        for key in (False, True)
    )
    return BenchmarkRow(
        benchmark=benchmark,
        mode=recipe.mode,
        score=seeing,
        blind=blind,
        limited=recipe.limit is not None,
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
