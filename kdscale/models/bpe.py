"""OpenAI's byte-pair encoding for CLIP, by the `tokenizers` library and without torch.

The same ids as open_clip's `SimpleTokenizer`, whose module takes a data task some seconds to
import and a caption three times as long. Vocabulary and merges are open_clip's own file. One
difference: a caption that spells out a special token gets the ids of its letters.
"""

from __future__ import annotations

import gzip
import html
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from kdscale.core.types import WeightsError

Ids = np.ndarray[Any, np.dtype[np.int64]]
_MERGES = 49152 - 256 - 2
_START, _END = "<start_of_text>", "<end_of_text>"
# U+0345 falls through: the reference ignores case, and its capital is a letter where it is none.
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}\u0345]+"


def openai_merges() -> Path:
    """Returns the merges file of the installed open_clip, whose package is not imported."""
    package = find_spec("open_clip")
    assert package is not None
    assert package.submodule_search_locations is not None
    return Path(package.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"


def build_bpe(merges_file: str | Path, context_length: int) -> Callable[[Sequence[str]], Ids]:
    """Builds an encoder.

    Args:
        merges_file: Gzipped, a heading and then one merge a line.
        context_length: Tokens per text; longer ones are cut before the end token.

    Returns:
        Maps texts to (B, context_length) int64, padded with zeros.

    Raises:
        WeightsError: The file is not a merges file.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    vocabulary, merges = _read(merges_file)
    encoder = Tokenizer(models.BPE(vocabulary, merges, end_of_word_suffix="</w>"))
    encoder.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    start, end = vocabulary[_START], vocabulary[_END]

    def encode(texts: Sequence[str]) -> Ids:
        """Returns (B, T) ids between start and end, zeros behind."""
        ids_BT = np.zeros((len(texts), context_length), np.int64)
        for row, text in zip(ids_BT, texts, strict=True):
            found = encoder.encode(clean(text)).ids[: context_length - 2]
            row[0] = start
            row[1 : len(found) + 1] = found
            row[len(found) + 1] = end
        return ids_BT

    return encode


def clean(text: str) -> str:
    """Repairs, unescapes, collapses blanks and lowers, as CLIP's reference does."""
    # What ftfy and html leave alone needs neither; that is most captions.
    if not (text.isascii() and text.isprintable() and "&" not in text):
        import ftfy

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def _read(path: str | Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Reads merges and numbers the vocabulary: bytes, final bytes, merges, special tokens."""
    try:
        lines = gzip.decompress(Path(path).read_bytes()).decode("utf-8").split("\n")
        merges = [(one, two) for one, two in map(str.split, lines[1 : _MERGES + 1])]
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} is not a gzipped merges file: {error}") from error
    symbols = _byte_symbols()
    words = [*symbols, *(s + "</w>" for s in symbols), *map("".join, merges), _START, _END]
    return {word: number for number, word in enumerate(words)}, merges


def _byte_symbols() -> list[str]:
    """Returns the character that stands for each byte, printable bytes first."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
