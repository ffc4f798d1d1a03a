"""Conversations as token ids, with the labels that teach only the answers.

Label rules are those of TinyLLaVA Factory (53f12c7) and Bunny (08273ac). Both put an id outside
the vocabulary where the image goes and splice its features in later; here `<image>` is a token of
the vocabulary, repeated once per feature, which gives the same positions and labels. Nothing here
needs torch. Shapes: T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kdscale.core.types import ConfigError
from kdscale.data.templates import (
    IMAGE,
    SEPARATOR,
    TEMPLATES,
    Round,
    TemplateSpec,
    chat_template,
    prompt,
    render,
    rounds,
    spec_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = [
    "IGNORE",
    "IMAGE",
    "TEMPLATES",
    "Encoded",
    "TemplateSpec",
    "chat_template",
    "check_template",
    "encode",
    "encode_prompt",
    "prompt",
    "render",
    "rounds",
]

Ids = np.ndarray[Any, np.dtype[np.int64]]
IGNORE = -100


class Encoded(NamedTuple):
    """A conversation in token ids.

    Attributes:
        input_ids: (T,) int64; the image is `num_image_tokens` copies of its token.
        labels: (T,) int64; the ids that are learnt, `IGNORE` elsewhere.
    """

    input_ids: Ids
    labels: Ids


def encode(
    rounds: Sequence[Round],
    template: str,
    has_image: bool,
    tokenizer: PreTrainedTokenizerFast,
    *,
    image_token_id: int,
    num_image_tokens: int,
    max_length: int,
) -> Encoded:
    """Turns a conversation into ids and labels.

    Learnt are, of every round, what follows `ASSISTANT:` (the space before the answer included)
    and the terminator; of a caption, everything but the image. A sample whose rounds do not add up
    to its text, say because an answer spells out a terminator, is masked whole, as in the
    references. Text is cut at `max_length` with the image counted as one token and again with it
    counted in full; an image that a cut goes through is dropped with what follows it.

    Args:
        tokenizer: Has `<image>` as a special token of id `image_token_id`.
        num_image_tokens: Visual features of one image.

    Raises:
        UnknownName: There is no such template.
        DataError: As `render`.
        ConfigError: Tokenizer and template do not fit, or an image in the first question does not
            fit into `max_length`.
    """
    text = render(rounds, template, has_image)
    ids, labels = _labelled(text, template, has_image, tokenizer, max_length)
    place = _image_place(ids, image_token_id, has_image)
    cut = max_length
    if place is not None:
        if place + num_image_tokens > max_length:
            cut = _before_image(text, place, num_image_tokens, max_length)
        ids = _expanded(ids, place, num_image_tokens, image_token_id)
        labels = _expanded(labels, place, num_image_tokens, IGNORE)
    return Encoded(ids[:cut], labels[:cut])


def _image_place(ids: Ids, image_token_id: int, has_image: bool) -> int | None:
    """Returns where the image's token is, None without an image."""
    found = np.flatnonzero(ids == image_token_id)
    if len(found) != int(has_image):
        raise ConfigError(
            f"a text with {int(has_image)} {IMAGE} has {len(found)} tokens of id {image_token_id}: "
            f"the tokenizer needs {IMAGE} as a special token of that id"
        )
    return int(found[0]) if has_image else None


def encode_prompt(
    question: str,
    template: str,
    has_image: bool,
    tokenizer: PreTrainedTokenizerFast,
    *,
    image_token_id: int,
    num_image_tokens: int,
) -> Ids:
    """Turns a question into the ids that generation starts from, (T,) int64; nothing is cut."""
    text = prompt(question, template, has_image)
    ids = np.array(tokenizer(text, verbose=False)["input_ids"], np.int64)
    if not has_image:
        return ids
    place = int(np.flatnonzero(ids == image_token_id)[0])
    return _expanded(ids, place, num_image_tokens, image_token_id)


def check_template(
    template: str,
    tokenizer: PreTrainedTokenizerFast,
    *,
    image_token_id: int,
    num_image_tokens: int,
    max_length: int,
) -> None:
    """Refuses a tokenizer with which the template would teach nothing or never an end.

    `encode` masks samples that do not add up, one by one; where that would meet all of them, for
    instance `qwen2_instruct` with the tokenizer of Qwen2's base model, this says so beforehand.

    Raises:
        ConfigError: They do not fit; says why.
    """
    spec = spec_of(template)
    _check_terminator(template, spec.terminator, tokenizer)
    sample = [("What is this?", "A cat."), ("How many?", "2 cats")]
    encoded = encode(
        sample if spec.terminator else sample[:1],
        template,
        True,
        tokenizer,
        image_token_id=image_token_id,
        num_image_tokens=num_image_tokens,
        max_length=max(max_length, num_image_tokens + 1024),
    )
    if not (encoded.labels != IGNORE).any():
        raise ConfigError(
            f"template {template!r} masks every sample with this tokenizer: it ends answers with "
            f"{spec.terminator}, the tokenizer ends with {tokenizer.eos_token} and pads with "
            f"{tokenizer.pad_token}; take the template whose end is the tokenizer's"
        )
    if int(np.argmax(encoded.input_ids == image_token_id)) + num_image_tokens >= max_length:
        raise ConfigError(
            f"max_length {max_length} leaves no room for text beside an image of "
            f"{num_image_tokens} tokens"
        )


