"""Numbers: within five per cent, or exact.

Paper rules: `eval/eval/{chartqa,mathvista,mmmu}/*_test.py` of Cambrian-1 at 539ffc3.
"""

from __future__ import annotations

import math
import re

from kdscale.eval.scoring.forms import after_marker, after_markers, folded, narrow
from kdscale.eval.scoring.items import Item, Verdict, listed
from kdscale.eval.scoring.letters import corrected_letter, first_letter_rule

TOLERANCE = 0.05
YEAR = re.compile("19[0-9]{2}|20[0-9]{2}|2100")

_CURRENCY = r"(?:[a-z]{0,2}[$€£¥₹]|(?:usd|eur|gbp|jpy|cny|rmb|inr|chf|cad|aud|rs\.?)(?![^\W\d_]))"
_DIGITS = r"[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?|[0-9]+(?:\.[0-9]*)?|\.[0-9]+"
_SCALES = (
    "hundreds?|thousands?|millions?|billions?|trillions?|dozens?|lakhs?|crores?"
    "|mn|mln|mio|bn|bln|mrd|tn|trn"
)
# No magnitude follows. Single letters are magnitudes where they touch the number ("12k"); after a
# blank "m", "t", "K" and "T" are units.
_NO_SCALE = rf"(?!.*(?<![^\W\d_])(?i:{_SCALES})(?![^\W\d_])|\s*[kMbB](?![^\W\d_])|[KmtT](?!\S))"
_WORD = r"[^\W\d_][^\s\d]*[23]?"
_UNIT = (
    rf"(?:%|[°˚]\s*(?:{_WORD})?|per\s?cent"
    rf"|(?:(?:square|cubic|sq\.?|cu\.?) )?{_WORD}(?: per {_WORD}| old)?)"
)
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\s*(?i:{_CURRENCY})?\s*(?P<inner>[-+]?)(?P<size>{_DIGITS})"
    rf"(?P<power>[eE][-+]?[0-9]{{1,9}})?{_NO_SCALE}\s*(?i:{_CURRENCY})?\s*(?i:{_UNIT})?"
)


def relaxed(value: float, reference: float) -> bool:
    """Tells whether a value is within 5 % of a reference; with NaN it never is."""
    return abs(value - reference) <= abs(reference) * TOLERANCE


def number(text: str) -> str | None:
    """Reads a finite number without currency, percent sign, thousands commas and trailing unit.

    A unit is a word, "square" or "cubic" before it, "per" and another word after it; or degrees.
    Magnitudes ("12k", "12 million") are no units: such a text is no number.

    Args:
        text: An answer, any case.

    Returns:
        The number as `float` reads it, without superfluous signs; None where the text is none.
    """
    text = " ".join(narrow(text).split()).replace("−", "-").rstrip(". ")
    found = _NUMBER.fullmatch(text)
    if not found or (found["sign"] and found["inner"]):
        return None
    sign = "-" if "-" in (found["sign"], found["inner"]) else ""
    plain = sign + found["size"].replace(",", "") + (found["power"] or "")
    value = float(plain)
    underflow = value == 0 and re.search("[1-9]", found["size"])
    return plain if math.isfinite(value) and not underflow else None


def paper_chartqa(item: Item) -> Verdict:
    """Numbers within 5 % of the gold one, years too; other answers by lower case equality."""
    found, gold = item.prediction.lower(), item.golds[0].lower()
    if (value := _float(found)) is not None and (reference := _float(gold)) is not None:
        return Verdict(float(relaxed(value, reference)), True)
    return Verdict(float(found == gold), bool(found.strip()))


def paper_mathvista(item: Item) -> Verdict:
    """A bare gold letter, or an open answer by `_paper_open`."""
    gold = chr(ord("a") + item.places[-1]) if item.places else item.golds[0].lower()
    return _paper_open(item.prediction.lower().strip(), gold)


def paper_mmmu(item: Item) -> Verdict:
    """First letter, or an open answer after the markers; several golds are compared as one text."""
    if item.places:
        return first_letter_rule(".:,")(item)
    return _paper_open(after_markers(item.prediction).rstrip("."), item.written.lower())


def corrected_chartqa(item: Item) -> Verdict:
    """Years are exact, other numbers within 5 % of the gold one; texts ignore case and stop."""
    gold = item.golds[0]
    return _compare(item.prediction, gold, exact=bool(YEAR.fullmatch(gold.strip())))


def corrected_mathvista(item: Item) -> Verdict:
    """The option, or the number: integers exact."""
    if item.places:
        return corrected_letter(item)
    return _compare(item.prediction, item.golds[0], exact=_is_integer(item.golds[0]))


def corrected_mmmu(item: Item) -> Verdict:
    """The option, or any gold after the last marker: integers exact."""
    if item.places:
        return corrected_letter(item)
    found = after_marker(item.prediction)
    golds = [each for gold in item.golds for each in listed(gold) or (gold,)]
    verdicts = [_compare(found, gold, exact=_is_integer(gold)) for gold in golds]
    return Verdict(max(v.score for v in verdicts), any(v.parsed for v in verdicts))


def _compare(prediction: str, gold: str, *, exact: bool) -> Verdict:
    """Compares as numbers where the gold answer is one, else as texts."""
    reference = number(gold)
    if reference is None:
        found = folded(prediction).rstrip(". ")
        return Verdict(float(bool(found) and found == folded(gold).rstrip(". ")), bool(found))
    value = number(prediction)
    if value is None:
        return Verdict(0.0, False)
    if _is_integer(value) and _is_integer(reference) and exact:
        return Verdict(float(_canonical(value) == _canonical(reference)), True)
    if exact:
        return Verdict(float(float(value) == float(reference)), True)
    return Verdict(float(relaxed(float(value), float(reference))), True)


def _paper_open(found: str, gold: str) -> Verdict:
    """Equal, or within 5 % of what was predicted, not of the gold answer as was meant."""
    right = found == gold
    if (value := _float(found)) is not None and (reference := _float(gold)) is not None:
        right = right or relaxed(reference, value)
    return Verdict(float(right), bool(found))


def _float(text: str) -> float | None:
    """What Python takes for a number: underscores, "inf" and "nan" as well."""
    try:
        return float(text)
    except ValueError:
        return None


def _is_integer(text: str) -> bool:
    """Tells whether a number is written without decimal point and exponent."""
    plain = number(text)
    return plain is not None and re.fullmatch("-?[0-9]+", plain) is not None


def _canonical(integer: str) -> str:
    """An integer's digits; converting thousands of them to `int` is refused by Python."""
    digits = integer.lstrip("-0")
    return "-" + digits if integer.startswith("-") and digits else digits
