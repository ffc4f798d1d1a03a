"""What VLMs answered: accuracy by kind of question, beside chance and the blind score.

Reads plans and the stage store; needs neither torch nor Ray.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kdscale.analysis.stats import (
    Interval,
    PairedDifference,
    bootstrap_interval,
    paired_difference,
    percent,
    wilson_interval,
)
from kdscale.core.scale import Scale
from kdscale.core.vlm_config import SuiteSpec, Vlm
from kdscale.eval.matching import is_right
from kdscale.sweep.benchmark_outcomes import BenchmarkRow, averages, benchmark_rows
from kdscale.sweep.outcomes import DONE, LEVEL, NOT_FINISHED, Outcome
from kdscale.sweep.plan import PlannedTrial
from kdscale.sweep.suite import suite_of

ALL = "all"
OWN_STAGES = ("pretrain", "finetune", "evaluate", "answers")


@dataclass(frozen=True, kw_only=True)
class FamilyScore:
    """Accuracy on one kind of question, percent.

    Attributes:
        groups: Images asked about; intervals resample them whole.
        blind: Accuracy of the same model without the images.
        minus_blind: The accuracy less the blind one, question by question.
        chance: What guessing among the possible answers gives.
        constant_share: Share of the most frequent answer; 100 means that nothing was looked at.
    """

    family: str
    n: int
    groups: int
    accuracy: float
    interval: Interval
    blind: float
    blind_interval: Interval
    minus_blind: PairedDifference
    chance: float
    constant_share: float

    @property
    def sees(self) -> bool:
        """Whether the model beats its blind self on the same questions, and chance."""
        return self.interval.low > self.chance and self.minus_blind.interval.low > 0


@dataclass(frozen=True, kw_only=True)
class VlmRow:
    """One VLM trial.

    Attributes:
        key: Of its last stage.
        stage: The first unfinished stage, or the last.
        scores: By kind of question, all questions first; empty where unfinished.
        benchmarks: One row for each of the suite.
        average: Of all 16 benchmarks, None unless all were asked whole; without images likewise.
    """

    name: str
    sweep: str
    key: str
    state: str
    stage: str
    chosen: dict[str, Any]
    scores: tuple[FamilyScore, ...] = ()
    benchmarks: tuple[BenchmarkRow, ...] = ()
    average: float | None = None
    blind_average: float | None = None
    seconds: float | None = None
    note: str = ""

    def document(self) -> dict[str, Any]:
        """Returns the row as JSON."""
        own = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return own | {
            "scores": [asdict(score) for score in self.scores],
            "benchmarks": [row.document() for row in self.benchmarks],
        }


def vlm_rows(
    trials: Sequence[PlannedTrial], outcomes: Mapping[str, Outcome], scale: Scale
) -> tuple[VlmRow, ...]:
    """Reports the VLM trials among the given ones, whose suites the scale knows."""
    return tuple(
        _row(trial, outcomes, suite_of(trial.trial.recipe.suite, scale))
        for trial in trials
        if isinstance(trial.trial.recipe, Vlm)
    )


def _row(planned: PlannedTrial, outcomes: Mapping[str, Outcome], suite: SuiteSpec | None) -> VlmRow:
    """Reports one trial."""
    path = [outcomes[key] for key in planned.path]
    left = [outcome for outcome in path if not outcome.done]
    own = [o for o in path if o.stage.kind in OWN_STAGES]
    last = path[-1]
    answers = next((o.answers for o in path if o.answers is not None), None)
    benchmarks = benchmark_rows(path, suite.mode) if suite else ()
    seeing, blind = averages(benchmarks)
    return VlmRow(
        name=planned.trial.name,
        sweep=planned.sweep,
        key=planned.key,
        state=(left[0].early or NOT_FINISHED) if left else DONE,
        stage=(left[0] if left else last).stage.kind,
        chosen=dict(planned.trial.chosen),
        scores=family_scores(answers) if answers else (),
        benchmarks=benchmarks,
        average=seeing,
        blind_average=blind,
        seconds=None if left else sum(outcome.seconds or 0.0 for outcome in own),
        note="" if answers or benchmarks or left else "was asked no questions",
    )


def family_scores(rows: Sequence[Mapping[str, Any]]) -> tuple[FamilyScore, ...]:
    """Scores answers: all of them, then kind by kind in the order of their first question."""
    families = list(dict.fromkeys(row["family"] for row in rows))
    parts = [(ALL, list(rows))]
    parts += [(name, [row for row in rows if row["family"] == name]) for name in families]
    return tuple(_score(name, part) for name, part in parts)


def _score(family: str, rows: Sequence[Mapping[str, Any]]) -> FamilyScore:
    """Scores one kind of question."""
    groups = [row["group"] for row in rows]
    right, blind = (
        [float(is_right(row[column], row["gold"])) for row in rows]
        for column in ("prediction", "blind_prediction")
    )
    answers = [row["prediction"] for row in rows]
    light, dark = _interval(right, groups), _interval(blind, groups)
    return FamilyScore(
        family=family,
        n=len(rows),
        groups=len(set(groups)),
        accuracy=100 * sum(right) / len(rows),
        interval=light,
        blind=100 * sum(blind) / len(rows),
        blind_interval=dark,
        minus_blind=_minus_blind(
            right, blind, groups, Interval(light.low - dark.high, light.high - dark.low)
        ),
        chance=100 * sum(row["chance"] for row in rows) / len(rows),
        constant_share=100 * max(map(answers.count, set(answers))) / len(rows),
    )


def _interval(correct: Sequence[float], groups: Sequence[str]) -> Interval:
    """Returns the interval of an accuracy; Wilson's where all or none are right."""
    right = int(sum(correct))
    if right in (0, len(correct)):
        return percent(wilson_interval(right, len(correct), level=LEVEL))
    return percent(bootstrap_interval(correct, groups=groups, level=LEVEL))


def _minus_blind(
    right: Sequence[float], blind: Sequence[float], groups: Sequence[str], apart: Interval
) -> PairedDifference:
    """Returns the paired difference in points; the wide interval where draws have no spread."""
    found = paired_difference(right, blind, groups=groups, level=LEVEL)
    paired = percent(found.interval)
    return PairedDifference(
        100 * found.difference, paired if paired.low < paired.high else apart, found.n
    )
