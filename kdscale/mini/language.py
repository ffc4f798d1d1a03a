"""The miniature language models' tokenizer, in the form of a real one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NAME = "mini_lm"
TOKENIZER = Path(__file__).parent / "tokenizers" / NAME
END_ID, IMAGE_ID = 0, 3


def tokenizer() -> PreTrainedTokenizerFast:
    """Returns the fast tokenizer of the miniature Qwen2 and Llama.

    `<|endoftext|>` (id 0) ends a text and pads, nothing begins one, `<image>` is a special token,
    and any text survives a round trip: words of the miniature world are one token each, others are
    spelt in bytes. It can be pickled, and saved beside a model.
    """
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(str(TOKENIZER), local_files_only=True)
    return cast("PreTrainedTokenizerFast", found)
