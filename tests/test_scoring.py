"""Scoring rules case by case: what Cambrian-1 makes of an output, and what it should."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from kdscale.eval import BadItem, score

OPTIONS = ["red dog", "blue", "green", "yellow cat"]
FORMULA = "Handwritten Mathematical Expression Recognition"
DEFAULTS: dict[str, dict[str, Any]] = {
    "mme_p": {"category": "count"},
    "mmmu": {"question_type": "open"},
    "mathvista": {"question_type": "free_form"},
    "ocrbench": {"question_type": "Regular Text Recognition"},
    "mmvp": {"options": ["the Left", "right"]},
}


def item(benchmark: str, prediction: str, gold: Any, **fields: Any) -> dict[str, Any]:
    """An item of a benchmark with an ordinary layout."""
    letters = benchmark in ("mmbench", "seedbench", "scienceqa", "ai2d", "cvbench_2d", "cvbench_3d")
    base = {
        "item_id": "7",
        "prediction": prediction,
        "gold": gold,
        "options": OPTIONS if letters else [],
        "question_type": "",
        "category": "",
        "group": "g",
        "image_sha256": "f00",
    }
    return base | DEFAULTS.get(benchmark, {}) | fields


def scores(benchmark: str, prediction: str, gold: Any, **fields: Any) -> tuple[float, float]:
    """An item's score in both modes."""
    given = [item(benchmark, prediction, gold, **fields)]
    paper, corrected = (score(benchmark, given, mode) for mode in ("paper", "corrected"))
    return paper.item_scores[0], corrected.item_scores[0]


