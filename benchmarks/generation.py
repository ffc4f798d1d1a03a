"""Answers a second: batches beside a plain `generate` loop over one question at a time.

Both answer the same questions with the same model in one process, images decoded and prompts
tokenised on the way; answers are compared. In bf16 the share of answers that differ is reported,
and the largest margin of two logits at which any of them part.

    python benchmarks/generation.py [--true-size] [--device cuda] [--questions 64] [--batch 16]
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from _common import gpu_name, photograph, settle, table
from PIL import Image

from kdscale.core.scale import MINI, TRUE_SIZE_CPU, language_model
from kdscale.core.vlm_config import Finetune
from kdscale.data.samples import decode
from kdscale.data.templates import chat_template
from kdscale.eval.generate import Comparison, Generator, Prompt, differences
from kdscale.models.hf_towers import vision_model
from kdscale.models.language import load_language
from kdscale.models.towers import load_tower
from kdscale.models.vlm import build_vlm

Tokens = tuple[int, ...]  # texts would not do: random weights mostly give unprintable tokens

NEW_TOKENS = 16
IMAGES = 16
QUESTION = "How many red squares are left of the blue circle"
ENDING = "Answer the question using a single word or phrase."


def build(true_size: bool) -> tuple[Any, Any]:
    """Builds ViT-T and Qwen2-0.5B, miniature or at true size, with random weights."""
    scale = TRUE_SIZE_CPU if true_size else MINI.replace(random_weights=True)
    tower, llm = scale.students["vit_t16"], language_model("qwen2_0_5b", scale)
    recipe = Finetune(vision=tower, llm=llm, data="llava_mix_665k")
    with tempfile.TemporaryDirectory() as root:
        from kdscale.core.storage import Storage

        clip = load_tower(tower.replace(weights="random"), Storage(root))
    language, tokenizer = load_language(llm.replace(weights="random"))
    vision = vision_model(clip, tower, recipe.hierarchical_tokens)
    template = chat_template(recipe.template)
    return build_vlm(vision, language, tokenizer, recipe, tower, chat_template=template)


def prompts_of(count: int) -> list[Prompt]:
    """Asks short and longer questions about photograph-like images."""
    images = [photograph(seed, 336) for seed in range(min(IMAGES, count))]
    return [
        Prompt(
            name=f"item {number}",
            text=f"{QUESTION}{' and the green one' * (number * 5 % 7)}?\n{ENDING}",
            images=(images[number % len(images)],),
            max_new_tokens=NEW_TOKENS,
        )
        for number in range(count)
    ]


@torch.no_grad()
def one_by_one(model: Any, processor: Any, prompts: list[Prompt]) -> list[Tokens]:
    """What a script does that asks one question after the other; returns the tokens."""
    found: list[Tokens] = []
    for prompt in prompts:
        content = [{"type": "image"}, {"type": "text", "text": prompt.text}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        image = Image.open(io.BytesIO(prompt.images[0])).convert("RGB")
        inputs = processor(text=text, images=image, return_tensors="pt")
        inputs = inputs.to(model.device, model.dtype)
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=prompt.max_new_tokens)
        new = ids[0, inputs["input_ids"].shape[1] :]
        processor.decode(new, skip_special_tokens=True)
        found.append(tuple(new.tolist()))
    return found


def timed(work: Callable[[], list[Tokens]], device: torch.device) -> tuple[list[Tokens], float]:
    """Returns the answers and the seconds that they took."""
    began = time.perf_counter()
    found = work()
    settle(device)
    return found, time.perf_counter() - began


def rows_of(plain: tuple[list[Tokens], float], ours: tuple[list[Tokens], float], batch: int) -> Any:
    """Returns the table's rows."""
    (first, slow_s), (second, fast_s) = plain, ours
    same = sum(a == b for a, b in zip(first, second, strict=True)) / len(first)
    speeds = f"{len(first) / slow_s:.1f}", f"{len(first) / fast_s:.1f}"
    return [
        ("plain loop, one at a time", speeds[0], "1.0", ""),
        (f"batches of {batch}", speeds[1], f"{slow_s / fast_s:.1f}", f"{same:.1%}"),
    ]


def describe(found: Comparison, batch: int) -> str:
    """Says how answers given alone differ from those given in batches."""
    return (
        f"batch 1 beside batch {batch}: {found.share:.1%} of the answers differ; where they part, "
        f"the two best logits are at most {found.largest_margin:.3g} apart (typically "
        f"{found.typical_margin:.3g})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--true-size", action="store_true", help="ViT-T and Qwen2-0.5B, bf16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    options = parser.parse_args()
    model, processor = build(options.true_size)
    dtype = torch.bfloat16 if options.true_size else torch.float32
    device = torch.device(options.device)
    model = model.to(device, dtype).eval()
    prompts, batch = prompts_of(options.questions), options.batch
    together = Generator(model, processor, decode, batch_size=batch)
    alone = Generator(model, processor, decode, batch_size=1)
    one_by_one(model, processor, prompts[:2])
    together(prompts[:batch])
    plain = timed(lambda: one_by_one(model, processor, prompts), device)
    ours = timed(lambda: [answer.token_ids for answer in together(prompts)], device)
    size = "true size, bf16" if options.true_size else "miniature, fp32"
    title = f"Generation, {size}, {len(prompts)} questions, {NEW_TOKENS} tokens, {device.type}"
    title += gpu_name(device)
    header = ("how", "answers/s", "times", "same answers")
    print(table(title, header, rows_of(plain, ours, batch)))
    print(describe(differences(alone, together, prompts), batch))


if __name__ == "__main__":
    main()
