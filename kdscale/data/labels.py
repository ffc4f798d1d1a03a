"""What a label of an evaluation set means: an integer, a WordNet id or a class name."""

from __future__ import annotations

import re
from collections import Counter

from kdscale.core.types import DataError
from kdscale.core.zero_shot_config import ClassSet, Numbering

_WNID = re.compile(r"n\d{8}")


class UnknownLabel(DataError):
    """A label that none of the set's classes has."""


class Labels:
    """Turns what a data set says into places in a list of classes.

    Args:
        classes: The list.
        numbering: What integers count: places in the list (`own`), or ImageNet's 1,000 classes.
        name: Of the image set, for messages.
    """

    def __init__(self, classes: ClassSet, numbering: Numbering, name: str) -> None:
        self.classes, self.name, self._numbering = classes, name, numbering
        numbers = classes.places if numbering == "imagenet" else range(len(classes.names))
        self._by_number = {number: place for place, number in enumerate(numbers)}
        self._by_wnid = {wnid: place for place, wnid in enumerate(classes.wnids)}
        names = [_folded(text) for text in classes.names]
        once = {text for text, count in Counter(names).items() if count == 1}
        self._by_name = {text: place for place, text in enumerate(names) if text in once}

    def of(self, value: object, where: str) -> int:
        """Returns a label's place in the list.

        Digits are numbers, never positions in a sorted listing: of folders named 0 to 999 a
        sort by letters would put 10 before 2.

        Args:
            value: An integer, or text: digits, a WordNet id, or a class name that is unique (case
                and underscores do not matter).
            where: The sample, for messages.

        Raises:
            UnknownLabel: None of the classes.
        """
        place = None
        if isinstance(value, int) and not isinstance(value, bool):
            place = self._by_number.get(value)
        elif isinstance(value, str):
            text = value.strip()
            known = self._by_name if not _WNID.fullmatch(text) else self._by_wnid
            place = self._by_number.get(int(text)) if text.isdecimal() else known.get(_folded(text))
        if place is None:
            raise UnknownLabel(f"{self.name}: {where} is labelled {value!r}, {self._why(value)}")
        return place

    def _why(self, value: object) -> str:
        """Says what would have been a label."""
        count = len(self.classes.names)
        if isinstance(value, str) and _WNID.fullmatch(value.strip()):
            of = self.classes.name if self.classes.wnids else "a list without WordNet ids"
            return f"which is none of the {count} classes of {of}; is this another image set?"
        if isinstance(value, int) or (isinstance(value, str) and value.strip().isdecimal()):
            if self._numbering == "imagenet":
                return f"which is none of the {count} of ImageNet's 1,000 classes in this set"
            hint = "" if count == 1000 else "; numbering='imagenet' reads places among 1,000"
            return f"outside 0 to {count - 1}{hint}"
        return (
            "which is neither an integer, a WordNet id (n01440764) nor one class's name; rename "
            "the folder or the label, or leave it out"
        )


def _folded(text: str) -> str:
    """Folds what does not tell class names apart."""
    return text.replace("_", " ").casefold().strip()
