"""Answers do not depend on batches, order or interruptions, and bad input is named."""

from __future__ import annotations

import dataclasses
import io
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import asking
import pytest
import torch
from conftest import jpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import GenerationConfig

from kdscale.core.answers_config import Answers, answers_key
from kdscale.core.journal import JournalReader, JournalWriter, read_steps
from kdscale.core.types import (
    AnswerFailed,
    CacheCorrupt,
    CacheMismatch,
    ConfigError,
    DataError,
    StageRefused,
    UnfinishedStage,
    WeightsError,
)
from kdscale.eval import answers as kept
from kdscale.eval.generate import Generator, Prompt, differences
from kdscale.eval.questions import Question
from kdscale.stages import ask as ask_module
from kdscale.stages.ask import Asker, ask, ask_all, decode_any, prompts_of
from kdscale.stages.jobs import AnswersJob
from kdscale.sweep.plan import Stage
from kdscale.sweep.status import stage_state


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return asking.build(tmp_path_factory.mktemp("vlm"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return asking.save(tmp_path_factory.mktemp("model"))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "BLOCK", 8)


def test_answers_do_not_depend_on_the_batch(vlm: tuple[Any, Any]) -> None:
    prompts = prompts_of(asking.questions(40), blind=False)
    alone = Generator(*vlm, decode_any, batch_size=1)
    together = Generator(*vlm, decode_any, batch_size=16, threads=2)
    found = differences(alone, together, prompts)
    assert (found.share, found.largest_margin) == (0.0, 0.0)
    first, second = alone(prompts, margins=True), together(prompts, margins=True)
    assert [a.text for a in first] == [b.text for b in second]
    assert len({a.text for a in first}) > 20  # the same answer to everything would prove little
    for one, other in zip(first, second, strict=True):
        assert one.margins == pytest.approx(other.margins, abs=1e-3)
    shuffled = torch.randperm(40, generator=torch.Generator().manual_seed(0)).tolist()
    again = together([prompts[place] for place in shuffled])
    assert [a.text for a in again] == [first[place].text for place in shuffled]
    limits = [prompt.max_new_tokens for prompt in prompts]
    assert all(len(a.token_ids) <= limit for a, limit in zip(first, limits, strict=True))


def test_an_answer_is_what_plain_transformers_says(vlm: tuple[Any, Any]) -> None:
    model, processor = vlm
    prompts = prompts_of(asking.questions(6), blind=False)
    ours = Generator(*vlm, decode_any, batch_size=6)(prompts)
    for prompt, answer in zip(prompts, ours, strict=True):
        image = Image.open(io.BytesIO(prompt.images[0])) if prompt.images else None
        text = f"USER: {'<image>' + chr(10) if image else ''}{prompt.text} ASSISTANT:"
        inputs = processor(text=text, images=image, return_tensors="pt")
        with torch.no_grad():
            for length in range(len(answer.token_ids)):  # step by step, without a cache
                logits = model(**inputs, use_cache=False).logits[0, -1]
                assert int(logits.argmax()) == answer.token_ids[length]
                chosen = logits.argmax().view(1, 1)
                inputs["input_ids"] = torch.cat([inputs["input_ids"], chosen], dim=1)
                inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])


def test_settings_that_came_with_the_weights_do_not_apply(vlm: tuple[Any, Any]) -> None:
    model, processor = vlm
    prompts = prompts_of(asking.questions(4), blind=False)
    expected = Generator(*vlm, decode_any)(prompts)
    odd: dict[str, Any] = {"repetition_penalty": 5.0, "do_sample": True, "temperature": 9.0}
    model.generation_config = GenerationConfig(eos_token_id=[0], min_new_tokens=5, **odd)
    assert Generator(model, processor, decode_any)(prompts) == expected


def test_in_bf16_answers_part_at_near_ties_only(tmp_path: Path) -> None:
    model, processor = asking.build(tmp_path)
    half = model.to(torch.bfloat16)
    prompts = prompts_of(asking.questions(64), blind=False)
    alone, together = (Generator(half, processor, decode_any, batch_size=n) for n in (1, 16))
    found = differences(alone, together, prompts)
    assert found.num_prompts == 64
    assert found.typical_margin > 0
    assert found.largest_margin < 0.2 * found.typical_margin, found