# (benchmark, output, gold, paper, corrected)
LETTERS = [
    *[("seedbench", text, "B", 1, 1) for text in ("B", "b", "(B)", "B.", "B. blue", "Answer: B")],
    ("seedbench", "**B**", "B", 0, 1),
    ("seedbench", "[B]", "B", 0, 1),
    ("seedbench", "（Ｂ）", "B", 0, 1),
    ("seedbench", "B:", "B", 1, 1),
    ("seedbench", "B is it", "B", 1, 0),
    ("seedbench", "The answer is B", "B", 1, 1),
    ("seedbench", "The answer is: B", "B", 0, 1),
    ("seedbench", "THE ANSWER IS: B.", "B", 0, 1),
    ("seedbench", "The answer is A. No, the answer is B", "B", 1, 1),
    ("seedbench", "The answer is B because it is", "B", 1, 1),
    ("seedbench", "The answer is a dog", "A", 1, 0),
    ("seedbench", "The answer is b because it is", "B", 1, 1),
    ("seedbench", "answer: d is right", "D", 1, 1),
    ("seedbench", "The answer is A because it is", "A", 1, 1),
    ("seedbench", "THE ANSWER IS A DOG", "A", 1, 0),
    ("seedbench", "The answer is d-shaped", "D", 1, 0),
    ("seedbench", "The answer is D'Artagnan", "D", 1, 0),
    ("seedbench", "A dog", "A", 1, 0),
    ("seedbench", "because", "B", 1, 0),
    ("seedbench", "Carnivores", "C", 1, 0),
    ("seedbench", "Blue.", "B", 1, 1),
    ("seedbench", "Red  Dog", "A", 0, 1),
    ("seedbench", "yellow cat", "D", 0, 1),
    ("seedbench", "E", "A", 0, 0),
    ("seedbench", "", "A", 0, 0),
    ("seedbench", "...", "A", 0, 0),
    ("mmbench", "(B):", "B", 1, 1),
    ("cvbench_2d", "(B):", "(B)", 1, 1),
    ("ai2d", "B", "1", 1, 1),
    ("ai2d", "1", "1", 1, 0),
    ("ai2d", "B", "B", 1, 1),
    ("scienceqa", "B", "B", 1, 1),
    ("scienceqa", "B", "1", 1, 1),
    ("scienceqa", "(B)", "B", 0, 1),
    ("scienceqa", "B)", "B", 0, 1),
    ("scienceqa", "B. blue", "B", 1, 1),
    ("scienceqa", "'Red dog!'", "A", 1, 1),
    ("scienceqa", "The answer is blue", "B", 1, 0),
    ("mmvp", "A", "(a)", 1, 1),
    ("mmvp", "(A)", "(a)", 1, 1),
    ("mmvp", "A. The left", "(a)", 0, 1),
    ("mmvp", "the left.", "(a)", 1, 1),
    ("cvbench_3d", "A", "(A)", 1, 1),
    ("cvbench_3d", "blue", "(B)", 1, 1),
    ("cvbench_3d", "red dog", "(A)", 0, 1),
]
NUMBERS = [
    ("chartqa", "105", "100", 1, 1),
    ("chartqa", "95", "100", 1, 1),
    ("chartqa", "105.00000000000001", "100", 0, 0),
    ("chartqa", "94.99999999999999", "100", 0, 0),
    ("chartqa", "0", "0", 1, 1),
    ("chartqa", "0.001", "0", 0, 0),
    ("chartqa", "-96", "-100", 1, 1),
    ("chartqa", "100", "-100", 0, 0),
    ("chartqa", "50%", "50", 0, 1),
    ("chartqa", "$50", "50", 0, 1),
    ("chartqa", "-€5", "-5", 0, 1),
    ("chartqa", "12 cm", "12", 0, 1),
    ("chartqa", "12 million", "12", 0, 0),
    ("chartqa", "12 million", "12 million", 1, 1),
    *[
        ("chartqa", f"12{scale}", "12", 0, 0)
        for scale in ("k", "K", "m", "M", "bn", "b", "t", " bn", " k", " M", "k people", "Million")
    ],
    ("chartqa", "$12 US$ million", "12", 0, 0),
    ("chartqa", "12k", "12K", 1, 1),
    *[
        ("mathvista", text, "30", 0, 1)
        for text in ("30°", "30 °", "30 °C", "30 degrees", "30 square meters", "30 sq ft", "30 m²")
    ],
    *[
        ("mathvista", text, "30", 0, 1)
        for text in ("30 sq. ft.", "30 miles per hour", "30 m", "30m/s", "30 K", "30 years old")
    ],
    *[("chartqa", text, "5", 0, 1) for text in ("USD 5", "US$5", "5 USD", "Rs. 5", "5 per cent")],
    ("chartqa", "USDA 5", "5", 0, 0),
    ("chartqa", "5 or so of them", "5", 0, 0),
    ("chartqa", "1,000", "1000", 0, 1),
    ("chartqa", "1e3", "1000", 1, 1),
    ("chartqa", "1_000", "1000", 1, 0),
    ("chartqa", "inf", "1000", 0, 0),
    ("chartqa", "nan", "nan", 0, 1),
    ("chartqa", "1e-999999999", "0", 1, 0),
    ("chartqa", "2010", "2000", 1, 0),
    ("chartqa", "2200", "2110", 1, 1),
    ("chartqa", "Blue", "blue", 1, 1),
    ("chartqa", "Blue.", "blue", 0, 1),
    ("chartqa", "[1, 2]", "[1, 2]", 1, 1),
    ("chartqa", "[2, 1]", "[1, 2]", 0, 0),
    ("chartqa", "1, 2", "[1, 2]", 0, 0),
    ("mathvista", "5", "5", 1, 1),
    ("mathvista", "5.0", "5", 1, 1),
    ("mathvista", "101", "100", 1, 0),
    ("mathvista", "1.25", "1.2", 1, 1),
    ("mathvista", "1.2627", "1.2", 1, 0),
    ("mathvista", "infinity", "5", 1, 0),
    ("mathvista", "9" * 5000, "5", 1, 0),
    ("mathvista", "1e999999999", "5", 1, 0),
    ("mathvista", "8/11", "8/11", 1, 1),
    ("mmmu", "the answer is 5.", "5", 1, 1),
    ("mmmu", "The answer is: 5", "5", 0, 1),
    ("mmmu", "24/7", ["24/7", "3.429"], 0, 1),
    ("mmmu", "3.5", ["24/7", "3.429"], 0, 1),
    ("mmmu", "24/7", "['24/7', '3.429']", 0, 1),
    ("mmmu", "['24/7', '3.429']", "['24/7', '3.429']", 1, 0),
    ("mmmu", "['24/7', '3.429']", ["24/7", "3.429"], 1, 0),
    ("mmmu", "['24/7', '3.429']", "['24/7','3.429']", 0, 0),
    ("mmmu", "7", "[5, 7]", 0, 1),
    ("mmmu", "7", [5, 7], 0, 1),
    ("mmmu", "[5, 7]", [5, 7], 1, 0),
    ("mmmu", "5", 5, 1, 1),
]
TEXTS = [
    ("mme_p", "Yes", "Yes", 1, 1),
    ("mme_p", "yes..", "Yes", 1, 1),
    ("mme_p", "Yes, it is", "Yes", 0, 1),
    ("mme_p", "Yes!", "Yes", 0, 1),
    ("mme_p", "Yes .", "Yes", 0, 1),
    ("mme_p", "y", "Yes", 0, 0),
    ("mme_p", "yesterday", "Yes", 0, 0),
    ("gqa", "Dog.", "dog", 1, 1),
    ("gqa", "the dog", "dog", 0, 1),
    ("gqa", "dog!", "dog", 0, 1),
    ("gqa", "T-shirt", "t-shirt", 1, 1),
    ("gqa", "dogs", "dog", 0, 0),
    ("gqa", "", "the", 0, 0),
    ("realworldqa", "Left", "Left", 1, 1),
    ("realworldqa", "left side.", "Left", 1, 1),
    ("realworldqa", "two lanes", "two lanes", 0, 1),
    ("realworldqa", "A. Left", "A", 0, 1),
    ("realworldqa", "(A)", "A", 0, 1),
    ("realworldqa", "Yes, it is", "Yes", 0, 1),
    ("realworldqa", "The answer is: no", "No", 0, 1),
    ("realworldqa", "", "A", 0, 0),
    ("ocrbench", "It says STOP\nnow", ["stop now"], 1, 1),
    ("ocrbench", "2012", ["12"], 1, 0),
    ("ocrbench", "12.5", ["12"], 1, 0),
    ("ocrbench", "($12)", ["12"], 1, 1),
    ("ocrbench", ".5", ["5"], 1, 0),
    ("ocrbench", "costs $.5", ["5"], 1, 0),
    ("ocrbench", "No.5", ["5"], 1, 1),
    ("ocrbench", "0.5", [".5"], 1, 0),
    ("ocrbench", "US$5", ["$5"], 1, 1),
    ("ocrbench", "$5.50", ["$5"], 1, 0),
    ("ocrbench", "50%off", ["50%"], 1, 1),
    ("ocrbench", "150%", ["50%"], 1, 0),
    ("ocrbench", "3-5", ["-5"], 1, 0),
    ("ocrbench", "stopping", ["stop"], 1, 0),
    ("ocrbench", "10.stop", ["stop"], 1, 1),
    ("ocrbench", "it is 3 or 12", ["99", "12"], 1, 1),
    ("ocrbench", "ＳＴＯＰ", ["stop"], 0, 1),
    ("docvqa", "ab", ["abcd"], 0.5, 0.5),
    ("docvqa", "abc", ["abcdefg"], 0, 0),
    ("docvqa", " ABCD ", ["zzz", "abcd"], 1, 1),
    ("docvqa", "a  b", ["a b"], 0.75, 0.75),
    ("docvqa", "", ["a"], 0, 0),
]


