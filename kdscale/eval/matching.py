"""What counts as a right answer to a question of the miniature world; needs no model.

Benchmarks have rules of their own (`kdscale.eval.scoring`).
"""

from __future__ import annotations


def normalised(text: str) -> str:
    """Returns an answer without case, surrounding blanks and final full stop."""
    return text.strip().rstrip(".").strip().lower()


def is_right(prediction: str, gold: str) -> bool:
    """Tells whether an answer is the gold one; it must be the whole answer."""
    return normalised(prediction) == normalised(gold)