def test_bad_input_is_named(vlm: tuple[Any, Any]) -> None:
    generator = Generator(*vlm, decode_any)
    good = Prompt(name="mmvp 1", text="what?", images=(jpeg(1),))
    for data in (b"\xff\xd8broken", b"", b"GIF89a"):
        bad = Prompt(name="mmvp 7", text="what?", images=(data,))
        with pytest.raises(DataError, match=r"image of mmvp 7 cannot be used"):
            generator([good, bad])
    with pytest.raises(DataError, match=r"prompt of mmvp 8 holds '<image>'"):
        generator([good, Prompt(name="mmvp 8", text="<image> what?")])
    assert generator([]) == []


def test_a_failing_model_is_named(tmp_path: Path) -> None:
    model, processor = asking.build(tmp_path)
    generator = Generator(model, processor, decode_any)
    prompts = prompts_of(asking.questions(3), blind=True)
    model.lm_head.weight.data[5] = float("nan")
    with pytest.raises(WeightsError, match=r"logits at mmmu \d+ are not finite.*bf16 or fp32"):
        generator(prompts)
    model.lm_head = torch.nn.Linear(3, 3)
    with pytest.raises(AnswerFailed, match=r"could not answer mmmu \d to mmmu \d \(2 at once\)"):
        generator(prompts)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("lived_to_note_it", [True, False])
def test_a_stage_goes_on_where_it_stopped(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch, lived_to_note_it: bool
) -> None:
    asked = asking.questions(20)
    whole = asking.job(tmp_path / "whole", model, asked)
    told: list[tuple[int, int]] = []
    ask(whole, asked, lambda *at: told.append(at))
    assert told == [(0, 20), (8, 20), (16, 20), (20, 20)]
    assert whole.stage.is_done()
    items = kept.load_items(whole.stage)
    assert [item["item_id"] for item in items] == [str(n) for n in range(20)]
    for item, question in zip(items, asked, strict=True):
        assert item == question.item(item["prediction"])

    cut = asking.job(tmp_path / "cut", model, asked, batch_size=3)
    assert cut.key == whole.key
    first, *_ = kept.blocks_of(asked)
    Asker([cut])(pickle.dumps((0, first)))
    if lived_to_note_it:
        JournalWriter(cut.stage, 1).append({"step": 8, "block": 0})
    with pytest.raises(UnfinishedStage, match="1 blocks of answers of 3; ask again"):
        kept.load_items(cut.stage)
    seen: list[str] = []
    real = ask_module.prompts_of

    def noted(questions: tuple[Question, ...], **options: Any) -> list[Prompt]:
        seen.extend(question.item_id for question in questions)
        return real(questions, **options)

    monkeypatch.setattr(ask_module, "prompts_of", noted)
    ask(cut, asked)
    assert seen == [str(n) for n in range(8 if lived_to_note_it else 0, 20)]
    assert kept.load_items(cut.stage) == items
    assert [line["step"] for line in read_steps(cut.stage)] == [8, 16, 20]


@pytest.mark.usefixtures("small_blocks")
def test_the_journal_counts_questions_and_repeats_no_step(tmp_path: Path, model: str) -> None:
    asked = asking.questions(20)
    job = asking.job(tmp_path, model, asked)

    def give_up(done: int, total: int) -> None:
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask(job, asked, give_up)
    recipe = job.recipe
    stage = Stage(
        kind=job.kind,
        key=job.key,
        name="mmmu",
        recipe=recipe,
        inputs=(),
        num_samples=20,
        total_steps=20,
        flops=0.0,
        bytes_out=0.0,
        reused=False,
    )
    state, words = stage_state(stage, job.stage.storage)
    assert state == "interrupted"
    assert words.startswith("question 8/20  ")
    ask(job, asked)
    lines = JournalReader(job.stage).new_lines()
    assert [line["step"] for line in lines] == [8, 16, 20]
    assert all(line["samples_per_s"] > 0 for line in lines)
    assert stage_state(stage, job.stage.storage) == ("done", "")


@pytest.mark.usefixtures("small_blocks")
def test_several_benchmarks_load_the_model_once(tmp_path: Path) -> None:
    model, asked = asking.save(tmp_path / "vlm"), asking.questions(12)
    jobs = [asking.job(tmp_path, model, asked, blind=blind) for blind in (False, True)]
    other = [replace(q, benchmark="gqa") for q in asked]
    third = asking.job(tmp_path, model, tuple(other), benchmark="gqa")
    told: list[str] = []

    def tell(job: AnswersJob, done: int, total: int) -> None:
        told.append(f"{job.recipe.benchmark} {job.recipe.blind} {done}/{total}")
        if done:  # from here on it is held, not read again
            shutil.rmtree(model, ignore_errors=True)

    ask_all([(jobs[0], asked), (jobs[1], asked), (third, other)], tell)
    assert told == [
        *("mmmu False 0/12", "mmmu False 8/12", "mmmu False 12/12"),
        *("mmmu True 0/12", "mmmu True 8/12", "mmmu True 12/12"),
        *("gqa False 0/12", "gqa False 8/12", "gqa False 12/12"),
    ]
    light, _, last = ([i["prediction"] for i in kept.load_items(j.stage)] for j in (*jobs, third))
    assert light == last