@pytest.mark.parametrize(
    ("benchmark", "output", "gold", "paper", "corrected"), LETTERS + NUMBERS + TEXTS
)
def test_rule(benchmark: str, output: str, gold: Any, paper: float, corrected: float) -> None:
    assert scores(benchmark, output, gold) == (paper, corrected)


@pytest.mark.parametrize(
    ("output", "gold", "paper", "corrected"),
    [
        ("B", "blue", 1, 1),
        ("b", "B", 1, 1),
        ("B.", "blue", 0, 1),
        ("(B)", "blue", 0, 1),
        ("8 + 3 = 11. So the answer is: B", "blue", 0, 1),
        ("blue", "blue", 0, 1),
    ],
)
def test_mathvista_choices(output: str, gold: str, paper: float, corrected: float) -> None:
    fields = {"question_type": "multi_choice", "options": OPTIONS}
    assert scores("mathvista", output, gold, **fields) == (paper, corrected)


def test_mmmu_choices() -> None:
    fields = {"question_type": "multiple-choice", "options": OPTIONS}
    assert scores("mmmu", "The answer is: B", "B", **fields) == (0, 1)
    assert scores("mmmu", "(B)", "B", **fields) == (1, 1)


@pytest.mark.parametrize(
    ("output", "gold", "right"),
    [("x ^ 2\n+ Y", "x^2+Y", 1), ("x^2 + y", "x^2+Y", 0), ("x^{22}", "x^{2", 1)],
)
def test_formulae_keep_case_and_lose_blanks(output: str, gold: str, right: float) -> None:
    assert scores("ocrbench", output, [gold], question_type=FORMULA) == (right, right)


