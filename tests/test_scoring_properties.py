"""What holds of every score: order, groups, floors and ceilings, errors, the paper's averages."""

from __future__ import annotations

import csv
import math
from importlib.resources import files
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdscale.core.types import ConfigError, DataError, MissingInput, UnknownName
from kdscale.eval import BENCHMARKS, BadItem, NothingToScore, Score, average, difference, score
from kdscale.eval.scores import PERCEPTION

OPTIONS = ["red", "blue", "green", "yellow"]
CATEGORIES = sorted(PERCEPTION)
GOLDS: dict[str, list[Any]] = {
    "gqa": ["dog", "cat"],
    "mmmu": ["5", ["3", "7.5"]],
    "mathvista": ["5", "7.5"],
    "chartqa": ["5", "blue"],
    "ocrbench": [["12", "twelve"], ["stop"]],
    "textvqa": [["stop"] * 10, ["go"] * 10],
    "docvqa": [["a stop", "stop"], ["12"]],
    "realworldqa": ["A", "Left"],
}
TYPES = {"mmmu": "open", "mathvista": "free_form"}
GROUP_SIZE = {"mme_p": 2, "mmvp": 2, "mmbench": 4}
modes = st.sampled_from(["paper", "corrected"])
quick = settings(max_examples=50, deadline=None)


@quick
@given(st.sampled_from(BENCHMARKS), modes, st.lists(st.tuples(st.booleans(), st.booleans())))
def test_a_difference_is_that_of_the_scores(
    benchmark: str, mode: Any, rights: list[tuple[bool, bool]]
) -> None:
    both = [[*pair] for pair in zip(*(rights * 4 or [(True, False)] * 4), strict=True)]
    first, second = (build(benchmark, each) for each in both)
    one, other = (score(benchmark, items, mode) for items in (first, second))
    found = difference(benchmark, first, second[::-1], mode)
    assert found.value == pytest.approx(one.value - other.value)
    assert found.num_groups == one.num_groups
    low, high = difference(benchmark, second, first, mode).interval
    assert found.interval == pytest.approx((-high, -low))
    assert difference(benchmark, first, first, mode).interval == (0, 0)


def test_what_is_hard_for_both_cancels_out() -> None:
    rights = [number % 2 == 0 for number in range(80)]
    first = build("gqa", [right or number < 12 for number, right in enumerate(rights)])
    second = build("gqa", rights)
    one, other = score("gqa", first), score("gqa", second)
    assert one.interval[0] < other.interval[1]  # as two independent scores they overlap
    assert difference("gqa", first, second).interval[0] > 0
    with pytest.raises(DataError, match="gqa: the two sets of answers are not to the same"):
        difference("gqa", first, second[:-1])
    with pytest.raises(DataError, match="not to the same questions"):
        difference("gqa", first, [*second[:-1], second[-1] | {"gold": "fish"}])


def build(benchmark: str, rights: list[bool]) -> list[dict[str, Any]]:
    """A benchmark's items with whole groups, each answered rightly or not."""
    return [_row(benchmark, number, right) for number, right in enumerate(rights)]


