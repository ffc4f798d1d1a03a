"""Items as the rules read them: checked once, so that no rule meets a malformed one."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, NoReturn

from kdscale.core.types import DataError

Mode = Literal["paper", "corrected"]
Kind = Literal["letter", "index", "option_text", "yes_no", "one", "several", "ten"]

CHOICES = ("letter", "index", "option_text")
READ_OPTIONS = ("scienceqa", "mmvp", "cvbench_3d")  # their paper rules compare option texts


class BadItem(DataError):
    """An item that no rule can score: something in it is missing, malformed or contradictory."""


class NothingToScore(DataError):
    """No item at all, or none that counts in the mode."""


@dataclass(frozen=True)
class Item:
    """One answered question, checked.

    Attributes:
        benchmark: Name of the benchmark.
        number: The item's id, its row in the data set's file.
        prediction: The model's output.
        golds: Accepted answers, none of them blank; of ten people's, not all.
        places: Options that are right, counted from 0; empty for open questions.
        options: Option texts in order.
        question_type: As the data set spells it.
        category: As the data set spells it.
        group: What must be right together, may be empty.
        image_sha256: Hash of the image, empty where there is none.
    """

    benchmark: str
    number: int
    prediction: str
    golds: tuple[str, ...]
    places: tuple[int, ...]
    options: tuple[str, ...]
    question_type: str
    category: str
    group: str
    image_sha256: str

    @property
    def cluster(self) -> tuple[str, str]:
        """What the bootstrap draws as a whole: the group, else the image, else the item."""
        if self.group:
            return self.category if self.benchmark == "mme_p" else "", self.group
        return "\0", self.image_sha256 or str(self.number)

    @property
    def guess(self) -> float:
        """Probability that a uniform guess over the options is right, 0 for open questions."""
        return len(self.places) / len(self.options) if self.places and self.options else 0.0


class Verdict(NamedTuple):
    """What a rule says of an item.

    Attributes:
        score: In [0, 1].
        parsed: Whether an answer could be read at all; an unparsed one scores 0.
    """

    score: float
    parsed: bool


Rule = Callable[[Item], Verdict]


@dataclass(frozen=True)
class Layout:
    """What the fields of a benchmark's items may hold.

    Attributes:
        kind: How the gold is written; a mapping where it depends on the question type.
        question_types: Known question types; empty where they do not matter.
        categories: Known categories; empty where they do not matter.
    """

    kind: Kind | Mapping[str, Kind]
    question_types: frozenset[str] = frozenset()
    categories: frozenset[str] = frozenset()


def read_items(
    benchmark: str, layout: Layout, raw: Iterable[Mapping[str, Any]], mode: Mode
) -> list[Item]:
    """Checks items.

    Args:
        benchmark: Name of the benchmark, for errors.
        layout: What its items may hold.
        raw: Mappings with `item_id`, `prediction` and `gold`; `options`, `question_type`,
            `category`, `group` and `image_sha256` are empty unless given.
        mode: Scoring mode.

    Returns:
        The items in the order given.

    Raises:
        NothingToScore: There is none.
        BadItem: One is malformed, or two have the same id.
    """
    items = [_Reader(benchmark, row, place).item(layout, mode) for place, row in enumerate(raw)]
    if not items:
        raise NothingToScore(f"{benchmark}: no item to score")
    seen: set[int] = set()
    for item in items:
        if item.number in seen:
            refuse(item, "the id occurs twice; score each item once")
        seen.add(item.number)
    return items


def refuse(item: Item, why: str) -> NoReturn:
    """Raises `BadItem` for an item that was read, but does not fit with others."""
    raise BadItem(f"{item.benchmark} item {item.number}: {why}")


class _Reader:
    """Reads the fields of one item; every error names the benchmark and the item."""

    def __init__(self, benchmark: str, raw: Mapping[str, Any], place: int) -> None:
        self.benchmark, self.raw, self.name = benchmark, raw, f"number {place} of the input"
        if not isinstance(raw, Mapping):
            self.fail(f"is a {type(raw).__name__}, not a mapping")
        text = self.text("item_id", required=True)
        self.name = repr(text if len(text) <= 40 else text[:40] + "...")
        # 12 digits: no file has more rows, and int() refuses thousands of them with its own error
        if not re.fullmatch(r"[0-9]{1,12}", text):
            self.fail("item_id must be the row number in the data set's file, in decimal")
        self.number = int(text)

    def fail(self, why: str) -> NoReturn:
        """Raises the error."""
        raise BadItem(f"{self.benchmark} item {self.name}: {why}")

    def text(self, field: str, *, required: bool = False) -> str:
        """Returns a field that must be a string."""
        if required and field not in self.raw:
            self.fail(f"has no {field}")
        value = self.raw.get(field, "")
        if not isinstance(value, str):
            self.fail(f"{field} is a {type(value).__name__} ({str(value)[:40]}), not a string")
        return value

    def texts(self, field: str) -> tuple[str, ...]:
        """Returns a field that must be a list of strings."""
        value = self.raw.get(field, ())
        if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
            self.fail(f"{field} must be a list of strings, not {str(value)[:80]}")
        return tuple(value)

    def known(self, field: str, allowed: frozenset[str]) -> str:
        """Returns a field that must be one of the known words."""
        value = self.text(field)
        if allowed and value not in allowed:
            known = ", ".join(sorted(filter(None, allowed)))
            self.fail(f"unknown {field} {value[:80]!r}; known: {known}")
        return value

    def item(self, layout: Layout, mode: Mode) -> Item:
        """Reads all fields."""
        question_type = self.known("question_type", layout.question_types)
        kind = layout.kind if isinstance(layout.kind, str) else layout.kind[question_type]
        options = self.texts("options")
        if self.benchmark == "mmbench" and "nan" in options:
            self.fail("'nan' stands for an absent option; leave it out of options")
        golds = self.golds(kind)
        places = self.places(kind, golds[0], options) if kind in CHOICES else ()
        if places and not options and (mode == "corrected" or self.benchmark in READ_OPTIONS):
            self.fail("a multiple-choice item needs its options")
        return Item(
            benchmark=self.benchmark,
            number=self.number,
            prediction=self.text("prediction", required=True),
            golds=golds,
            places=places,
            options=options,
            question_type=question_type,
            category=self.known("category", layout.categories),
            group=self.text("group"),
            image_sha256=self.text("image_sha256"),
        )

    def golds(self, kind: Kind) -> tuple[str, ...]:
        """Reads the accepted answers."""
        gold = self.raw.get("gold")
        golds = (gold,) if isinstance(gold, str) else self.texts("gold")
        written = (*golds, *listed(golds[0] if golds else ""))
        blank = [not each.strip() for each in written]
        if any(blank) and (kind != "ten" or all(blank)):  # one of ten people may say nothing
            self.fail("a gold is empty")
        wanted = {"several": max(1, len(golds)), "ten": 10}.get(kind, 1)
        if len(golds) != wanted:
            self.fail(f"has {len(golds)} golds; this benchmark has {wanted} per question")
        if kind == "yes_no" and golds[0].lower() not in ("yes", "no"):
            self.fail(f"gold {golds[0]!r} is neither Yes nor No")
        return golds

    def places(self, kind: Kind, gold: str, options: tuple[str, ...]) -> tuple[int, ...]:
        """Finds the right options: by text, by number or by letter."""
        if kind == "option_text" and gold in options:
            return tuple(place for place, option in enumerate(options) if option == gold)
        if kind == "index" and re.fullmatch("[0-9]{1,2}", gold):
            place = int(gold)
        elif re.fullmatch(r"[A-Za-z]|\([A-Za-z]\)", gold):
            place = ord(gold.strip("()").lower()) - ord("a")
        else:
            self.fail(f"gold {gold[:40]!r} is none of the options")
        if options and place >= len(options):
            self.fail(f"gold {gold!r} is none of the {len(options)} options")
        return (place,)


def listed(gold: str) -> tuple[str, ...]:
    """Returns the elements of a gold that is written as a Python list of strings, else nothing."""
    if not re.fullmatch(r"\s*\[\s*['\"].*\]\s*", gold, re.DOTALL):
        return ()
    try:
        value = ast.literal_eval(gold.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return ()
    texts = isinstance(value, list) and all(isinstance(each, str) for each in value)
    return tuple(value) if texts else ()