@pytest.mark.parametrize(("matches", "expected"), enumerate((0.0, 0.3, 0.6, 0.9, 1.0)))
def test_soft_score_leaves_one_annotator_out(matches: int, expected: float) -> None:
    golds = ["Stop"] * matches + [f"other {place}" for place in range(10 - matches)]
    assert scores("textvqa", "stop", golds) == pytest.approx((expected, expected))


@pytest.mark.parametrize(
    ("output", "gold", "paper", "corrected"),
    [
        ("three.", "3", 1, 1),
        ("none", "0", 1, 1),
        ("eleven", "11", 0, 0),
        ("3.5", "35", 0, 0),
        ("$5", "5", 0, 0),
        ("dont", "don't", 1, 1),
        ("couldn'tve", "couldn't've", 1, 1),
        ("somebody'd", "somebodyd", 1, 1),
        ("The", "a", 1, 1),
        ("ice-cream", "ice cream", 1, 1),
        ("ice- cream", "ice cream", 1, 1),
        ("ice -cream", "icecream", 0, 0),
        ("1,000", "1000", 1, 1),
        ("a\tb\nc", "b c", 1, 1),
        ("x." * 33, "x" * 33, 0, 1),
        ("x." * 32, "x" * 32, 1, 1),
    ],
)
def test_soft_score_compares_normal_forms(
    output: str, gold: str, paper: float, corrected: float
) -> None:
    assert scores("textvqa", output, [gold] * 10) == (paper, corrected)


def mme(rows: list[tuple[str, str, bool]]) -> list[dict[str, Any]]:
    """Items (category, group, right) in the order of the file."""
    return [
        item("mme_p", "Yes" if right else "No", "Yes", item_id=str(i), category=c, group=g)
        for i, (c, g, right) in enumerate(rows)
    ]


def test_parity_is_the_papers_and_groups_are_corrected() -> None:
    half_then_full = mme([("OCR", g, right) for g, right in zip("aabb", (1, 0, 1, 1), strict=True)])
    assert score("mme_p", half_then_full).value == 100 * (3 / 4 + 2 / 4)
    crossed = mme([("OCR", g, right) for g, right in zip("abab", (1, 0, 1, 0), strict=True)])
    assert score("mme_p", crossed).value == 50
    assert score("mme_p", crossed, "corrected").value == 100
    shifted = mme([("color", "z", True), ("OCR", "a", True), ("OCR", "a", True)])
    assert score("mme_p", shifted).value == 100 * (1 + 1) + 100 * (1 + 1 / 2)
    assert score("mme_p", shifted, "corrected").value == 100 * (1 + 0) + 200


def test_cognition_is_left_out_but_keeps_its_place() -> None:
    rows = mme([("code_reasoning", "c", True), ("OCR", "a", True), ("OCR", "a", True)])
    found = score("mme_p", rows)
    assert (found.n, found.value, found.chance) == (2, 100 * (1 + 1 / 2), 75)
    assert found.item_scores == (1, 1, 1)