def _check_terminator(template: str, end: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Refuses a tokenizer that has no token for the end of an answer."""
    (tokens,) = _tokens(tokenizer, [end])
    if end and len(tokens) != 1:
        raise ConfigError(
            f"template {template!r} ends answers with {end}, which this tokenizer "
            f"splits into {len(tokens)} tokens; it needs one, or another template"
        )


def _labelled(
    text: str,
    template: str,
    has_image: bool,
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
) -> tuple[Ids, Ids]:
    """Tokenises a rendered sample, its image still one token: ids and labels, (T,) each, uncut."""
    spec = spec_of(template)
    bos: Any = tokenizer("", verbose=False)["input_ids"]
    if spec.bos and not bos:
        raise ConfigError(f"template {template!r} needs a tokenizer that adds a BOS; this has none")
    if spec.terminator:
        return _answers(text, spec, has_image, tokenizer, bos, max_length)
    ids = np.array(bos + _tokens(tokenizer, [text])[0], np.int64)
    labels = ids.copy()
    labels[: len(bos) + 1] = IGNORE
    return ids, labels


def _answers(
    text: str,
    spec: TemplateSpec,
    has_image: bool,
    tokenizer: PreTrainedTokenizerFast,
    bos: list[int],
    max_length: int,
) -> tuple[Ids, Ids]:
    """Tokenises a chat and masks all but its answers; the image is one token.

    The place of an answer is measured as the references do: the tokens of its round up to and
    with the space before it, less one, because that space goes with the answer.
    """
    parts: list[list[str]] = []
    for part in text.split(spec.terminator):
        halves = part.split(SEPARATOR)
        if len(halves) != 2:
            break
        parts.append([part, halves[0] + SEPARATOR])
    flat = [piece for pair in parts for piece in pair]
    whole, end, *lengths = _tokens(tokenizer, [text, spec.terminator, *flat])
    ids = np.array(bos + whole, np.int64)
    labels = np.full_like(ids, IGNORE)
    place = len(bos)
    for body, head in zip(lengths[::2], lengths[1::2], strict=True):
        after = place + len(body) + len(end)
        learnt = slice(place + len(head) - 1, after)
        labels[learnt] = ids[learnt]
        place = after
    endings = (text.count(spec.terminator), len(parts))
    seen = ids[:max_length] if spec.check == "bunny" and not has_image else ids
    if _lengths_differ(seen, place, endings, spec, tokenizer, max_length):
        labels[:] = IGNORE
    return ids, labels


def _lengths_differ(
    ids: Ids,
    computed: int,
    endings: tuple[int, int],
    spec: TemplateSpec,
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
) -> bool:
    """Says whether the references would mask the whole sample.

    Both count the tokens that are no padding. Where padding is the EOS, TinyLLaVA adds the
    terminators of the text to that count, also those that are not the EOS; Bunny takes the
    terminators of the rounds off the computed length, and counts a text-only sample after its cut.
    Beyond `max_length` neither compares.
    """
    pad = tokenizer.pad_token_id
    actual = len(ids) if pad is None else int((ids != pad).sum())
    if pad is not None and pad == tokenizer.eos_token_id:
        if spec.check == "tinyllava":
            actual += endings[0]
        else:
            computed -= endings[1]
    return computed < max_length and computed != actual


def _before_image(text: str, place: int, num_image_tokens: int, max_length: int) -> int:
    """Says where to cut a sample whose image reaches beyond `max_length`."""
    if IMAGE in text.partition(SEPARATOR)[0]:
        raise ConfigError(
            f"an image of {num_image_tokens} tokens at place {place} does not fit into max_length "
            f"{max_length}"
        )
    return min(place, max_length)


def _tokens(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Tokenises texts without BOS or EOS."""
    encoded: Any = tokenizer(texts, add_special_tokens=False, verbose=False)
    return encoded["input_ids"]


def _expanded(values: Ids, place: int, copies: int, value: int) -> Ids:
    """Replaces one element by copies of a value."""
    return np.concatenate(
        [values[:place], np.full(copies, value, np.int64), values[place + 1 :]], dtype=np.int64
    )
