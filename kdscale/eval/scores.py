"""Scores of the 16 benchmarks: a pure function of what was asked and answered."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

from kdscale.core.types import ConfigError, DataError, MissingInput, unknown_name
from kdscale.eval.scoring import letters, numbers, soft, text, totals
from kdscale.eval.scoring.items import (
    Item,
    Kind,
    Layout,
    Mode,
    NothingToScore,
    Rule,
    read_items,
)

PERCEPTION = frozenset(
    (
        "existence",
        "count",
        "position",
        "color",
        "posters",
        "celebrity",
        "scene",
        "landmark",
        "artwork",
        "OCR",
    )
)
COGNITION = frozenset(
    ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
)
OCR_TYPES = frozenset(
    (
        "",
        "Regular Text Recognition",
        "Irregular Text Recognition",
        "Artistic Text Recognition",
        "Handwriting Recognition",
        "Digit String Recognition",
        "Non-Semantic Text Recognition",
        "Scene Text-centric VQA",
        "Doc-oriented VQA",
        "Key Information Extraction",
        text.FORMULA,
    )
)
MME_MAXIMUM = 2000.0
MME_GUESS = 75.0  # of a category's 200: half of the answers right, a quarter of the images


@dataclass(frozen=True)
class Score:
    """A benchmark's score.

    Attributes:
        value: On the scale of published tables: per cent; for MME-P the sum of category scores,
            0 to 2000.
        n: Items that count.
        num_groups: Clusters among them (pairs, rotations or images, else items).
        chance: `value` of a uniform guess over the options; open questions add nothing.
        constant_share: Share of the items that count whose output is the most frequent one.
        unparsed_share: Share of the items that count in which no answer could be read.
        interval: 95 % bootstrap interval of `value`, clusters drawn as wholes; with a single
            cluster both ends are `value`.
        item_scores: In [0, 1], one per item in the order given, also where it does not count.
    """

    value: float
    n: int
    num_groups: int
    chance: float
    constant_share: float
    unparsed_share: float
    interval: tuple[float, float]
    item_scores: tuple[float, ...]


@dataclass(frozen=True)
class _Mode:
    """How a benchmark is scored in one mode: rule, total, and which items count."""

    rule: Rule
    total: totals.Total = totals.per_item
    counts: Callable[[Item], bool] = lambda item: True

    def parts(self, items: Sequence[Item], scores: Sequence[float]) -> list[totals.Part]:
        """What the items that count add to the total, given all items in the order of the file."""
        if self.total is totals.paper_mme:  # an item that does not count still moves its parity
            parts = zip(items, self.total(items, scores), strict=True)
            return [part for item, part in parts if self.counts(item)]
        kept = [row for row in zip(items, scores, strict=True) if self.counts(row[0])]
        return self.total([item for item, _ in kept], [score for _, score in kept])

    def chance(self, items: Sequence[Item]) -> float:
        """The total of a uniform guess."""
        if self.total in (totals.paper_mme, totals.whole_mme):
            return MME_GUESS * len({item.category for item in items if self.counts(item)})
        return totals.total(self.parts(items, [item.guess for item in items]))


@dataclass(frozen=True)
class _Benchmark:
    """A benchmark: layout of its items, scoring in both modes."""

    layout: Layout
    paper: _Mode
    corrected: _Mode


def _letters(paper: Rule, num_options: int = 0) -> _Benchmark:
    """A benchmark that asks for a letter and averages over items."""
    layout = Layout("letter", num_options=num_options)
    return _Benchmark(layout, _Mode(paper), _Mode(letters.corrected_letter))


def _is_perception(item: Item) -> bool:
    """Tells whether an item of MME counts for MME-P."""
    return item.category in PERCEPTION


def _has_image(item: Item) -> bool:
    """Tells whether a question comes with an image."""
    return bool(item.image_sha256)


_FL = letters.first_letter_rule(".:,")
_FL_STOP = letters.first_letter_rule(".")
_MMMU: dict[str, Kind] = {"multiple-choice": "letter", "open": "several"}
_MATHVISTA: dict[str, Kind] = {"multi_choice": "option_text", "free_form": "one"}

_BENCHMARKS: dict[str, _Benchmark] = {
    "mme_p": _Benchmark(
        Layout("yes_no", categories=PERCEPTION | COGNITION),
        _Mode(text.paper_yes_no, totals.paper_mme, _is_perception),
        _Mode(text.corrected_yes_no, totals.whole_mme, _is_perception),
    ),
    "mmbench": _Benchmark(
        Layout("letter", num_options=4),
        _Mode(_FL),
        _Mode(letters.corrected_letter, totals.whole_rotations),
    ),
    "seedbench": _letters(_FL_STOP, 4),
    "gqa": _Benchmark(Layout("one"), _Mode(text.paper_gqa), _Mode(text.corrected_gqa)),
    "scienceqa": _Benchmark(
        Layout("index"),
        _Mode(letters.paper_scienceqa),
        _Mode(letters.corrected_letter, counts=_has_image),
    ),
    "mmmu": _Benchmark(
        Layout(_MMMU, question_types=frozenset(_MMMU)),
        _Mode(numbers.paper_mmmu),
        _Mode(numbers.corrected_mmmu),
    ),
    "mathvista": _Benchmark(
        Layout(_MATHVISTA, question_types=frozenset(_MATHVISTA)),
        _Mode(numbers.paper_mathvista),
        _Mode(numbers.corrected_mathvista),
    ),
    "ai2d": _Benchmark(
        Layout("index", num_options=4),
        _Mode(letters.paper_ai2d),
        _Mode(letters.corrected_letter),
    ),
    "chartqa": _Benchmark(
        Layout("one"), _Mode(numbers.paper_chartqa), _Mode(numbers.corrected_chartqa)
    ),
    "ocrbench": _Benchmark(
        Layout("several", question_types=OCR_TYPES),
        _Mode(text.paper_ocrbench),
        _Mode(text.corrected_ocrbench),
    ),
    "textvqa": _Benchmark(Layout("ten"), _Mode(soft.paper_textvqa), _Mode(soft.corrected_textvqa)),
    "docvqa": _Benchmark(Layout("several"), _Mode(soft.docvqa), _Mode(soft.docvqa)),
    "mmvp": _Benchmark(
        Layout("letter", num_options=2),
        _Mode(letters.paper_mmvp, totals.paper_pairs),
        _Mode(letters.corrected_letter, totals.whole_pairs),
    ),
    "realworldqa": _Benchmark(
        Layout("one"), _Mode(text.paper_realworldqa), _Mode(text.corrected_realworldqa)
    ),
    "cvbench_2d": _letters(_FL_STOP),
    "cvbench_3d": _letters(letters.paper_cvbench_3d, 2),
}
BENCHMARKS = tuple(_BENCHMARKS)
_TOGETHER: dict[totals.Total, str] = {
    totals.paper_pairs: "pairs",
    totals.whole_pairs: "pairs",
    totals.whole_rotations: "questions",
    totals.paper_mme: "images",
    totals.whole_mme: "images",
}


def score(benchmark: str, items: Iterable[Mapping[str, Any]], mode: Mode = "paper") -> Score:
    """Scores a model's answers to a benchmark.

    Args:
        benchmark: One of `BENCHMARKS`.
        items: As `kdscale.eval.questions.Question.item` returns them, in any order.
        mode: "paper" scores as Cambrian-1 does, oddities included; "corrected" repairs them.

    Returns:
        The score. It depends on the items, not on their order.

    Raises:
        UnknownName: There is no such benchmark.
        ConfigError: There is no such mode.
        BadItem: An item is malformed.
        NothingToScore: No item counts.

    Source: Cambrian-1 `eval/` at 539ffc3 (2024-10-30).
    """
    how, given = _judged(benchmark, items, mode)
    verdicts = {item.number: how.rule(item) for item in given}
    ordered = sorted(given, key=lambda item: item.number)
    counted = [item for item in ordered if how.counts(item)]
    summary = totals.summarise(how.parts(ordered, [verdicts[i.number].score for i in ordered]))
    outputs = Counter(item.prediction.strip() for item in counted)
    return Score(
        value=summary.value,
        n=len(counted),
        num_groups=summary.num_groups,
        chance=how.chance(ordered),
        constant_share=max(outputs.values()) / len(counted),
        unparsed_share=sum(not verdicts[i.number].parsed for i in counted) / len(counted),
        interval=summary.interval,
        item_scores=tuple(verdicts[item.number].score for item in given),
    )


def difference(
    benchmark: str,
    first: Iterable[Mapping[str, Any]],
    second: Iterable[Mapping[str, Any]],
    mode: Mode = "paper",
) -> totals.Summary:
    """Computes how much better one set of answers scores than another to the same questions.

    The bootstrap draws clusters of questions, not scores, so that what makes a question hard for
    both cancels out of the interval.

    Args:
        benchmark: As of `score`.
        first: Items as of `score`.
        second: Other answers to the same questions, in any order.
        mode: As of `score`.

    Returns:
        The first score minus the second, on the scale of `Score.value`, with its 95 % interval;
        both ends are the difference where all draws come out alike.

    Raises:
        UnknownName, ConfigError, BadItem, NothingToScore: As `score`.
        DataError: They do not answer the same questions.
    """
    (how, light), (_, dark) = (_judged(benchmark, items, mode) for items in (first, second))
    both = [sorted(items, key=lambda item: item.number) for items in (light, dark)]
    asked = [[replace(item, prediction="") for item in items] for items in both]
    if asked[0] != asked[1]:
        raise DataError(f"{benchmark}: the two sets of answers are not to the same questions")
    parts = [how.parts(items, [how.rule(item).score for item in items]) for items in both]
    return totals.summarise([a.minus(b) for a, b in zip(*parts, strict=True)])


def influences(
    benchmark: str, items: Iterable[Mapping[str, Any]], mode: Mode = "paper"
) -> dict[tuple[str, tuple[str, str]], float]:
    """Computes what each cluster of questions contributes to the error of a benchmark's score.

    The squares add up to the score's variance; those of the difference of two models' influences
    to the variance of their paired difference.

    Args:
        benchmark: As of `score`.
        items: As of `score`.
        mode: As of `score`.

    Raises:
        UnknownName, ConfigError, BadItem, NothingToScore: As `score`.
    """
    how, given = _judged(benchmark, items, mode)
    ordered = sorted(given, key=lambda item: item.number)
    return totals.influences(how.parts(ordered, [how.rule(item).score for item in ordered]))


def _judged(
    benchmark: str, items: Iterable[Mapping[str, Any]], mode: Mode
) -> tuple[_Mode, list[Item]]:
    """Checks a benchmark's items and returns how they are scored; errors as of `score`."""
    if benchmark not in BENCHMARKS:
        raise unknown_name("benchmark", benchmark, BENCHMARKS)
    if mode not in ("paper", "corrected"):
        raise ConfigError(f"unknown mode {mode!r}; scores are 'paper' or 'corrected'")
    found = _BENCHMARKS[benchmark]
    how = found.paper if mode == "paper" else found.corrected
    given = read_items(benchmark, found.layout, items)
    if not any(how.counts(item) for item in given):
        raise NothingToScore(f"{benchmark}: none of the {len(given)} items counts in mode {mode!r}")
    return how, given