@pytest.mark.parametrize("rights", [(1, 0, 1, 1), (0, 1, 1, 1)])
def test_pairs_half_right_before_a_full_one(rights: tuple[int, ...]) -> None:
    rows = [
        item("mmvp", "A" if right else "B", "(a)", item_id=str(i), group=str(i // 2))
        for i, right in enumerate(rights)
    ]
    assert score("mmvp", rows).value == score("mmvp", rows, "corrected").value == 50
    assert score("mmvp", rows).chance == score("mmvp", rows, "corrected").chance == 25
    second = 100 * (rights[1] + 1) / 2  # of the first pair, as its only item that is given
    assert score("mmvp", rows[1:], "corrected").value == second
    assert score("mmvp", rows[1:], "corrected").chance == (50 + 25) / 2


@pytest.mark.parametrize("wrong", range(4))
def test_one_wrong_rotation_spoils_the_question(wrong: int) -> None:
    rows = [
        item("mmbench", letter, "A" if place == wrong else letter, item_id=str(place))
        for place, letter in enumerate("BCDB")
    ]
    assert score("mmbench", rows).value == 75
    found = score("mmbench", rows, "corrected")
    assert (found.value, found.num_groups, found.n) == (0, 1, 4)
    rest = [row for place, row in enumerate(rows) if place != wrong]
    alone = score("mmbench", rest, "corrected")  # a question has the rows that are given
    assert (alone.value, alone.chance) == (100, pytest.approx(100 / 4**3))
    assert found.chance == pytest.approx(100 / 4**4)
    bare = [row | {"image_sha256": ""} for row in rows]  # rotations are told by their index alone
    assert score("mmbench", bare, "corrected") == found
    with pytest.raises(BadItem, match="mmbench item 0: has no group"):
        score("mmbench", [row | {"group": ""} for row in bare], "corrected")


@pytest.mark.parametrize("mode", ["paper", "corrected"])
def test_absent_options_keep_their_letter(mode: Any) -> None:
    options = ["ice", "nan", "tea", "nan"]
    row = item("mmbench", "C", "C", options=options)
    found = score("mmbench", [row], mode)
    assert (found.value, found.chance, found.unparsed_share) == (100, 50, 0)
    for other, unparsed in (("A", 0), ("B", 1), ("D", 1), ("nan", 1)):
        found = score("mmbench", [row | {"prediction": other}], mode)
        assert (found.value, found.unparsed_share) == (0, unparsed)
    assert scores("mmbench", "tea", "C", options=options)[1] == 1
    with pytest.raises(BadItem, match="mmbench item '7': gold 'B' is an option that is not there"):
        score("mmbench", [row | {"gold": "B"}], mode)


@pytest.mark.parametrize("mode", ["paper", "corrected"])
def test_options_may_be_unknown(mode: Any) -> None:
    nine = item("seedbench", "Answer: I think so", "I", options=[])
    assert score("seedbench", [nine], "corrected").value == 0  # it is a word
    letters = {"mmbench": 4, "seedbench": 4, "ai2d": 4, "mmvp": 2, "cvbench_3d": 2}
    letters |= {"scienceqa": 0, "cvbench_2d": 0}  # whose originals differ from row to row
    for benchmark, number in letters.items():
        for none in ([], None):
            found = score(benchmark, [item(benchmark, "B", "B", options=none)], mode)
            assert (found.value, found.unparsed_share) == (100, 0)
            assert found.chance == (100 / number if number else 0)
    for benchmark, kind in (("mmmu", "multiple-choice"), ("mathvista", "multi_choice")):
        rows = [item(benchmark, "B", "B", question_type=kind)]
        assert (score(benchmark, rows, mode).value, score(benchmark, rows, mode).chance) == (100, 0)


@pytest.mark.parametrize("mode", ["paper", "corrected"])
def test_labels_as_data_sets_hold_them(mode: Any) -> None:
    bare: dict[str, Any] = {"category": None, "group": None, "image_sha256": "f", "options": None}
    for gold in (1, np.int64(1), np.str_("1"), "B"):
        for name in ("scienceqa", "ai2d"):
            assert (
                score(name, [item(name, "B", gold, item_id=np.int32(3)) | bare], mode).value == 100
            )
    words = [item("gqa", "5", 5, item_id=i, group=np.int64(i), category=i) for i in range(2)]
    assert (score("gqa", words, mode).value, score("gqa", words, mode).num_groups) == (100, 2)
    choices = np.array(OPTIONS, dtype=object)
    assert score("seedbench", [item("seedbench", "B", "B", options=choices)], mode).value == 100
    golds = np.array(["stop"] * 10, dtype=object)
    assert score("textvqa", [item("textvqa", "stop", golds)], mode).value == 100
    wide = [
        item("mmbench", "A", "A", item_id=i, question_type=5, category=5, group=9) for i in (1, 2)
    ]
    assert (score("mmbench", wide, mode).value, score("mmbench", wide, mode).num_groups) == (100, 1)


def test_scienceqa_counts_image_questions_when_corrected() -> None:
    rows = [
        item("scienceqa", "A", "A", item_id="1"),
        item("scienceqa", "A", "B", item_id="2", image_sha256=""),
    ]
    assert score("scienceqa", rows).value == 50
    found = score("scienceqa", rows, "corrected")
    assert (found.value, found.n, found.item_scores) == (100, 1, (1, 0))


def test_import_is_light() -> None:
    code = (
        "import sys, kdscale.eval; light = 'numpy' not in sys.modules; kdscale.eval.score;"
        "print(light, 'torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["True", "False"]
