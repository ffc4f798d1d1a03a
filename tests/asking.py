"""A small VLM that says different things, and questions to ask it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from conftest import jpeg
from vlm_parts import CHAT, language, tower

from kdscale.core.answers_config import Answers, answers_key
from kdscale.core.config import Execution
from kdscale.core.vlm_config import Finetune
from kdscale.eval.answers import questions_digest
from kdscale.eval.questions import Question
from kdscale.stages.jobs import AnswersJob

BENCHMARK, LIMIT = "mmmu", 6
WORDS = ("what", "is", "there", "left of", "the red", "square?", "how", "many")


def build(folder: Path) -> tuple[Any, Any]:
    """Builds a VLM whose weights are drawn large, so that its answers vary with the question."""
    from kdscale.models import vlm
    from kdscale.models.hf_towers import vision_model
    from kdscale.models.language import load_language
    from kdscale.models.towers import build_clip

    spec, llm = tower("vit_t16"), language("qwen2_0_5b", folder)
    recipe = Finetune(vision=spec, llm=llm, data="llava_mix_665k")
    body, tokenizer = load_language(llm, seed=2)
    vision = vision_model(build_clip(spec, seed=1), spec, "last")
    model, processor = vlm.build_vlm(vision, body, tokenizer, recipe, spec, chat_template=CHAT)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "vision_tower" not in name:
                weight.mul_(6.0)
    return model.eval(), processor


def save(folder: Path) -> str:
    """Writes the VLM as a finetune stage would, and returns where."""
    from kdscale.models.vlm import save_vlm

    folder.mkdir(parents=True, exist_ok=True)
    save_vlm(*build(folder), folder / "model")
    return str(folder / "model")


@cache
def questions(count: int) -> tuple[Question, ...]:
    """Asks about some images, of different length; every seventh question has none."""
    found: list[Question] = []
    for number in range(count):
        image = None if number % 7 == 6 else jpeg(number // 2)
        words = [WORDS[(number * 3 + k) % len(WORDS)] for k in range(1 + number * 5 % 11)]
        found.append(
            Question(
                benchmark=BENCHMARK,
                item_id=str(number),
                prompt=" ".join(words),
                image=image,
                image_sha256="" if image is None else f"{number // 2:064x}",
                gold=("a", "b") if number % 3 else "a",
                options=("x", "y") if number % 2 else (),
                group=str(number // 2),
                max_new_tokens=LIMIT + number % 2,
            )
        )
    return tuple(found)


def long_questions(count: int) -> tuple[Question, ...]:
    """Asks the same for long answers, which leave time to kill somebody."""
    return tuple(replace(question, max_new_tokens=40) for question in questions(count))


def job(root: Path | str, model: str, asked: tuple[Question, ...], **fields: Any) -> AnswersJob:
    """Makes the job that asks them."""
    here = Execution(num_workers=0)
    options = {"benchmark": BENCHMARK, "questions": questions_digest(asked), "run": here} | fields
    recipe = Answers(model=model, **options)
    return AnswersJob(answers_key(recipe), str(root), recipe, {"kind": "answers"})
