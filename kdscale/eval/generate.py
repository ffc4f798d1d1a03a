"""Answers of a vision-language model: batched, greedy, the same whatever the batches are.

Prompts of like length share a batch and are padded on the left, so that in fp32 an answer does
not depend on its neighbours; in bf16 and fp16 rounding may decide where two tokens are nearly
tied, and `differences` shows that it does so nowhere else.
Shape suffixes: B prompts of a batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from kdscale.core.types import AnswerFailed, DataError, WeightsError

IMAGE = "<image>"
BATCH_SIZE = 16
Pixels = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One user turn.

    Attributes:
        name: What errors call it: benchmark and item id.
        text: The turn without its images.
        images: In order, in any form that the generator's `decode` takes; shown before the text.
        max_new_tokens: Longest answer.
    """

    name: str
    text: str
    images: tuple[Any, ...] = ()
    max_new_tokens: int = 16


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        text: Without special tokens, stripped.
        token_ids: The tokens as generated, the end token among them where it came.
        margins: At each token, its logit less that of the second best; empty unless asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    margins: tuple[float, ...] = ()


class Generator:
    """Answers prompts through a model's own chat template and image processor.

    The model's `generation_config` is replaced: a repetition penalty that came with its weights
    would make the most likely token another one.

    Args:
        model: A `LlavaForConditionalGeneration` in evaluation mode; its dtype is computed in.
        processor: Its processor.
        decode: Turns an image of a prompt into (H, W, 3) uint8 RGB; raises `DataError` for one
            that is damaged or too large.
        batch_size: Prompts at once.
        threads: Threads that decode the next batch meanwhile.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        decode: Callable[[Any], Pixels],
        *,
        batch_size: int = BATCH_SIZE,
        threads: int = 1,
    ) -> None:
        self.model, self.processor, self.decode = model, processor, decode
        self.batch_size = batch_size
        self.pool = ThreadPoolExecutor(threads)
        own, tokenizer = model.generation_config, processor.tokenizer
        ends = own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id
        self.end_ids = set(ends if isinstance(ends, list) else [ends])
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=pad)

    def __call__(self, prompts: Sequence[Prompt], *, margins: bool = False) -> list[Answer]:
        """Answers prompts.

        Args:
            prompts: Any number, with images or without.
            margins: Note how clearly each token was chosen.

        Returns:
            The answers, in the order of the prompts. Nothing is cut off a long prompt.

        Raises:
            DataError: An image cannot be decoded, or a text holds `<image>`; names the prompt.
            WeightsError: The logits are not finite.
            AnswerFailed: The model failed, for want of memory for instance.
        """
        texts = [self._rendered(prompt) for prompt in prompts]
        batches = list(self._batches(prompts, texts))
        found: dict[int, Answer] = {}
        ahead = self._decoding(prompts, batches[0]) if batches else []
        for number, places in enumerate(batches):
            images = [task.result() for task in ahead]
            if number + 1 < len(batches):
                ahead = self._decoding(prompts, batches[number + 1])
            batch = [prompts[place] for place in places]
            answers = self._answers(batch, [texts[place] for place in places], images, margins)
            found |= dict(zip(places, answers, strict=True))
        return [found[place] for place in range(len(prompts))]

    def _rendered(self, prompt: Prompt) -> str:
        """Renders one user turn with the model's chat template."""
        if IMAGE in prompt.text:
            raise DataError(
                f"the prompt of {prompt.name} holds {IMAGE!r}, which stands for an image to the "
                "model; take it out of the text"
            )
        content: list[dict[str, str]] = [{"type": "image"} for _ in prompt.images]
        content.append({"type": "text", "text": prompt.text})
        messages = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(messages, add_generation_prompt=True)

    def _batches(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> Iterator[list[int]]:
        """Yields the places of prompts that go together: of one limit and like length."""
        if not texts:
            return
        lengths = [len(ids) for ids in self.processor.tokenizer(list(texts))["input_ids"]]

        def rank(place: int) -> tuple[int, int, int]:
            """Returns what prompts of one batch should have in common."""
            prompt = prompts[place]
            return prompt.max_new_tokens, len(prompt.images), lengths[place]

        order = sorted(range(len(prompts)), key=rank)
        for _, group in groupby(order, key=lambda place: prompts[place].max_new_tokens):
            places = list(group)
            for start in range(0, len(places), self.batch_size):
                yield places[start : start + self.batch_size]

    def _decoding(self, prompts: Sequence[Prompt], places: Sequence[int]) -> list[Any]:
        """Starts to decode the images of a batch."""
        chosen = [prompts[place] for place in places]
        return [self.pool.submit(self._decoded, p, image) for p in chosen for image in p.images]

    def _decoded(self, prompt: Prompt, image: Any) -> Pixels:
        """Decodes one image."""
        try:
            return self.decode(image)
        except DataError as error:
            # Without its cause, which is an error of ours too and does not know the item.
            raise DataError(
                f"the image of {prompt.name} cannot be used ({error}); fetch the data again"
            ) from None

    def _answers(
        self,
        prompts: Sequence[Prompt],
        texts: Sequence[str],
        images: Sequence[Pixels],
        margins: bool,
    ) -> list[Answer]:
        """Answers one batch."""
        watch = _Watch(margins)
        try:
            new_BT = self._generate(texts, images, prompts[0].max_new_tokens, watch)
        except Exception as error:  # whatever goes wrong in there, a person must know where
            last = f" to {prompts[-1].name}" if len(prompts) > 1 else ""
            raise AnswerFailed(
                f"the model could not answer {prompts[0].name}{last} ({len(prompts)} at once): "
                f"{type(error).__name__}: {error}"
            ) from error
        for prompt, finite in zip(prompts, watch.finite_B, strict=True):
            if not finite:
                raise WeightsError(
                    f"the logits at {prompt.name} are not finite: the weights are damaged, or too "
                    f"large for {self.model.dtype}; compute in bf16 or fp32"
                )
        gaps = watch.margins_BT() if margins else [[]] * len(prompts)
        return [self._answer(ids, gap) for ids, gap in zip(new_BT.tolist(), gaps, strict=True)]

    @torch.no_grad()
    def _generate(
        self, texts: Sequence[str], images: Sequence[Pixels], max_new_tokens: int, watch: _Watch
    ) -> Tensor:
        """Runs the model; returns the new tokens, (B, T)."""
        inputs = self.processor(
            text=list(texts),
            images=list(images) or None,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(self.model.device, self.model.dtype)
        found_BT = self.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            logits_processor=LogitsProcessorList([watch]),
        )
        return found_BT[:, inputs["input_ids"].shape[1] :]

    def _answer(self, ids: list[int], gaps: Sequence[float]) -> Answer:
        """Cuts an answer off behind its end token."""
        end = next((n for n, token in enumerate(ids) if token in self.end_ids), len(ids) - 1)
        kept = ids[: end + 1]
        text = self.processor.tokenizer.decode(kept, skip_special_tokens=True)
        return Answer(text.strip(), tuple(kept), tuple(gaps[: len(kept)]))


@dataclass
class _Watch(LogitsProcessor):
    """Looks at the logits of every step and leaves them as they are."""

    keep_margins: bool
    gaps: list[Tensor] = field(default_factory=list)
    all_finite: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Takes (B, T) tokens so far and (B, V) logits of the next one."""
        finite_B = scores.isfinite().all(-1)
        self.all_finite = finite_B if self.all_finite is None else self.all_finite & finite_B
        if self.keep_margins:
            best_B2 = scores.topk(2).values
            self.gaps.append(best_B2[:, 0] - best_B2[:, 1])
        return scores

    @property
    def finite_B(self) -> list[bool]:
        """Which prompts had finite logits throughout."""
        assert self.all_finite is not None
        return self.all_finite.tolist()

    def margins_BT(self) -> list[list[float]]:
        """The margins, prompt by prompt."""
        return torch.stack(self.gaps, dim=1).tolist()


@dataclass(frozen=True)
class Difference:
    """Where an answer given alone and one given in a batch part.

    Attributes:
        name: The prompt's.
        step: Tokens that both share before.
        margin: The smaller one of the two margins there.
    """

    name: str
    step: int
    margin: float


@dataclass(frozen=True)
class Comparison:
    """Answers given one by one beside answers given in batches.

    Attributes:
        num_prompts: Compared.
        differing: The answers that differ.
        typical_margin: Median margin over all tokens that were generated alone.
    """

    num_prompts: int
    differing: tuple[Difference, ...]
    typical_margin: float

    @property
    def share(self) -> float:
        """Share of the answers that differ."""
        return len(self.differing) / self.num_prompts

    @property
    def largest_margin(self) -> float:
        """Largest margin at which two answers part; 0 where none do."""
        return max((difference.margin for difference in self.differing), default=0.0)


def differences(alone: Generator, together: Generator, prompts: Sequence[Prompt]) -> Comparison:
    """Compares answers that two generators of one model give.

    Until they part, both have read the same text, so that only rounding can have moved their
    logits: the margin at which they part must be one that rounding can bridge.

    Args:
        alone: With a batch size of 1.
        together: With a larger one.
        prompts: At least one.
    """
    first, second = alone(prompts, margins=True), together(prompts, margins=True)
    found: list[Difference] = []
    for prompt, one, other in zip(prompts, first, second, strict=True):
        pairs = enumerate(zip(one.token_ids, other.token_ids, strict=False))
        step = next((n for n, (a, b) in pairs if a != b), None)
        if step is not None:
            margin = min(one.margins[step], other.margins[step])
            found.append(Difference(prompt.name, step, margin))
    typical = statistics.median(margin for answer in first for margin in answer.margins)
    return Comparison(len(prompts), tuple(found), typical)
