"""Items as the rules read them: checked once, so that no rule meets a malformed one."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, NoReturn

import numpy as np

from kdscale.core.types import DataError

Mode = Literal["paper", "corrected"]
Kind = Literal["letter", "index", "option_text", "yes_no", "one", "several", "ten"]

CHOICES = ("letter", "index", "option_text")
ABSENT = "nan"  # in MMBench's columns: there is no such option; those after it keep their letters
_LARGEST = 10**40  # Python refuses to print integers of thousands of digits


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
        written: The gold as one text: a list as Python writes it.
        places: Options that are right, counted from 0; empty for open questions.
        options: Option texts in order, an absent one empty; none where they are unknown.
        num_options: How many there are to choose from, 0 where that is unknown.
        question_type: As the data set spells it.
        category: As the data set spells it.
        group: What must be right together, may be empty.
        image_sha256: Hash of the image, empty where there is none.
    """

    benchmark: str
    number: int
    prediction: str
    golds: tuple[str, ...]
    written: str
    places: tuple[int, ...]
    options: tuple[str, ...]
    num_options: int
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
        return len(self.places) / self.num_options if self.num_options else 0.0


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
        num_options: Options that the original has columns for; 0 where questions differ in number.
    """

    kind: Kind | Mapping[str, Kind]
    question_types: frozenset[str] = frozenset()
    categories: frozenset[str] = frozenset()
    num_options: int = 0


def read_items(benchmark: str, layout: Layout, raw: Iterable[Mapping[str, Any]]) -> list[Item]:
    """Checks items.

    Args:
        benchmark: Name of the benchmark, for errors.
        layout: What its items may hold.
        raw: Mappings with `item_id`, `prediction` and `gold`; `options`, `question_type`,
            `category`, `group` and `image_sha256` are empty unless given, or where None.
            Integers stand for their decimal digits.

    Returns:
        The items in the order given.

    Raises:
        NothingToScore: There is none.
        BadItem: One is malformed, or two have the same id.
    """
    items = [_Reader(benchmark, row, place).item(layout) for place, row in enumerate(raw)]
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
        """Returns a field that must be a string or an integer."""
        if required and field not in self.raw:
            self.fail(f"has no {field}")
        value = _plain(self.raw.get(field))
        if value is None and not required:
            return ""
        text = _digits(value)
        if text is None:
            self.fail(f"{field} is a {type(value).__name__} ({_shown(value, 40)}), not a string")
        return text

    def options(self) -> tuple[str, ...]:
        """Returns the option texts; MMBench's absent ones are empty, or left out at the end."""
        value = _plain(self.raw.get("options"))
        given = () if value is None else value
        if not isinstance(given, (list, tuple)):
            self.fail(f"options must be a list of strings, not {_shown(value, 80)}")
        options = list(given)
        if self.benchmark == "mmbench":
            options = ["" if _is_absent(option) else option for option in options]
        if not all(isinstance(option, str) for option in options):
            self.fail(f"options must be a list of strings, not {_shown(value, 80)}")
        while self.benchmark == "mmbench" and options and not options[-1]:
            options.pop()
        if given and not any(option.strip() for option in options):
            self.fail(f"every option is blank: {_shown(value, 80)}")
        return tuple(options)

    def known(self, field: str, allowed: frozenset[str]) -> str:
        """Returns a field that must be one of the known words."""
        value = self.text(field)
        if allowed and value not in allowed:
            known = ", ".join(sorted(filter(None, allowed)))
            self.fail(f"unknown {field} {value[:80]!r}; known: {known}")
        return value

    def item(self, layout: Layout) -> Item:
        """Reads all fields."""
        question_type = self.known("question_type", layout.question_types)
        kind = layout.kind if isinstance(layout.kind, str) else layout.kind[question_type]
        options = self.options()
        golds, written = self.golds(kind)
        places = self.places(kind, golds[0], options) if kind in CHOICES else ()
        present = sum(bool(option.strip()) for option in options)
        return Item(
            benchmark=self.benchmark,
            number=self.number,
            prediction=self.text("prediction", required=True),
            golds=golds,
            written=written,
            places=places,
            options=options,
            num_options=(present or layout.num_options) if places else 0,
            question_type=question_type,
            category=self.known("category", layout.categories),
            group=self.text("group"),
            image_sha256=self.text("image_sha256"),
        )

    def golds(self, kind: Kind) -> tuple[tuple[str, ...], str]:
        """Reads the accepted answers, and how they are written as one text."""
        gold = _plain(self.raw.get("gold", ()))
        alone = _digits(gold)
        given = [alone] if alone is not None else gold
        if not isinstance(given, (list, tuple)):
            self.fail(f"gold must be a string or a list of strings, not {_shown(gold, 80)}")
        texts = [_digits(_plain(each)) for each in given]
        golds = tuple(text for text in texts if text is not None)
        if len(golds) < len(texts):
            self.fail(f"gold must be a list of strings, not {_shown(gold, 80)}")
        blank = [not each.strip() for each in (*golds, *listed(golds[0] if golds else ""))]
        if any(blank) and (kind != "ten" or all(blank)):  # one of ten people may say nothing
            self.fail("a gold is empty")
        wanted = {"several": max(1, len(golds)), "ten": 10}.get(kind, 1)
        if len(golds) != wanted:
            self.fail(f"has {len(golds)} golds; this benchmark has {wanted} per question")
        if kind == "yes_no" and golds[0].lower() not in ("yes", "no"):
            self.fail(f"gold {golds[0]!r} is neither Yes nor No")
        return golds, golds[0] if len(golds) == 1 else str([_plain(each) for each in given])

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
        if options and not options[place].strip():
            self.fail(f"gold {gold!r} is an option that is not there")
        return (place,)


def _plain(value: Any) -> Any:
    """Returns NumPy's scalars and arrays as Python's own; everything else as it is."""
    return value.tolist() if isinstance(value, (np.generic, np.ndarray)) else value


def _is_absent(option: Any) -> bool:
    """Whether MMBench has no such option, in its own spelling or as pandas reads that."""
    return option is None or (isinstance(option, str | float) and str(option) == ABSENT)


def _digits(value: Any) -> str | None:
    """Returns a string as it is, an integer in decimal, None for anything else."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < _LARGEST:
        return str(value)
    return value if isinstance(value, str) else None


def _shown(value: Any, length: int) -> str:
    """The beginning of a value's text."""
    try:
        return str(value)[:length]
    except ValueError:  # an integer of thousands of digits
        return "an integer of many digits"


def listed(gold: str) -> tuple[str, ...]:
    """Returns the elements of a gold that is written as a Python list, else nothing."""
    if not re.fullmatch(r"\s*\[.*\]\s*", gold, re.DOTALL):
        return ()
    try:
        value = ast.literal_eval(gold.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return ()
    plain = isinstance(value, list) and all(type(each) in (str, int, float) for each in value)
    return tuple(map(str, value)) if plain else ()