def scored_together(benchmark: str, mode: Mode = "paper") -> str:
    """Names what a benchmark's score counts where items are scored together, as MMVP's `pairs`.

    `Score.num_groups` is how many. Empty where each item counts for itself.
    """
    found = _BENCHMARKS.get(benchmark)
    if found is None:
        return ""
    return _TOGETHER.get((found.paper if mode == "paper" else found.corrected).total, "")


def check_items(benchmark: str, items: Iterable[Mapping[str, Any]]) -> None:
    """Refuses items that `score` would refuse, for use before a model has answered any.

    Raises:
        BadItem: As `score`, which also refuses groups that are too large.
    """
    read_items(benchmark, _BENCHMARKS[benchmark].layout, items)


def average(values: Mapping[str, float | Score]) -> float:
    """Computes the mean over the 16 benchmarks, of which MME-P enters as a twentieth.

    Args:
        values: A score, or its value, for each of `BENCHMARKS`.

    Returns:
        The mean in per cent.

    Raises:
        UnknownName: A name is no benchmark's.
        MissingInput: A benchmark is absent.
        DataError: A value is no finite number within its scale.

    Source: the column "Average" of arXiv 2511.17886, tables 1 and 2, all 46 rows.
    """
    for name in values:
        if name not in BENCHMARKS:
            raise unknown_name("benchmark", name, BENCHMARKS)
    if missing := [name for name in BENCHMARKS if name not in values]:
        raise MissingInput(f"the average needs all 16 benchmarks; missing: {', '.join(missing)}")
    return math.fsum(_per_cent(name, values[name]) for name in BENCHMARKS) / len(BENCHMARKS)


def _per_cent(name: str, value: float | Score) -> float:
    """Brings a benchmark's value to per cent."""
    found = value.value if isinstance(value, Score) else value
    maximum = MME_MAXIMUM if name == "mme_p" else totals.PERCENT
    number = isinstance(found, Real) and not isinstance(found, bool)
    if not number or not 0 <= found <= maximum:  # NaN is not within either
        raise DataError(f"{name}: {found!r} is no score; expected a number from 0 to {maximum:g}")
    return float(found) * totals.PERCENT / maximum
