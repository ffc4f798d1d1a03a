"""Makes the miniature tokenizers: CLIP's byte-pair encoding and a SentencePiece one.

Both are trained on the same captions and class prompts and shipped as package data;
`python -m kdscale.mini.vocabulary` writes them again.
"""

from __future__ import annotations

import gzip
import json
import math
import string
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import regex

from kdscale.core.config import MiniWorld
from kdscale.mini.scenes import (
    BACKGROUNDS,
    CLASSNAMES,
    COLOURS,
    SHAPES,
    TEMPLATES,
    WORDS,
    captions,
    draw,
)

DIRECTORY = Path(__file__).parent / "tokenizers"
NUM_CAPTIONS = 4000
END, UNK = "</s>", "<unk>"
_WORD = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")


def corpus() -> Iterator[str]:
    """Yields what the tokenizers are trained on: captions, prompts, and every word that occurs."""
    world = MiniWorld(seed=20)
    for index in range(NUM_CAPTIONS):
        yield from captions(draw(world, index))
    for name in CLASSNAMES:
        for template in TEMPLATES:
            yield template.format(name)
    yield " ".join((*COLOURS, *SHAPES, *BACKGROUNDS, *WORDS))


def train_merges(texts: Iterable[str]) -> list[tuple[str, str]]:
    """Learns byte-pair merges until every word of the texts is one token.

    Args:
        texts: Training texts; they are put into lower case.

    Returns:
        Merges, the earliest first. Ties between equally frequent pairs go to the pair that comes
        first in alphabetical order.

    Source:
        Sennrich et al. 2016 with the end-of-word mark of OpenAI's CLIP.
    """
    counts = Counter(word for text in texts for word in _WORD.findall(text.lower()))
    words = {(*word[:-1], word[-1] + "</w>"): n for word, n in counts.items()}
    merges: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                pairs[pair] += count
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = {_merge(word, best): count for word, count in words.items()}


def _merge(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """Joins every occurrence of a pair, from the left."""
    merged: list[str] = []
    position = 0
    while position < len(word):
        if word[position : position + 2] == pair:
            merged.append(word[position] + word[position + 1])
            position += 2
        else:
            merged.append(word[position])
            position += 1
    return tuple(merged)


def bpe_text() -> str:
    """Returns the merges file, in the format that open_clip's `SimpleTokenizer` reads."""
    merges = train_merges(corpus())
    # No newline at the end: the reader would take it for one more, empty, merge.
    return "\n".join(["#version: kdscale mini", *(" ".join(pair) for pair in merges)])


def sentencepiece_files() -> dict[str, str]:
    """Returns the files of the SentencePiece tokenizer in Hugging Face's format, by name."""
    from open_clip.tokenizer import canonicalize_text

    pieces = unigram_pieces(canonicalize_text(text) for text in corpus())
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _special(1, END),
            _special(2, UNK),
        ],
        "normalizer": None,
        "pre_tokenizer": _metaspace(),
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [_slot("Sequence", "A"), _slot("SpecialToken", END)],
            "pair": [
                _slot("Sequence", "A"),
                _slot("SpecialToken", END),
                _slot("Sequence", "B"),
                _slot("SpecialToken", END),
            ],
            "special_tokens": {END: {"id": END, "ids": [1], "tokens": [END]}},
        },
        "decoder": _metaspace(),
        "model": {"type": "Unigram", "unk_id": 2, "vocab": pieces, "byte_fallback": False},
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": END,
        "eos_token": END,
        "unk_token": UNK,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
    }
    return {"tokenizer.json": _json(tokenizer), "tokenizer_config.json": _json(config)}


def unigram_pieces(texts: Iterable[str]) -> list[list[Any]]:
    """Estimates a unigram model over SentencePiece's alphabet of marked words and characters.

    Its pieces are the words of the texts, scored by their logarithmic frequency, and single
    characters far below them, for words that never occurred.

    Args:
        texts: Canonicalised training texts.

    Returns:
        [piece, score] by id; as in T5, 0 is padding, 1 the end, 2 the unknown.
    """
    counts = Counter(f"▁{word}" for text in texts for word in text.split())
    total = sum(counts.values())
    ranked = sorted(counts, key=lambda piece: (-counts[piece], piece))
    words = [[piece, round(math.log(counts[piece] / total), 4)] for piece in ranked]
    rare = round(words[-1][1] - 10.0, 4)
    letters = [[letter, rare] for letter in "▁" + string.ascii_lowercase + string.digits]
    known = {piece for piece, _ in words}
    return [
        ["<pad>", 0.0],
        [END, 0.0],
        [UNK, 0.0],
        *words,
        *(p for p in letters if p[0] not in known),
    ]


def _special(number: int, content: str) -> dict[str, Any]:
    """An entry of `added_tokens`."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": number, "content": content, **flags, "special": True}


def _slot(kind: str, name: str) -> dict[str, Any]:
    """An element of the post-processor's template."""
    return {kind: {"id": name, "type_id": 0}}


def _metaspace() -> dict[str, Any]:
    """SentencePiece's marking of word beginnings."""
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n"


def write(directory: Path = DIRECTORY) -> None:
    """Writes both tokenizers.

    Args:
        directory: Receives `bpe_mini.txt.gz` and `sp_mini/`.
    """
    target = directory / "sp_mini"
    target.mkdir(parents=True, exist_ok=True)
    for name, text in sentencepiece_files().items():
        (target / name).write_text(text, encoding="utf-8")
    compressed = gzip.compress(bpe_text().encode(), mtime=0)
    (directory / "bpe_mini.txt.gz").write_bytes(compressed)


if __name__ == "__main__":
    write()
