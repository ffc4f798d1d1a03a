"""The words of the benchmarks' prompts: bodies, options and suffixes, as Cambrian-1 asks them.

The suffixes and the layout of the options are those of Cambrian-1's evaluation scripts (`eval/` at
539ffc3, 2024-10-30). A prompt is a body, a line break and a suffix; the image stands before it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from string import ascii_uppercase as LETTERS
from typing import Literal

Mode = Literal["paper", "corrected"]

WORD = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
ONLY_LETTER = "Please answer directly with only the letter of the correct option and nothing else."
SHORT = "Give the short answer directly."
NUMBER = "Answer the question using a single number or phrase."
REASONING = "First show your reasoning process and then give the final answer."

_IMAGE_TAG = re.compile(r"<image \d+>")
_SINGLE_QUOTED = re.compile(r"'(.*?)'")
_LISTED = re.compile(r"^([A-Z])\. (.*)$", re.MULTILINE)
_ROUND = re.compile(r"\s*\(a\)(.*?)\(b\)(.*)", re.DOTALL)


def with_options(question: str, options: Sequence[str | None], heading: str = " Options:") -> str:
    """Lists options below a question, a letter and a line each.

    Args:
        question: What is asked.
        options: The options' texts in order; None is left out, and takes its letter with it.
        heading: Stands between question and options.
    """
    listed = zip(LETTERS, options, strict=False)
    lines = (f"\n{letter}. {text}" for letter, text in listed if text is not None)
    return question + heading + "".join(lines)


def with_ocr_tokens(question: str, tokens: Sequence[str]) -> str:
    """Adds the words that an OCR engine found in the image, as for TextVQA."""
    return f"{question}\nReference OCR tokens:" + (f" {', '.join(tokens)}" if tokens else "")


def with_two_options(question: str, options: str) -> str | None:
    """Lists MMVP's options below a question.

    Args:
        question: What is asked.
        options: "(a) x (b) y"

    Returns:
        The body, None where the options have another form.
    """
    found = _ROUND.fullmatch(options)
    if found is None:
        return None
    return f"{question} Options:\nA.{found[1].rstrip()}\nB. {found[2].strip()}"


def two_options(options: str) -> tuple[str, ...]:
    """Splits MMVP's "(a) x (b) y"; empty where the options have another form."""
    found = _ROUND.fullmatch(options)
    return () if found is None else (found[1].strip(), found[2].strip())


def without_image_tags(text: str) -> str:
    """Removes MMMU's `<image 1>`; blanks around a tag stay, as in the reference."""
    return _IMAGE_TAG.sub("", text)


def quoted_list(text: str) -> tuple[str, ...] | None:
    """Reads a Python list of texts that a data set stores as its repr; None where it is none."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None
    if not isinstance(value, list):
        return None
    return tuple(map(str, value))


def single_quoted(text: str) -> tuple[str, ...]:
    """Reads options as the reference does: whatever stands between single quotes.

    An option that Python wrote with double quotes, having an apostrophe in it, is lost, and what
    lies between two apostrophes becomes an option.
    """
    return tuple(_SINGLE_QUOTED.findall(text))


def listed_options(text: str) -> tuple[str, ...]:
    """Finds options that a question lists itself, as "A. x" on lines of their own."""
    found = _LISTED.findall(text)
    letters = "".join(letter for letter, _ in found)
    return tuple(option.strip() for _, option in found) if LETTERS.startswith(letters) else ()
