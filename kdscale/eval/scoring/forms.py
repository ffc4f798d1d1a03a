"""Forms of an answer that rules of several families compare."""

from __future__ import annotations

import re

MARKERS = ("answer is", "answer is:", "answer:")  # in this order, so the second never applies
MARKER = re.compile(r"(?i:answer(?:\s++is\s*+:?|\s*+:))")

_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: " "}


def after_markers(text: str) -> str:
    """Returns what follows the last of each marker, in lower case: Cambrian-1's way."""
    text = text.lower().strip()
    for marker in MARKERS:
        text = text.rpartition(marker)[2]
    return text.strip()


def after_marker(text: str) -> str:
    """Returns what follows the last marker, whose colon is optional; all where there is none."""
    return MARKER.split(text)[-1]


def narrow(text: str) -> str:
    """Returns a text with full-width letters, digits and signs in their ordinary form."""
    return text.translate(_FULL_WIDTH)


def folded(text: str) -> str:
    """Returns a text in lower case with one blank between words, full-width signs narrowed."""
    return " ".join(narrow(text).lower().split())
