"""Tokenizers of the language models, as far as their vocabularies can be had.

Qwen2's byte pairs are in the registry package `dashscope` and become a fast tokenizer here; nothing
of them is kept. SmolLM's are not to be had: a small vocabulary with its special ids and its way of
splitting text stands in.
"""

from __future__ import annotations

import base64
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from kdscale.data.templates import IMAGE, SYSTEM

QWEN_EOS, QWEN_IMAGE = 151643, 151646
_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SMOLLM_NAMES = (
    "endoftext im_start im_end repo_name reponame file_sep filename gh_stars issue_start "
    "issue_comment issue_closed jupyter_start jupyter_text jupyter_code jupyter_output "
    "jupyter_script empty_output"
)
_SMOLLM_BARE = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@cache
def qwen2(instruct: bool = False) -> PreTrainedTokenizerFast:
    """Qwen2's tokenizer with `<image>` added: of the base model, or of the instruct model."""
    vocabulary, merges = _qwen_pairs()
    core = Tokenizer(models.BPE(vocabulary, merges))
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(_special("<|endoftext|>", "<|im_start|>", "<|im_end|>", IMAGE))
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>" if instruct else "<|endoftext|>",
        pad_token="<|endoftext|>",
        model_max_length=32768,
    )


@cache
def smollm() -> PreTrainedTokenizerFast:
    """A stand-in for SmolLM's tokenizer: ids 0 to 16 are special, EOS and BOS are 0, no pad."""
    core = _bytes_and_pairs([_smollm_name(name) for name in _SMOLLM_NAMES.split()])
    core.add_special_tokens(_special(IMAGE))
    ends = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<|endoftext|>", model_max_length=2048, **ends
    )


@cache
def with_bos() -> PreTrainedTokenizerFast:
    """A tokenizer that begins every text with a BOS, as Llama's do."""
    core = _bytes_and_pairs(["<unk>", "<s>", "</s>"])
    core.add_special_tokens(_special(IMAGE))
    core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        unk_token="<unk>",
        model_max_length=2048,
    )


def _smollm_name(name: str) -> str:
    """Writes a special token's name as SmolLM does."""
    piped = f"<|{name}|>"
    return piped if piped in _SMOLLM_BARE else f"<{name}>"


def _special(*names: str) -> list[AddedToken]:
    """Special tokens that take no blanks with them."""
    return [AddedToken(name, special=True, normalized=False) for name in names]


def _bytes_and_pairs(special: list[str]) -> Tokenizer:
    """Learns some hundred pairs; digits stand alone, a blank goes with the word after it."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=600,
        special_tokens=special,  # pyright: ignore[reportArgumentType]
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(
        [SYSTEM, "USER: ASSISTANT: A cat. What colour is it? Red"] * 3, trainer
    )
    return core


@cache
def _qwen_pairs() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Reads the ranks and works out which two tokens each token was merged from."""
    package = find_spec("dashscope")
    assert package is not None, "the tests need Qwen2's byte pairs: pip install dashscope"
    assert package.submodule_search_locations is not None
    path = Path(package.submodule_search_locations[0]) / "resources" / "qwen.tiktoken"
    lines = (line.split() for line in path.read_bytes().splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    letters = _byte_letters()
    shown = {token: token.decode("latin-1").translate(letters) for token in ranks}
    merges = [
        tuple(shown[half] for half in _halves(token, ranks)) for token in ranks if len(token) > 1
    ]
    return {shown[token]: rank for token, rank in ranks.items()}, merges  # pyright: ignore[reportReturnType]


def _halves(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Merges a token's bytes by rank until two parts are left."""
    parts = [token[i : i + 1] for i in range(len(token))]
    never = len(ranks)
    found = [ranks.get(token[i : i + 2], never) for i in range(len(token) - 1)]
    while len(parts) > 2:
        best = found.index(min(found))
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
        del found[best]
        for i in (best - 1, best):
            if 0 <= i < len(found):
                found[i] = ranks.get(parts[i] + parts[i + 1], never)
    return parts


def _byte_letters() -> dict[int, str]:
    """GPT-2's printable stand-ins for bytes, as `ByteLevel` uses them."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    odd = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {
        byte: chr(256 + place) for place, byte in enumerate(odd)
    }
