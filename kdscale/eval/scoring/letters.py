"""Multiple choice: reads the option that an output names.

Paper rules: `eval/eval/*/*_test.py` of Cambrian-1 at 539ffc3 (2024-10-30), oddities included.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from kdscale.eval.scoring.forms import MARKER, after_markers, folded, narrow
from kdscale.eval.scoring.items import Item, Rule, Verdict

_EDGE = r"[\s()\[\]{}<>.,:;!?'\"`*_]*"
_WHOLE = re.compile(rf"{_EDGE}([A-Za-z]){_EDGE}")
_LEADING = re.compile(r"[\s(\[*]*([A-Za-z])\**[.):,]")
_MARKED = re.compile(MARKER.pattern + r"[\s(\[*'\"`]*+([A-Za-z])(?!\w|['’-]\w)(\s*+)(.?)")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def first_letter(text: str, stops: str) -> str:
    """Returns the first character of an answer, which Cambrian-1 takes for the option's letter.

    Args:
        text: The output.
        stops: Characters removed from its end.

    Returns:
        One character in lower case, or nothing; the first one of any word will do.
    """
    return _unbracketed(text, stops)[:1]


def first_letter_rule(stops: str) -> Rule:
    """Returns the rule that compares the first letter with the gold one."""

    def rule(item: Item) -> Verdict:
        """Judges an item."""
        found = first_letter(item.prediction, stops)
        return Verdict(float(found == _letter(item.places[-1])), found in _letters(item))

    return rule


def paper_ai2d(item: Item) -> Verdict:
    """Compares numbers: letters a-d become 0-3, any other character stays as it is."""
    found = first_letter(item.prediction, ".:,")
    number = str("abcd".index(found)) if found and found in "abcd" else found
    known = {str(place) for place in range(len(item.options) or 4)}
    return Verdict(float(number == str(item.places[-1])), number in known)


def paper_cvbench_3d(item: Item) -> Verdict:
    """Compares the first letter with the gold one and, in vain, with the option's whole text."""
    found = first_letter(item.prediction, ".:,")
    right = found == _letter(item.places[-1]) or found in _gold_text(item, item.options)
    return Verdict(float(right), right or found in _letters(item))


def paper_mmvp(item: Item) -> Verdict:
    """Compares the whole answer with letter and option text."""
    found = _unbracketed(item.prediction, ".:,")
    options = [option.lower() for option in item.options]
    right = found == _letter(item.places[-1]) or found in _gold_text(item, options)
    return Verdict(float(right), right or found in _letters(item) or found in options)


def paper_scienceqa(item: Item) -> Verdict:
    """Compares what precedes the first full stop with the letter, or all with the option text."""
    found = after_markers(item.prediction).rstrip(".")
    options = [_without_punctuation(option) for option in item.options]
    letter, text = found.split(".")[0], _without_punctuation(found)
    right = letter == _letter(item.places[-1]) or text in _gold_text(item, options)
    return Verdict(float(right), right or letter in _letters(item) or text in options)


def corrected_letter(item: Item) -> Verdict:
    """Reads the option by `read_option` and compares it with the gold one."""
    place = read_option(item.prediction, item.options)
    return Verdict(float(place in item.places), place is not None)


def read_option(text: str, options: tuple[str, ...]) -> int | None:
    """Reads which option an output names.

    In this order: the whole output is a letter with brackets or punctuation; a leading letter is
    followed by one of `. ) : ,`; a marker ("answer is", "answer:", with or without colon) precedes
    a letter, the last one counts; the output equals exactly one option text.

    Args:
        text: The output.
        options: Option texts, an absent one empty; none where they are unknown, and every letter
            may be one.

    Returns:
        The option, counted from 0, None where none can be read.
    """
    text = narrow(text).strip()
    found = _WHOLE.fullmatch(text) or _LEADING.match(text)
    letters = [found[1]] if found else []
    letters += [m[1] for m in reversed([*_MARKED.finditer(text)]) if _stands_alone(m, text)]
    for letter in letters:
        place = ord(letter.lower()) - ord("a")
        if not options or (place < len(options) and options[place]):
            return place
    return _equal_option(text, options)


def _stands_alone(match: re.Match[str], text: str) -> bool:
    """Tells a letter from a word of one: "is a dog" and "is I think" name no option."""
    ends = not match[3] or match[3] in ".):,;!?]}*'\"`\n" or "\n" in match[2]
    return ends or match[1] not in "aAiI" or (match[1] == "A" and not text.isupper())


def _equal_option(text: str, options: tuple[str, ...]) -> int | None:
    """Returns the only option that a text equals, literally or else without its edges."""
    for form in (folded, _bare):
        equal = [place for place, option in enumerate(options) if form(option) == form(text)]
        if len(equal) == 1 and form(text):
            return equal[0]
    return None


def _bare(text: str) -> str:
    """Without brackets, quotes, emphasis and final punctuation; a sign or decimal point stays."""
    return folded(text).lstrip("([{\"'`*_ ").rstrip(")]}\"'`*_.,:;!? ")


def _unbracketed(text: str, stops: str) -> str:
    """An answer without final stops and brackets."""
    return after_markers(text).rstrip(stops).lstrip("(").rstrip(")")


def _without_punctuation(text: str) -> str:
    """A sentence without ASCII punctuation."""
    return text.lower().strip().translate(_NO_PUNCTUATION).strip()


def _letter(place: int) -> str:
    """The letter of an option."""
    return chr(ord("a") + place)


def _letters(item: Item) -> set[str]:
    """The letters that an item's options have."""
    texts = item.options or ("unknown",) * 26
    return {_letter(place) for place, text in enumerate(texts) if text}


def _gold_text(item: Item, options: Sequence[str]) -> Sequence[str]:
    """The gold option's text, if texts are known."""
    return options[item.places[-1] :][:1]
