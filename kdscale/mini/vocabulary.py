"""Makes the miniature tokenizers: of CLIP, of SigLIP, and of the language models.

The first is a byte-pair encoding, the second a SentencePiece model; both are trained on the same
captions and class prompts. The third is a byte-level encoding trained on conversations. All are
shipped as package data; `python -m kdscale.mini.vocabulary` writes them again.
"""

from __future__ import annotations

import gzip
import json
import math
import string
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import regex

from kdscale.core.config import MiniWorld
from kdscale.mini.captions import captions
from kdscale.mini.conversations import converse
from kdscale.mini.scenes import (
    BACKGROUNDS,
    CLASSNAMES,
    COLOURS,
    SHAPES,
    TEMPLATES,
    WORDS,
    draw,
)

DIRECTORY = Path(__file__).parent / "tokenizers"
NUM_CAPTIONS = 4000
NUM_TALKS = 800
# Ids from 0 on. As in SmolLM the first ends a text; `<image>` is there, as in Qwen2.
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
# Digits stand alone, so that the space before a number is a token of its own, as in Qwen2.
_PIECE = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
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
    """Learns the merges of texts, in lower case, with the end-of-word mark of OpenAI's CLIP."""
    counts = Counter(word for text in texts for word in _WORD.findall(text.lower()))
    return merges_of({(*word[:-1], word[-1] + "</w>"): n for word, n in counts.items()})


def merges_of(words: dict[tuple[str, ...], int]) -> list[tuple[str, str]]:
    """Learns byte-pair merges until every word is one token.

    Args:
        words: How often each word occurs, by its symbols.

    Returns:
        Merges, the earliest first. Ties between equally frequent pairs go to the pair that comes
        first in alphabetical order.

    Source:
        Sennrich et al. 2016.
    """
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


def talk_corpus() -> Iterator[str]:
    """Yields what the language models' tokenizer is made of: conversations in their frame."""
    yield f"{SYSTEM} USER"
    for split, content in product(("train", "eval"), ("instruct", "pretrain")):
        world = MiniWorld(seed=20, split=split, content=content)  # pyright: ignore[reportArgumentType]
        for index in range(NUM_TALKS):
            turns = converse(world, index).turns
            texts = [turn["value"].replace(SPECIAL[-1], "") for turn in turns]
            for asked, said in zip(texts[::2], texts[1::2], strict=True):
                yield f"USER: {asked} ASSISTANT: {said}"
                yield said  # in pretraining no space stands before it


def language_files() -> dict[str, str]:
    """Returns the files of the language models' tokenizer in Hugging Face's format, by name.

    Its tokens are the special ones, the 256 bytes, and what makes one token of every word of the
    conversations; other words are spelt. Merges stay within words, so that the rules of Qwen2's
    own tokenizer, which transformers puts in place of these beside a Qwen2, give the same ids.
    """
    from open_clip.tokenizer import bytes_to_unicode

    alphabet = bytes_to_unicode()
    words = Counter(word for text in talk_corpus() for word in regex.findall(r" ?\p{L}+", text))
    merges = merges_of({tuple(alphabet[byte] for byte in w.encode()): n for w, n in words.items()})
    letters = [alphabet[byte] for byte in range(256)]
    vocabulary = [*SPECIAL, *letters, *("".join(pair) for pair in merges)]
    by_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    by_bytes |= {"use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": _PIECE}, "behavior": "Isolated"}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_special(number, token) for number, token in enumerate(SPECIAL)],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{**split, "invert": False}, by_bytes],
        },
        "post_processor": None,
        "decoder": by_bytes,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "byte_fallback": False,
            "vocab": {token: number for number, token in enumerate(vocabulary)},
            "merges": [" ".join(pair) for pair in merges],
        },
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL[0],
        "pad_token": SPECIAL[0],
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    return {"tokenizer.json": _json(tokenizer), "tokenizer_config.json": _json(config)}


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
    """Writes the tokenizers.

    Args:
        directory: Receives `bpe_mini.txt.gz`, `sp_mini/` and `mini_lm/`.
    """
    for folder, files in (("sp_mini", sentencepiece_files()), ("mini_lm", language_files())):
        target = directory / folder
        target.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (target / name).write_text(text, encoding="utf-8")
    compressed = gzip.compress(bpe_text().encode(), mtime=0)
    (directory / "bpe_mini.txt.gz").write_bytes(compressed)


if __name__ == "__main__":
    write()