def _row(benchmark: str, number: int, right: bool) -> dict[str, Any]:
    """One item; wrong outputs are wrong under every rule."""
    options: list[str] = []
    if benchmark == "mme_p":
        gold = ("Yes", "No")[number % 2]
        prediction = gold if right else "perhaps"
    elif benchmark in GOLDS:
        gold = GOLDS[benchmark][number % 2]
        prediction = (gold if isinstance(gold, str) else gold[0]) if right else "#wrong#"
        if isinstance(gold, list) and benchmark == "mmmu" and right:
            prediction = str(gold)  # only this is right in `paper`, and only "3" in `corrected`
    else:
        options = OPTIONS[:2] if benchmark == "mmvp" else OPTIONS
        place = number % len(options)
        gold, prediction = "ABCD"[place], "ABCD"[place] if right else "#wrong#"
    return {
        "item_id": str(number),
        "prediction": prediction,
        "gold": gold,
        "options": options,
        "question_type": TYPES.get(benchmark, ""),
        "category": CATEGORIES[number // 2 % 10] if benchmark == "mme_p" else "",
        "group": f"g{number // GROUP_SIZE.get(benchmark, 3)}",
        "image_sha256": f"{number // 5:x}",
    }


@quick
@given(st.sampled_from(BENCHMARKS), modes, st.lists(st.booleans(), min_size=1), st.randoms())
def test_order_does_not_matter(benchmark, mode, rights, random) -> None:
    items = build(benchmark, rights)
    found = score(benchmark, items, mode)
    order = random.sample(range(len(items)), len(items))
    shuffled = score(benchmark, [items[i] for i in order], mode)
    assert shuffled.item_scores == tuple(found.item_scores[i] for i in order)
    low, high = found.interval
    assert low <= found.value + 1e-9
    assert found.value <= high + 1e-9
    for field in ("value", "n", "num_groups", "chance", "constant_share", "interval"):
        assert getattr(shuffled, field) == getattr(found, field)


@quick
@given(st.sampled_from(["mmvp", "mmbench"]), st.lists(st.booleans(), min_size=4))
def test_groups_count_only_as_wholes(benchmark, rights) -> None:
    found = score(benchmark, build(benchmark, rights), "corrected")
    size = GROUP_SIZE[benchmark]
    groups = [rights[start : start + size] for start in range(0, len(rights), size)]
    whole = sum(map(all, groups))
    assert found.value == pytest.approx(100 * whole / len(groups))
    if len(rights) % size == 0:  # a group that lacks rows weighs as much as a whole one
        assert found.value <= 100 * sum(found.item_scores) / len(found.item_scores) + 1e-9


@quick
@given(st.sampled_from(BENCHMARKS), st.lists(st.booleans(), min_size=1), st.booleans())
def test_a_wrong_item_never_helps(benchmark, rights, joins) -> None:
    items = build(benchmark, rights)
    before = score(benchmark, items, "corrected").value
    wrong = _row(benchmark, len(rights), right=False)
    if not joins:
        wrong["group"] = "another"
    if benchmark == "mme_p":  # a category that was there before; a new one would add to the sum
        wrong["category"] = items[-1]["category"]
        wrong["group"] = "another"
    assert score(benchmark, [*items, wrong], "corrected").value <= before + 1e-9


@pytest.mark.parametrize("mode", ["paper", "corrected"])
@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_oracle_scores_the_maximum(benchmark: str, mode: Any) -> None:
    items = build(benchmark, [True] * 40)
    if benchmark == "mmmu":
        items = [row | {"gold": "5", "prediction": "5"} for row in items]
    found = score(benchmark, items, mode)
    assert found.value == (2000 if benchmark == "mme_p" else 100)
    assert found.unparsed_share == 0
    assert found.interval == (found.value, found.value)


@pytest.mark.parametrize("mode", ["paper", "corrected"])
def test_constant_answers_reproduce_the_floors(mode: Any) -> None:
    yes = score("mme_p", [r | {"prediction": "Yes"} for r in build("mme_p", [True] * 40)], mode)
    assert (yes.value, yes.chance, yes.constant_share, yes.num_groups) == (500, 750, 1, 20)
    a = [r | {"prediction": "A"} for r in build("seedbench", [True] * 40)]
    assert score("seedbench", a, mode).value == score("seedbench", a, mode).chance == 25
    pairs = [r | {"prediction": "A"} for r in build("mmvp", [True] * 40)]
    assert score("mmvp", pairs, mode).value == 0
    silent = score("gqa", [r | {"prediction": ""} for r in build("gqa", [True] * 4)], mode)
    assert (silent.value, silent.chance, silent.unparsed_share) == (0, 0, 1)


def test_interval_is_wider_where_items_move_together() -> None:
    rights = [place // 10 % 2 == 0 for place in range(400)]
    items = build("gqa", rights)
    alone = score("gqa", [row | {"group": row["item_id"]} for row in items]).interval
    together = score("gqa", [row | {"group": f"{int(row['item_id']) // 10}"} for row in items])
    assert together.num_groups == 40
    assert together.interval[1] - together.interval[0] > 2 * (alone[1] - alone[0])
    expected = 2 * 1.96 * 50 / math.sqrt(400)
    assert alone[1] - alone[0] == pytest.approx(expected, rel=0.15)


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("seedbench", {"gold": "E"}, "none of the 4 options"),
    ("seedbench", {"gold": "blue"}, "none of the options"),
    ("seedbench", {"gold": ["A", "B"]}, "2 golds"),
    ("seedbench", {"gold": None}, "list of strings"),
    ("seedbench", {"options": [""]}, "every option is blank"),
    ("seedbench", {"options": "ABCD"}, "list of strings"),
    ("mmbench", {"options": ["nan"]}, "every option is blank|none of the"),
    ("mmbench", {"options": ["red", "nan"]}, "none of the 1 options"),
    ("ai2d", {"gold": "4"}, "none of the 4 options"),
    *[("ai2d", {"gold": bad}, "list of strings|none of the") for bad in (4, 2.5, True, "2.5", -1)],
    *[("scienceqa", {"gold": bad}, "list of strings|none of the") for bad in (2.5, True, np.True_)],
    ("seedbench", {"gold": 1}, "none of the options"),
    ("seedbench", {"gold": "B", "options": ["red", " "]}, "not there"),
    ("mathvista", {"question_type": "multi_choice", "gold": "red"}, "none of the options"),
    ("gqa", {"gold": ""}, "empty"),
    ("gqa", {"gold": math.nan}, "list of strings"),
    ("gqa", {"prediction": math.nan}, "not a string"),
    ("gqa", {"prediction": None}, "not a string"),
    ("gqa", {"options": [1]}, "list of strings"),
    ("ocrbench", {"gold": ["stop", " "]}, "empty"),
    ("ocrbench", {"gold": []}, "0 golds"),
    ("ocrbench", {"question_type": "formula"}, "question_type"),
    ("mmmu", {"gold": "['', '3']"}, "empty"),
    ("textvqa", {"gold": ["stop"] * 9}, "9 golds"),
    ("textvqa", {"gold": [" "] * 10}, "empty"),
    ("mmmu", {"question_type": "multi_choice"}, "question_type"),
    ("mathvista", {"question_type": "multiple-choice"}, "question_type"),
    ("mathvista", {"question_type": ""}, "question_type"),
    ("mme_p", {"category": "ocr"}, "category"),
    ("mme_p", {"gold": "maybe"}, "neither Yes nor No"),
    *[("gqa", {"item_id": bad}, "not a string") for bad in (None, 3.0, True, 10**5000)],
    ("gqa", {"group": 1.5}, "not a string"),
    *[("gqa", {"item_id": bad}, "row number") for bad in ("x", -1, "-1", "1.0", "٣", "9" * 5000)],
]


@pytest.mark.parametrize(("benchmark", "change", "message"), BAD)
@pytest.mark.parametrize("mode", ["paper", "corrected"])
def test_malformed_items_are_named(benchmark, change, message, mode) -> None:
    items = build(benchmark, [True] * 4)
    items[3] |= change
    with pytest.raises(BadItem, match=message) as caught:
        score(benchmark, items, mode)
    assert str(caught.value).startswith(f"{benchmark} item ")


def test_items_that_do_not_fit_together_are_named() -> None:
    items = build("mmvp", [True] * 4)
    with pytest.raises(BadItem, match="mmvp item 2: the id occurs twice"):
        score("mmvp", [*items, items[2] | {"item_id": "02"}])
    with pytest.raises(BadItem, match="mmvp item 2: is the third"):
        score("mmvp", [row | {"group": "x"} for row in items], "corrected")
    with pytest.raises(BadItem, match="mmvp item 0: has no group"):
        score("mmvp", [row | {"group": ""} for row in items], "corrected")
    with pytest.raises(BadItem, match="mmvp item number 0 of the input: has no item_id"):
        score("mmvp", [{}])


def test_nothing_to_score_is_named() -> None:
    text_only = [row | {"image_sha256": ""} for row in build("scienceqa", [True])]
    with pytest.raises(NothingToScore, match="scienceqa: none of the 1 items"):
        score("scienceqa", text_only, "corrected")
    cognition = [row | {"category": "code_reasoning"} for row in build("mme_p", [True] * 2)]
    for items in ([], cognition):
        with pytest.raises(NothingToScore):
            score("mme_p", items)
    with pytest.raises(UnknownName, match="seedbench"):
        score("seed_bench", [])
    with pytest.raises(ConfigError, match="mode"):
        score("gqa", build("gqa", [True]), "loose")  # pyright: ignore[reportArgumentType]


def paper_rows() -> list[dict[str, str]]:
    """The rows of the paper's tables 1 and 2."""
    folder = files("kdscale.sweep") / "paper"
    tables = [(folder / name).read_text().splitlines() for name in ("table1.csv", "table2.csv")]
    return [row for table in tables for row in csv.DictReader(table)]


def test_average_reproduces_every_printed_one() -> None:
    rows = paper_rows()
    assert len(rows) == 46
    for row in rows:
        found = average({name: float(row[name]) for name in BENCHMARKS})
        assert found == pytest.approx(float(row["average"]), abs=0.006)


def test_average_refuses_what_it_cannot_mean() -> None:
    values: dict[str, Any] = dict.fromkeys(BENCHMARKS, 50.0)
    values["mme_p"] = score("mme_p", build("mme_p", [True] * 20))
    assert isinstance(values["mme_p"], Score)
    assert average(values) == pytest.approx((15 * 50 + 100) / 16)
    with pytest.raises(MissingInput, match="gqa"):
        average({name: v for name, v in values.items() if name != "gqa"})
    with pytest.raises(UnknownName, match="vqav2"):
        average(values | {"vqav2": 1.0})
    for bad in (math.nan, math.inf, -0.1, 100.1, "50", True, None):
        with pytest.raises(DataError, match="gqa"):
            average(values | {"gqa": bad})
