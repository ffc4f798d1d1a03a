"""Words: yes or no, single words, and texts that an answer contains.

Paper rules: `eval/eval/{mme,gqa,realworldqa,ocrbench}/*_test.py` of Cambrian-1 at 539ffc3.
"""

from __future__ import annotations

import re
import unicodedata

from kdscale.eval.scoring.forms import after_marker, after_markers, folded, narrow
from kdscale.eval.scoring.items import Item, Verdict
from kdscale.eval.scoring.letters import read_option

FORMULA = "Handwritten Mathematical Expression Recognition"
ARTICLES = ("a", "an", "the")

_FIRST_WORD = re.compile(r"[\W_]*([^\W_]+)")


def paper_yes_no(item: Item) -> Verdict:
    """The whole answer without case and final full stops."""
    found = item.prediction.lower().rstrip(".")
    return Verdict(float(found == item.golds[0].lower()), found in ("yes", "no"))


def corrected_yes_no(item: Item) -> Verdict:
    """The first word."""
    found = _first_word(item.prediction)
    return Verdict(float(found == item.golds[0].lower()), found in ("yes", "no"))


def paper_gqa(item: Item) -> Verdict:
    """The whole answer without case and final full stops."""
    found = item.prediction.lower().rstrip(".")
    return Verdict(float(found == item.golds[0].lower()), bool(found.strip()))


def corrected_gqa(item: Item) -> Verdict:
    """The words, without case, articles and punctuation."""
    found, gold = _words(item.prediction), _words(item.golds[0])
    return Verdict(float(bool(found) and found == gold), bool(found))


def paper_realworldqa(item: Item) -> Verdict:
    """The first word after the markers; none is wrong, where the reference breaks off."""
    words = after_markers(item.prediction).rstrip(".").split()
    right = bool(words) and words[0] == item.golds[0].lower()
    return Verdict(float(right), bool(words))


def corrected_realworldqa(item: Item) -> Verdict:
    """An option's letter, yes or no, or as many words as the gold answer has."""
    gold = item.golds[0].strip()
    if re.fullmatch("[A-Za-z]", gold):
        place = read_option(item.prediction, item.options)
        return Verdict(float(place == ord(gold.lower()) - ord("a")), place is not None)
    answer = after_marker(item.prediction)
    if gold.lower() in ("yes", "no"):
        found = _first_word(answer)
        return Verdict(float(found == gold.lower()), found in ("yes", "no"))
    found, wanted = _bare_words(answer), _bare_words(gold)
    return Verdict(float(bool(wanted) and found[: len(wanted)] == wanted), bool(found))


def paper_ocrbench(item: Item) -> Verdict:
    """Some gold answer is part of the output; formulae keep case and lose blanks."""
    if item.question_type == FORMULA:
        found = _formula(item.prediction)
        right = any(_formula(gold) in found for gold in item.golds)
    else:
        found = _line(item.prediction)
        right = any(_line(gold) in found for gold in item.golds)
    return Verdict(float(right), bool(found))


def corrected_ocrbench(item: Item) -> Verdict:
    """As in paper, but a text must not end within a word or number."""
    if item.question_type == FORMULA:
        return paper_ocrbench(item)
    found = folded(item.prediction)
    return Verdict(float(any(_whole_tokens(gold, found) for gold in item.golds)), bool(found))


def _whole_tokens(gold: str, text: str) -> bool:
    """Finds an answer whose words and numbers go on beyond neither of its ends.

    A letter or digit at an end must not touch another, nor a digit the decimals or the decimal
    point of its number. Any other sign is a token of its own ("$5" in "US$5", "50%" in "50%off"),
    but for a sign or point that belongs to a number.
    """
    gold = folded(gold)
    before = r"(?<!\w)" if re.match(r"\w", gold) else ""
    if re.match(r"\d", gold):
        before += r"(?<!\d[.,])(?<!\W\.)(?<!^\.)"
    elif re.match(r"[-+.,]\d", gold):
        before = r"(?<!\d)"
    after = r"(?!\w)" if re.search(r"\w$", gold) else ""
    if re.search(r"\d$", gold):
        after += r"(?![.,]\d)"
    elif re.search(r"\d[.,]$", gold):
        after = r"(?!\d)"
    return re.search(before + re.escape(gold) + after, text) is not None


def _first_word(text: str) -> str:
    """The first word in lower case, nothing where there is none."""
    found = _FIRST_WORD.match(narrow(text))
    return found[1].lower() if found else ""


def _words(text: str) -> list[str]:
    """Words without punctuation and articles; the articles stay where there is nothing else."""
    text = folded(text)
    words = "".join(c for c in text if not unicodedata.category(c).startswith("P")).split()
    return [word for word in words if word not in ARTICLES] or words


def _bare_words(text: str) -> list[str]:
    """Words without punctuation around them."""
    words = folded(text).split()
    return [bare for word in words if (bare := word.strip(".,:;!?\"'`*()[]{}"))]


def _line(text: str) -> str:
    """A text in lower case and on one line."""
    return text.lower().strip().replace("\n", " ")


def _formula(text: str) -> str:
    """A formula without blanks."""
    return text.strip().replace("\n", " ").replace(" ", "")
