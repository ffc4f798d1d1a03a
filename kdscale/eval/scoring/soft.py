"""Graded answers: the VQA soft score of TextVQA and the edit similarity of DocVQA."""

from __future__ import annotations

import re
from functools import lru_cache

from kdscale.eval.scoring.items import Item, Verdict

PAPER_STOPS = 32  # a regular expression's flag passed as the number of replacements

_DIGITS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4"}
_DIGITS |= {"five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
_ARTICLES = frozenset(("a", "an", "the"))
_MARKS = ';/[]"{}()=+\\_-><@`!'  # commas and question marks are gone before
_STOP = re.compile(r"\.(?!\d)")

# What a word becomes that lacks one of its apostrophes; an answer is in lower case by then, so
# forms with a capital I would never apply.
_APOSTROPHES = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
you've
"""
_CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _APOSTROPHES.split()
    for place, character in enumerate(word)
    if character == "'"
} | {"somebody'd": "somebodyd"}


def paper_textvqa(item: Item) -> Verdict:
    """The soft score over ten gold answers; at most 32 full stops are removed."""
    return _soft_score(item, PAPER_STOPS)


def corrected_textvqa(item: Item) -> Verdict:
    """The soft score over ten gold answers; all full stops are removed."""
    return _soft_score(item, 0)


def docvqa(item: Item) -> Verdict:
    """The best similarity to a gold answer (ANLS), both modes.

    Source: Biten et al. 2019, "Scene Text Visual Question Answering", equation 1, threshold 0.5.
    """
    found = item.prediction.lower().strip()
    score = max(_similarity(found, gold.lower().strip()) for gold in item.golds)
    return Verdict(score, bool(found))


@lru_cache(maxsize=1 << 16)
def normalise(text: str, stops: int) -> str:
    """Brings an answer to the form that the VQA evaluation compares.

    Args:
        text: An answer.
        stops: Largest number of full stops to remove, 0 for all; one before a digit stays.

    Returns:
        Lower case, without articles and most punctuation, zero to ten as digits.

    Source: EvalAI's answer processor as in MMF and Cambrian-1 (`m4c_evaluator.py`).
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    touching = {mark for mark in _MARKS if f"{mark} " in text or f" {mark}" in text}
    text = text.translate({ord(mark): "" if mark in touching else " " for mark in _MARKS})
    words = [_DIGITS.get(word, word) for word in _STOP.sub("", text, count=stops).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _soft_score(item: Item, stops: int) -> Verdict:
    """Mean over the golds of min(1, matches among the nine others / 3)."""
    found = normalise(item.prediction, stops)
    same = [normalise(gold, stops) == found for gold in item.golds]
    others = [sum(same) - own for own in same]
    score = sum(min(1.0, count / 3) for count in others) / len(others) if any(same) else 0.0
    return Verdict(score, bool(found) or score > 0)


def _similarity(first: str, second: str) -> float:
    """One minus edit distance over the longer length, 0 below one half; not both empty."""
    longer, shorter = max(len(first), len(second)), min(len(first), len(second))
    if 2 * shorter < longer:  # the distance is at least the difference of the lengths
        return 0.0
    similarity = 1 - edit_distance(first, second) / longer
    return similarity if similarity >= 0.5 else 0.0


def edit_distance(first: str, second: str) -> int:
    """Counts the insertions, deletions and replacements between two texts.

    One column of the dynamic program at a time, whose differences of -1, 0 and 1 are the bits of
    two integers, so that long outputs cost little.

    Source: Hyyrö 2003, "A Bit-Vector Algorithm for Computing Levenshtein and Damerau Edit
    Distances", after Myers 1999.
    """
    if not first:
        return len(second)
    at: dict[str, int] = {}
    for place, character in enumerate(first):
        at[character] = at.get(character, 0) | 1 << place
    mask, last = (1 << len(first)) - 1, 1 << (len(first) - 1)
    plus, minus, distance = mask, 0, len(first)
    for character in second:
        equal = at.get(character, 0)
        diagonal = (((equal & plus) + plus) ^ plus) | equal | minus
        up, down = minus | (mask & ~(diagonal | plus)), plus & diagonal
        distance += bool(up & last) - bool(down & last)
        up, down = ((up << 1) | 1) & mask, (down << 1) & mask
        plus, minus = down | (mask & ~(diagonal | up)), up & diagonal
    return distance
