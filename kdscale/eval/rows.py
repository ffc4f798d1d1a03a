"""What a row of each benchmark's data set asks: one function a benchmark.

Golds of multiple choice are capital letters, whether the data set stores "(a)", 2 or "A"; but
MathVista's are the option's text. The two modes differ only where a function says so.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from kdscale.core.types import DataError
from kdscale.eval import prompts
from kdscale.eval.images import StoredImage, encoded
from kdscale.eval.prompts import LETTERS, Mode
from kdscale.eval.scoring.items import ABSENT

Row = Mapping[str, Any]
NUM_TEXTVQA_GOLDS = 10
MMBENCH_ROTATION_STEP = 1_000_000
# Golds that MMVP's file swaps within two pairs, by its own index: what the images show (MMVP's
# issue 30, corrected by lmms-eval as well).
MMVP_CORRECTIONS = {99: "short tusks", 100: "long tusks", 279: "sitting", 280: "standing"}


class BadRow(DataError):
    """A row that cannot be asked; the reader of the file adds which."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a row asks.

    Attributes:
        body: The prompt without its suffix.
        is_open: No options to choose from, in benchmarks that have both.
        image: Encoded, as stored; or where it is stored, if the reader of the file has checked it.

    The other fields are those of `kdscale.eval.questions.Question`.
    """

    body: str
    gold: str | tuple[str, ...]
    image: bytes | StoredImage | None
    is_open: bool = False
    options: tuple[str, ...] = ()
    question_type: str = ""
    category: str = ""
    group: str = ""


Reader = Callable[[Row, Mode], Asked | None]


def mme(row: Row, mode: Mode) -> Asked:
    """Reads a row of MME; both questions on an image are one group."""
    gold = _text(row, "answer")
    if gold.strip().lower() not in ("yes", "no"):
        raise BadRow(f"answer is {gold!r}, neither Yes nor No")
    return Asked(
        body=_text(row, "question"),
        gold=gold,
        image=_image(row),
        category=_text(row, "category"),
        group=_text(row, "question_id"),
    )


def mmbench(row: Row, mode: Mode) -> Asked:
    """Reads a row of MMBench; a question's rotations are one group.

    They share their index modulo a million, by which MMBench's own evaluation groups them, too.
    Options keep their columns' letters: one that is absent before another stays as "nan".
    """
    texts = [None if _is_nan(row[letter]) else str(row[letter]) for letter in "ABCD"]
    while texts and texts[-1] is None:
        texts.pop()
    options = tuple(ABSENT if text is None else text for text in texts)
    gold = _letter(row["answer"], options)
    if texts[LETTERS.index(gold)] is None:
        raise BadRow(f"answer {gold!r} is an option that is not there")
    hint = "" if _is_nan(row["hint"]) else f"{row['hint']}\n"
    return Asked(
        body=prompts.with_options(hint + _text(row, "question"), texts),
        gold=gold,
        image=_image(row),
        options=options,
        category=_label(row, "category"),
        group=str(_number(row, "index") % MMBENCH_ROTATION_STEP),
    )


def seedbench(row: Row, mode: Mode) -> Asked | None:
    """Reads a row of SEED-Bench; None for those with several images, which are videos."""
    images = row["image"]
    if isinstance(images, list) and len(images) > 1:
        return None
    if not isinstance(images, list) or not images:
        raise BadRow("image is missing")
    options = _options([row[f"choice_{letter}"] for letter in "abcd"], "choice_a to choice_d")
    return Asked(
        body=prompts.with_options(_text(row, "question"), options),
        gold=_letter(row["answer"], options),
        image=_image(row),
        options=options,
        category=_label(row, "question_type_id"),
    )


def gqa(row: Row, mode: Mode) -> Asked:
    """Reads a row of GQA's instructions, whose image the reader of the file has put in."""
    types = _struct(row, "types")
    return Asked(
        body=_text(row, "question"),
        gold=_text(row, "answer"),
        image=_image(row),
        question_type=_label(types, "semantic"),
        category=_label(types, "structural"),
    )


def scienceqa(row: Row, mode: Mode) -> Asked:
    """Reads a row of ScienceQA; half of its questions have no image."""
    options = _options(row["choices"], "choices")
    hint = row["hint"] or ""
    question = _text(row, "question")
    return Asked(
        body=prompts.with_options(f"{hint} {question}" if hint else question, options, ""),
        gold=_letter_at(_number(row, "answer"), options),
        image=None if row["image"] is None else _image(row),
        options=options,
        question_type="text" if row["image"] is None else "image",
        category=_label(row, "grade"),
    )