@pytest.mark.usefixtures("small_blocks")
def test_what_does_not_fit_is_refused(tmp_path: Path, model: str) -> None:
    asked = asking.questions(10)
    job = asking.job(tmp_path, model, asked)
    ask(job, asked)
    changed = (replace(asked[0], prompt="something else"), *asked[1:])
    with pytest.raises(DataError, match="questions of mmmu in None have changed"):
        ask(job, changed)
    with pytest.raises(CacheMismatch, match="answers other questions than mmmu 0 to 7"):
        kept.missing(job.stage, kept.blocks_of(changed))
    with pytest.raises(DataError, match="2 questions with the item id '3'"):
        kept.blocks_of([*asked, asked[3]])
    with pytest.raises(DataError, match="none at all"):
        kept.blocks_of([])
    path = Path(job.stage.url("output", "00001.parquet"))
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CacheCorrupt, match=r"00001\.parquet is damaged"):
        kept.load_items(job.stage)


def test_a_malformed_image_ends_the_stage_for_good(tmp_path: Path, model: str) -> None:
    asked = (*asking.questions(3), replace(asking.questions(4)[3], image=b"\x89PNG"))
    job = asking.job(tmp_path, model, asked)
    with pytest.raises(StageRefused, match=r"the image of mmmu 3 cannot be used"):
        ask(job, asked)
    assert not job.stage.is_done()
    blind = asking.job(tmp_path, model, asked, blind=True)
    assert blind.key != job.key
    ask(blind, asked)  # who does not look is not disturbed
    seeing = asking.job(tmp_path, model, asking.questions(4))
    ask(seeing, asking.questions(4))
    one, other = ([i["prediction"] for i in kept.load_items(j.stage)] for j in (blind, seeing))
    assert sum(a != b for a, b in zip(one, other, strict=True)) >= 2


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 300))
def test_blocks_hold_every_question_once(count: int) -> None:
    asked = [
        Question(benchmark="gqa", item_id=str(n), prompt="", image=None, image_sha256="", gold="")
        for n in range(count)
    ]
    blocks = kept.blocks_of(asked)
    assert [q for block in blocks for q in block.questions] == asked
    assert all(len(block.questions) == kept.BLOCK for block in blocks[:-1])
    assert {block.count for block in blocks} == {len(blocks)}
    assert len({block.about["questions"] for block in blocks}) == len(blocks)


def test_the_key_holds_what_changes_numbers(tmp_path: Path, model: str) -> None:
    asked = asking.questions(3)
    base = asking.job(tmp_path, model, asked).recipe
    key = answers_key(base)
    same = [base.replace(batch_size=4), base.replace(attention="eager"), base.replace(data="x")]
    other = [
        base.replace(blind=True),
        base.replace(limit=2),
        base.replace(benchmark="gqa"),
        base.replace(questions="0" * 16),
        base.replace(model="stage:finetune/" + "a" * 16),
        half := base.replace(precision="bf16"),
        half.replace(batch_size=4),
        half.replace(attention="eager"),
    ]
    assert {answers_key(recipe) for recipe in same} == {key}
    assert len({key, *map(answers_key, other)}) == 1 + len(other)
    copied = tmp_path / "copied"
    copied.mkdir()
    for file in Path(model).iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    assert answers_key(base.replace(model=str(copied))) == key
    (copied / "config.json").write_text("{}")
    assert answers_key(base.replace(model=str(copied))) != key
    with pytest.raises(ConfigError, match="batch_size"):
        Answers(model="m", benchmark="gqa", questions="", batch_size=0)


def test_a_digest_covers_every_field_but_the_bytes() -> None:
    question = asking.questions(2)[1]
    digest = kept.questions_digest([question])
    assert kept.questions_digest([replace(question, image=None)]) == digest
    changes: dict[str, Any] = {
        field.name: 9 if field.name == "max_new_tokens" else "other"
        for field in dataclasses.fields(question)
        if field.name not in ("image", "options")
    }
    changes["options"] = ("other",)
    digests = {kept.questions_digest([replace(question, **{k: v})]) for k, v in changes.items()}
    assert len(digests | {digest}) == len(changes) + 1
