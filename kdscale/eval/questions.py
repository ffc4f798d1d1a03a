"""What a benchmark asks: one question about one image, with all that its score needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kdscale.eval.images import StoredImage


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question of a benchmark as it is put to a VLM.

    Attributes:
        benchmark: One of the 16 names of `kdscale.eval`.
        item_id: Row number in the data set's file, in decimal; unique within the benchmark.
        prompt: The user's turn without the image: body and suffix.
        image: The encoded image or where it is, None where the question has none.
        image_sha256: Hash of the image's bytes in hexadecimal, empty where there is none.
        gold: The right answer, or all accepted ones.
        options: Texts of the options in order, empty for open questions; MMBench's "nan" is none.
        question_type: As the data set spells it.
        category: As the data set spells it.
        group: What must be right together: image, pair or rotation.
        max_new_tokens: Longest answer.
    """

    benchmark: str
    item_id: str
    prompt: str
    image: bytes | StoredImage | None
    image_sha256: str
    gold: str | tuple[str, ...]
    options: tuple[str, ...] = ()
    question_type: str = ""
    category: str = ""
    group: str = ""
    max_new_tokens: int = 16

    def item(self, prediction: str) -> dict[str, Any]:
        """Returns the item that `kdscale.eval.score` takes.

        Args:
            prediction: The model's answer.

        Returns:
            A mapping of plain strings and lists.
        """
        gold = self.gold if isinstance(self.gold, str) else list(self.gold)
        return {
            "item_id": self.item_id,
            "prediction": prediction,
            "gold": gold,
            "options": list(self.options),
            "question_type": self.question_type,
            "category": self.category,
            "group": self.group,
            "image_sha256": self.image_sha256,
        }