def mmmu(row: Row, mode: Mode) -> Asked:
    """Reads a row of MMMU, of whose images only the first is shown.

    `paper` prints the options that the reference's pattern finds, which loses some; `corrected`
    prints all. A gold that is a list stays as the file writes it; the scores take it apart.
    """
    question = prompts.without_image_tags(_text(row, "question"))
    kind, category = _text(row, "question_type"), _label(row, "id")
    shared = {
        "image": _image(row, "image_1"),
        "question_type": kind,
        "category": " ".join(category.split("_")[1:-1]),
    }
    if kind == "open":
        return Asked(body=question, gold=_text(row, "answer"), is_open=True, **shared)
    if kind != "multiple-choice":
        raise BadRow(f"question_type is {kind!r}, neither 'multiple-choice' nor 'open'")
    options = prompts.quoted_list(_text(row, "options"))
    if not options or not any(option.strip() for option in options):
        raise BadRow(f"options is no list of texts: {row['options']!r}")
    gold = _letter(row["answer"], options)
    printed = prompts.single_quoted(row["options"]) if mode == "paper" else options
    body = prompts.without_image_tags(prompts.with_options(question, printed))
    return Asked(body=body, gold=gold, options=options, **shared)


def mathvista(row: Row, mode: Mode) -> Asked:
    """Reads a row of MathVista, whose `query` brings its own hint and choices."""
    kind, gold = _text(row, "question_type"), _text(row, "answer")
    shared = {
        "body": _text(row, "query"),
        "image": _image(row, "decoded_image"),
        "question_type": kind,
        "category": _label(_struct(row, "metadata"), "category"),
    }
    if kind == "free_form":
        return Asked(gold=gold, is_open=True, **shared)
    if kind != "multi_choice":
        raise BadRow(f"question_type is {kind!r}, neither 'multi_choice' nor 'free_form'")
    options = _options(row["choices"], "choices")
    if gold not in options:
        raise BadRow(f"answer {gold!r} is none of the choices {list(options)}")
    return Asked(gold=gold, options=options, **shared)


def ai2d(row: Row, mode: Mode) -> Asked:
    """Reads a row of AI2D, whose answer is the option's index."""
    options = _options(row["options"], "options")
    return Asked(
        body=prompts.with_options(_text(row, "question"), options, ""),
        gold=_letter_at(_number(row, "answer"), options),
        image=_image(row),
        options=options,
    )


def chartqa(row: Row, mode: Mode) -> Asked:
    """Reads a row of ChartQA."""
    return Asked(
        body=_text(row, "question"),
        gold=_text(row, "answer"),
        image=_image(row),
        question_type=_label(row, "type"),
    )


def ocrbench(row: Row, mode: Mode) -> Asked:
    """Reads a row of OCRBench."""
    return Asked(
        body=_text(row, "question"),
        gold=_golds(row, "answer"),
        image=_image(row),
        question_type=_label(row, "question_type"),
        category=_label(row, "dataset"),
    )


def textvqa(row: Row, mode: Mode) -> Asked:
    """Reads a row of TextVQA, which ten people have answered."""
    golds = _texts(row["answers"], "answers")
    if len(golds) != NUM_TEXTVQA_GOLDS or not any(gold.strip() for gold in golds):
        raise BadRow(f"answers are not {NUM_TEXTVQA_GOLDS} golds: {list(golds)}")
    tokens = _texts(row["ocr_tokens"], "ocr_tokens", may_be_empty=True)
    return Asked(
        body=prompts.with_ocr_tokens(_text(row, "question"), tokens),
        gold=golds,
        image=_image(row),
    )


def docvqa(row: Row, mode: Mode) -> Asked:
    """Reads a row of DocVQA's validation split; those of the test split have no answers."""
    return Asked(
        body=_text(row, "question"),
        gold=_golds(row, "answers"),
        image=_image(row),
        question_type=", ".join(
            _texts(row.get("question_types"), "question_types", may_be_empty=True)
        ),
    )


