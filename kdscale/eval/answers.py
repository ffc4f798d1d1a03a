"""Short answers of a VLM: batched greedy generation.

Shape suffixes: B prompts, T tokens.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

BATCH_SIZE = 32


@torch.no_grad()
def answer(
    model: Any,
    processor: Any,
    questions: Sequence[tuple[str, bytes | None]],
    *,
    max_new_tokens: int,
) -> list[str]:
    """Asks a VLM questions, greedily, through its own chat template and image processor.

    Args:
        model: A `LlavaForConditionalGeneration` in evaluation mode.
        processor: Its processor.
        questions: (prompt, encoded image or None) each.
        max_new_tokens: Length of an answer.

    Returns:
        The answers in order; they do not depend on the size of the batches beyond rounding.
    """
    texts = [_prompt(processor, text, image is not None) for text, image in questions]
    order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
    answers = [""] * len(texts)
    for start in range(0, len(order), BATCH_SIZE):
        places = order[start : start + BATCH_SIZE]
        images = [_image(data) for p in places if (data := questions[p][1]) is not None]
        inputs = processor(
            text=[texts[p] for p in places],
            images=images or None,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(model.device)
        found = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        new_BT = found[:, inputs["input_ids"].shape[1] :]
        for place, text in zip(
            places, processor.batch_decode(new_BT, skip_special_tokens=True), strict=True
        ):
            answers[place] = text.strip()
    return answers


def _prompt(processor: Any, text: str, with_image: bool) -> str:
    """Renders one user turn."""
    content: list[dict[str, str]] = [{"type": "image"}] if with_image else []
    content.append({"type": "text", "text": text})
    messages = [{"role": "user", "content": content}]
    return processor.apply_chat_template(messages, add_generation_prompt=True)


def _image(data: bytes) -> Image.Image:
    """Opens an encoded image."""
    return Image.open(io.BytesIO(data)).convert("RGB")