def mmvp(row: Row, mode: Mode) -> Asked:
    """Reads a line of MMVP, whose image the reader of the file has put in.

    `paper` keeps the golds of the file; `corrected` sets the four that are swapped.
    """
    question, text = _text(row, "question"), _text(row, "options")
    body, options = prompts.with_two_options(question, text), prompts.two_options(text)
    if body is None:
        raise BadRow(f"options are not of the form '(a) x (b) y': {text!r}")
    gold, index = _letter(row["answer"], options), _number(row, "index")
    shown = [option.lower() for option in options]
    if mode == "corrected" and MMVP_CORRECTIONS.get(index) in shown:
        gold = LETTERS[shown.index(MMVP_CORRECTIONS[index])]
    return Asked(
        body=body,
        gold=gold,
        image=_image(row),
        options=options,
        group=str((index - 1) // 2),
    )


def realworldqa(row: Row, mode: Mode) -> Asked:
    """Reads a row of RealWorldQA, whose question says itself how to answer."""
    question, gold = _text(row, "question"), _text(row, "answer")
    options = prompts.listed_options(question)
    if gold.strip() not in LETTERS[: len(options)]:
        options = ()
    kind = "multiple-choice" if options else "open"
    return Asked(body=question, gold=gold, image=_image(row), options=options, question_type=kind)


def cvbench(row: Row, mode: Mode) -> Asked:
    """Reads a row of CV-Bench; the source tells ADE20K, COCO and Omni3D apart."""
    options = _options(row["choices"], "choices")
    return Asked(
        body=_text(row, "prompt"),
        gold=_letter(row["answer"], options),
        image=_image(row),
        options=options,
        question_type=_label(row, "task"),
        category=_label(row, "source"),
    )


def _text(row: Row, name: str) -> str:
    """A text that must not be empty."""
    value = row[name]
    if not isinstance(value, str) or not value.strip():
        raise BadRow(f"{name} is missing or empty")
    return value


def _label(row: Row, name: str) -> str:
    """What only tells rows apart; empty where it is absent."""
    value = row.get(name)
    return "" if value is None else str(value)


def _number(row: Row, name: str) -> int:
    """A whole number, also one that is stored as decimal digits or as 2.0."""
    value = row[name]
    if isinstance(value, str) and re.fullmatch(r"\s*-?[0-9]{1,18}\s*", value):
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or value % 1 != 0:
        raise BadRow(f"{name} is {value!r}, no whole number")
    return int(value)


def _struct(row: Row, name: str) -> Row:
    """Fields that a column groups; none where it is absent."""
    value = row.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise BadRow(f"{name} is no struct: {value!r}")
    return value or {}


def _is_nan(value: Any) -> bool:
    """Whether MMBench leaves a field out."""
    return value is None or value == "nan" or value != value


def _texts(values: Any, name: str, *, may_be_empty: bool = False) -> tuple[str, ...]:
    """A list of texts."""
    texts = [] if values is None else values
    is_list = isinstance(texts, list) and all(isinstance(text, str) for text in texts)
    if not is_list or not (texts or may_be_empty):
        raise BadRow(f"{name} is no list of texts: {values!r}")
    return tuple(texts)


def _options(values: Any, name: str) -> tuple[str, ...]:
    """Options to choose from, not all of them blank."""
    options = _texts(values, name)
    if not any(option.strip() for option in options):
        raise BadRow(f"{name} are all blank: {values!r}")
    return options


def _golds(row: Row, name: str) -> tuple[str, ...]:
    """Several accepted answers, none of them empty."""
    golds = _texts(row[name], name)
    if not all(gold.strip() for gold in golds):
        raise BadRow(f"{name} has an empty gold: {list(golds)}")
    return golds


def _letter(answer: Any, options: tuple[str, ...]) -> str:
    """The letter of a gold such as "B" or "(b)"."""
    letter = str(answer or "").strip().strip("()").upper()
    if len(letter) != 1 or letter not in LETTERS[: len(options)]:
        raise BadRow(f"answer {answer!r} is none of the {len(options)} options")
    return letter


def _letter_at(place: int, options: tuple[str, ...]) -> str:
    """The letter of an option's index."""
    if not 0 <= place < len(options):
        raise BadRow(f"answer {place} is none of the {len(options)} options")
    return LETTERS[place]


def checked_image(value: Any, name: str = "image") -> bytes:
    """The bytes of an image, whose header must be readable."""
    data = encoded(value)
    if not isinstance(data, bytes) or not data:
        raise BadRow(f"{name} is missing")
    try:
        Image.open(io.BytesIO(data))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadRow(f"{name} is no image: {error}") from error
    return data


def _image(row: Row, name: str = "image") -> bytes | StoredImage:
    """The image of a row, unless its file's reader has checked it already."""
    value = row[name]
    return value if isinstance(value, StoredImage) else checked_image(value, name)
