"""The VLM stages through their own function, in process: train, resume, save, answer."""

from __future__ import annotations

import io
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from threading import Event
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import jpeg
from safetensors.torch import load_file, save_file
from talks import manifest_of, parts_of, talk, write_talks
from vlm_parts import LANGUAGES, TOWERS, language, tower

from kdscale.core.checkpoints import Checkpoints
from kdscale.core.config import DataSpec, Execution, MiniWorld
from kdscale.core.journal import JournalReader, read_steps
from kdscale.core.scale import TRUE_SIZE_CPU, language_model
from kdscale.core.storage import Storage
from kdscale.core.types import (
    CheckpointError,
    ConfigError,
    DataError,
    StageStopped,
    TrainingDiverged,
)
from kdscale.core.vlm_config import Evaluate, Finetune, Pretrain, QuestionsSpec
from kdscale.core.vlm_recipes import VLM_RECIPES
from kdscale.data.instruct_stream import InstructBatch, InstructStream
from kdscale.data.shards import Manifest
from kdscale.models.trainable import trainable_names
from kdscale.stages.answer import EvaluateRun
from kdscale.stages.jobs import EvaluateJob, VlmJob
from kdscale.stages.loop import World
from kdscale.stages.streams import instruct_config, vlm_inputs
from kdscale.stages.vlm import LEARNT, build, draw
from kdscale.stages.vlm_run import FACTS, VlmRun, pack, unpack

STEPS = 2
SMALL = {
    "global_batch_size": 4,
    "micro_batch_size": 2,
    "group_size": 4,
    "precision": "fp32",
    "max_length": 512,
    "warmup_ratio": 0.0,
    "run": Execution(num_workers=0, checkpoint_every=2, log_every=1),
}


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory, write_tar: Any) -> Manifest:
    return manifest_of(write_talks(tmp_path_factory.mktemp("talks"), write_tar))


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory, write_tar: Any) -> Manifest:
    folder = tmp_path_factory.mktemp("captions")
    members = [part for n in range(0, 24, 3) for part in parts_of(f"{n:06d}", n)]
    write_tar(folder / "0.tar", members)
    return manifest_of(f"{folder}/*.tar")


def jobs(
    root: Path, recipe: str, names: tuple[str, str], data: tuple[Manifest, Manifest]
) -> tuple[VlmJob, VlmJob]:
    """Makes both stages of a small VLM; the second one's projector is the first one's."""
    shared: dict[str, Any] = {
        "vision": tower(names[0]),
        "llm": language(names[1], root),
        **SMALL,
        "data": DataSpec(name="t", urls="elsewhere"),
    }
    keys = ("a" * 16, "b" * 16)
    first = Pretrain(**VLM_RECIPES[recipe][0] | shared)
    second = Finetune(**VLM_RECIPES[recipe][1] | shared, projector=f"stage:pretrain/{keys[0]}")
    made = [
        VlmJob(stage.kind, key, str(root / "store"), stage, STEPS, manifest, vlm_inputs(stage), {})
        for stage, key, manifest in zip((first, second), keys, data, strict=True)
    ]
    return made[0], made[1]


def changed(job: VlmJob, **fields: Any) -> VlmJob:
    """Returns a job with other recipe fields."""
    return replace(job, recipe=job.recipe.replace(**fields))


def attempt(job: VlmJob, stop: int | None = None) -> list[float]:
    """Runs a stage to its end, or until a step that dies; returns the losses so far."""

    def batches(start: int) -> Iterator[InstructBatch]:
        config = replace(instruct_config(job), start_step=start, own_steps=job.total_steps)
        for batch in InstructStream(None, config, 0):
            if batch.step == stop:
                raise KeyboardInterrupt
            yield batch

    run = VlmRun(job, World(), lambda _: None)
    if stop is None:
        run.train(batches)
    else:
        with pytest.raises(KeyboardInterrupt):
            run.train(batches)
        run.checkpoints.wait()
    return [line["total"] for line in read_steps(job.stage)]


@pytest.mark.parametrize(
    ("recipe", "names"),
    [
        (recipe, names)
        for recipe in ("tinyllava", "bunny")
        for names in itertools.product(TOWERS, LANGUAGES)
    ],
)
def test_every_combination_trains_saves_and_answers(
    recipe: str, names: tuple[str, str], tmp_path: Path, talks: Manifest, captions: Manifest
) -> None:
    pretrain, finetune = jobs(tmp_path, recipe, names, (captions, talks))
    for job in (pretrain, finetune):
        assert len(attempt(job)) == STEPS
        assert job.stage.is_done()
    table = pa.table(
        {
            "item_id": ["1", "2"],
            "family": ["existence"] * 2,
            "prompt": ["is it?", "what colour?"],
            "gold": ["yes", "red"],
            "chance": [0.5, 0.1],
            "group": ["1", "1"],
            "image": [jpeg(1), jpeg(2)],
        }
    )
    pq.write_table(table, tmp_path / "questions.parquet")
    world = MiniWorld(split="eval", content="instruct", num_samples=7)
    ask = Evaluate(
        model=f"stage:finetune/{finetune.key}",
        questions=QuestionsSpec(name="t", mini=world, max_new_tokens=3),
    )
    questions = str(tmp_path / "questions.parquet")
    job = EvaluateJob("c" * 16, finetune.storage_root, ask, questions, {})
    EvaluateRun(job, World(), lambda _: None).train()
    data = job.stage.storage.read(*job.stage.parts, "output", "answers.parquet")
    rows = pq.read_table(io.BytesIO(data)).to_pylist()
    assert [row["item_id"] for row in rows] == ["1", "2"]
    assert all(isinstance(row["blind_prediction"], str) for row in rows)


@pytest.mark.parametrize("recipe", ["tinyllava", "bunny", "tinyllava_modern"])
def test_a_resumed_stage_is_the_uninterrupted_one(
    recipe: str, tmp_path: Path, talks: Manifest, captions: Manifest
) -> None:
    """Dropout, schedule and optimizer included; only what was repeated is logged twice."""
    names, losses, weights = ("vit_t16", "qwen2_0_5b"), {}, {}
    for where, stop in (("whole", None), ("killed", 5)):
        folder = tmp_path / where
        folder.mkdir()
        pretrain, finetune = jobs(folder, recipe, names, (captions, talks))
        attempt(pretrain)
        finetune = replace(finetune, total_steps=7)
        if stop is not None:
            assert len(attempt(finetune, stop)) == stop
            assert Checkpoints(finetune.stage, keep=1).latest_step() == 4
            assert not finetune.stage.is_done()
        losses[where] = attempt(finetune)
        with finetune.stage.storage.local_directory(*finetune.stage.parts, "output") as out:
            weights[where] = load_file(f"{out}/model/model.safetensors")
    assert losses["whole"] == losses["killed"]
    assert weights["whole"].keys() == weights["killed"].keys()
    for name, value in weights["whole"].items():
        assert torch.equal(value, weights["killed"][name]), name


@pytest.mark.parametrize("step", [4, 5])
def test_a_notice_is_heeded_while_data_are_waited_for(
    step: int, tmp_path: Path, talks: Manifest, captions: Manifest
) -> None:
    """Whether the last step has written its checkpoint anyhow, every second one, or has not.

    And by an attempt that went on with another interval.
    """
    _, job = jobs(tmp_path, "tinyllava", ("vit_t16", "qwen2_0_5b"), (captions, talks))
    job = replace(changed(job, projector=None), total_steps=7)
    waits = Event()

    def batches(start: int) -> Iterator[InstructBatch]:
        config = replace(instruct_config(job), start_step=start, own_steps=job.total_steps)
        yield from itertools.islice(InstructStream(None, config, 0), step - start)
        waits.set()
        Event().wait()

    seldom = changed(job, run=Execution(num_workers=0, checkpoint_every=3, log_every=100))
    attempt(seldom, stop=3)
    with pytest.raises(StageStopped):
        VlmRun(job, World(noticed=waits.is_set), lambda _: None).train(batches)
    assert Checkpoints(job.stage, keep=1).latest_step() == step
    assert len(attempt(job)) == job.total_steps
    assert [line["step"] for line in JournalReader(job.stage).new_lines()] == [*range(1, 8)]


def test_loss_norms_differ_where_they_should(
    tmp_path: Path, talks: Manifest, captions: Manifest
) -> None:
    """One micro-batch: the same. Several of uneven length: means of means are not the mean."""
    _, job = jobs(tmp_path, "tinyllava", ("vit_t16", "qwen2_0_5b"), (captions, talks))
    job = changed(job, projector=None, length_grouping=False)
    first: dict[tuple[str, int], float] = {}
    for number, (norm, micro) in enumerate(itertools.product(("micro_batch", "update"), (2, 4))):
        one = replace(
            changed(job, loss_norm=norm, micro_batch_size=micro),
            key=f"{number:016x}",
            total_steps=1,
        )
        first[norm, micro] = attempt(one)[0]
    assert first["micro_batch", 4] == pytest.approx(first["update", 4], rel=1e-6)
    assert first["update", 2] == pytest.approx(first["update", 4], rel=1e-6)
    assert first["micro_batch", 2] != pytest.approx(first["update", 2], rel=1e-7)


def test_only_what_learns_is_saved(tmp_path: Path, talks: Manifest, captions: Manifest) -> None:
    pretrain, _ = jobs(tmp_path, "tinyllava", ("vit_t16", "qwen2_0_5b"), (captions, talks))
    pretrain = replace(changed(pretrain, epochs=2), total_steps=3)
    attempt(pretrain, stop=2)
    folder = tmp_path / "unpacked"
    unpack(Checkpoints(pretrain.stage, keep=1).load(2), folder)
    saved = set(load_file(folder / "learnt.safetensors"))
    assert saved == trainable_names(build(pretrain, torch.device("cpu")).model)
    assert unpacked_again(folder) == {path.name for path in folder.iterdir()}


def unpacked_again(folder: Path) -> set[str]:
    """Packs a folder and unpacks it beside."""
    other = folder.with_name("again")
    unpack(pack(folder), other)
    return {path.name for path in other.iterdir()}


def test_a_diverging_loss_is_named(tmp_path: Path, talks: Manifest, captions: Manifest) -> None:
    pretrain, _ = jobs(tmp_path, "bunny", ("vit_t16", "smollm_360m"), (captions, talks))
    wild = replace(changed(pretrain, lr=1e30), total_steps=4)
    with pytest.raises(TrainingDiverged, match="lower lr or clip gradients"):
        attempt(wild)


def test_the_journal_tells_the_rates_that_a_step_used(tmp_path: Path, talks: Manifest) -> None:
    _, job = jobs(tmp_path, "bunny", ("vit_t16", "qwen2_0_5b"), (talks, talks))
    rates = {"lr": 2e-4, "projector_lr": 2e-5, "warmup_ratio": 0.5}
    attempt(replace(changed(job, projector=None, **rates), total_steps=4))
    lines = read_steps(job.stage)
    for name in ("lr", "projector_lr"):
        peak = rates[name]
        assert [line[name] for line in lines] == pytest.approx([0, peak / 2, peak, peak / 2])


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_a_sharded_stage_that_ended_after_its_last_checkpoint_is_finished(
    tmp_path: Path, talks: Manifest, zero_stage: int
) -> None:
    """In a process of its own: DeepSpeed leaves marks in one."""
    process = get_context("spawn").Process(
        target=finish_sharded, args=(tmp_path, talks, zero_stage)
    )
    process.start()
    process.join(120)
    assert process.exitcode == 0


def finish_sharded(folder: Path, talks: Manifest, zero_stage: int) -> None:
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    os.environ.update(place, MASTER_ADDR="127.0.0.1", MASTER_PORT=f"2961{zero_stage}")
    run = Execution(num_workers=0, checkpoint_every=2, deepspeed=True)
    _, job = jobs(folder, "bunny", ("vit_t16", "qwen2_0_5b"), (talks, talks))
    job = replace(changed(job, projector=None, run=run, zero_stage=zero_stage), total_steps=4)
    with pytest.MonkeyPatch.context() as broken:
        broken.setattr(VlmRun, "_write_output", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            attempt(job)
    assert not job.stage.is_done()
    attempt(job)
    assert job.stage.is_done()


def test_a_checkpoint_of_other_workers_is_refused_under_deepspeed(
    tmp_path: Path, talks: Manifest, captions: Manifest
) -> None:
    pretrain, _ = jobs(tmp_path, "bunny", ("vit_t16", "smollm_360m"), (captions, talks))
    longer = replace(changed(pretrain, epochs=2), total_steps=3)
    attempt(longer, stop=2)
    sharded = changed(longer, run=Execution(num_workers=1, deepspeed=True))
    with pytest.raises(CheckpointError, match=r"written by 1 worker.*without DeepSpeed"):
        attempt(sharded)


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"template": "qwen2_instruct"}, "template 'qwen2_instruct' ends answers with"),
        ({"max_length": 150}, "max_length 150 leaves no room for text beside an image"),
        ({"max_length": 513}, "beyond the 512 positions that qwen2_0_5b was trained for"),
    ],
)
def test_a_stage_that_could_learn_nothing_is_refused(
    fields: dict[str, Any], found: str, tmp_path: Path, talks: Manifest
) -> None:
    _, job = jobs(tmp_path, "tinyllava", ("vit_t16", "qwen2_0_5b"), (talks, talks))
    with pytest.raises(ConfigError, match=found):
        vlm_inputs(changed(job, **fields).recipe)


@pytest.mark.parametrize("name", LANGUAGES)
def test_recipes_fit_the_language_models_of_the_study(name: str) -> None:
    """At true lengths, with the tower of the most tokens."""
    parts: dict[str, Any] = {
        "vision": TRUE_SIZE_CPU.teachers["siglip_so400m"],
        "llm": language_model(name, TRUE_SIZE_CPU),
    }
    for settings in itertools.chain.from_iterable(VLM_RECIPES.values()):
        assert vlm_inputs(Finetune(**settings | parts)).num_image_tokens in (728, 729)


def masked_talks(folder: Path, write_tar: Any, masked: range) -> Manifest:
    """Writes eight samples; an answer that spells out the end masks its sample."""
    members: list[tuple[str, bytes]] = []
    for number in range(8):
        answer = "a <|endoftext|> b" if number in masked else "a thing"
        record = {"id": str(number), "conversations": talk("what is it?", answer)}
        members.append((f"{number:06d}.json", json.dumps(record).encode()))
    return manifest_of(write_tar(folder / "0.tar", members))


def test_masked_samples_are_counted_and_a_step_of_them_is_refused(
    tmp_path: Path, write_tar: Any, talks: Manifest
) -> None:
    _, job = jobs(tmp_path, "tinyllava", ("vit_t16", "qwen2_0_5b"), (talks, talks))
    job = changed(job, projector=None)
    some = replace(job, data=masked_talks(tmp_path, write_tar, range(3)))
    attempt(some)
    assert sum(line["masked"] for line in read_steps(some.stage)) == 3 / 4
    every = replace(job, key="e" * 16, data=masked_talks(tmp_path, write_tar, range(8)))
    with pytest.raises(DataError, match="step 1 teaches nothing: all of its 4 samples"):
        attempt(every)
    assert not every.stage.is_done()


def test_a_stage_that_missed_steps_is_not_done(tmp_path: Path, talks: Manifest) -> None:
    _, job = jobs(tmp_path, "tinyllava", ("vit_t16", "qwen2_0_5b"), (talks, talks))
    job = changed(job, projector=None)
    stream = InstructStream(None, replace(instruct_config(job), own_steps=STEPS), 0)
    with pytest.raises(DataError, match="ended after step 1 of 2"):
        VlmRun(job, World(), lambda _: None).train(lambda _: itertools.islice(stream, 1))
    assert not job.stage.is_done()


def test_a_damaged_checkpoint_is_named_and_the_one_before_goes_on(
    tmp_path: Path, talks: Manifest
) -> None:
    _, job = jobs(tmp_path, "tinyllava", ("vit_t16", "qwen2_0_5b"), (talks, talks))
    job = replace(changed(job, projector=None), total_steps=5)
    attempt(job, stop=4)
    newest = tmp_path.joinpath("store", *job.stage.parts, "checkpoints", "step-000000004.pt")
    whole = newest.read_bytes()
    for damaged in (
        whole[: len(whole) // 2],
        b"",
        whole[10240:],
        pack_without_facts(whole, tmp_path),
    ):
        newest.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=rf"{newest}.*goes on from step 2"):
            attempt(job)
    newest.unlink()
    assert len(attempt(job)) == 5
    assert job.stage.is_done()


def pack_without_facts(checkpoint: bytes, scratch: Path) -> bytes:
    """Packs a checkpoint without its last file, as one that was cut between two is read."""
    unpack(checkpoint, scratch / "cut")
    (scratch / "cut" / FACTS).unlink()
    return pack(scratch / "cut")


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, talks: Manifest) -> None:
    _, job = jobs(tmp_path, "tinyllava", ("vit_t16", "qwen2_0_5b"), (talks, talks))
    job = replace(changed(job, projector=None), total_steps=3)
    attempt(job, stop=2)
    checkpoints, folder = Checkpoints(job.stage, keep=1), tmp_path / "unpacked"
    unpack(checkpoints.load(2), folder)
    state = load_file(folder / LEARNT)
    name = "model.multi_modal_projector.linear_1.bias"
    fewer = {key: value for key, value in state.items() if key != name}
    for other in (fewer, state | {name: torch.zeros(3)}):
        save_file(other, folder / LEARNT)
        checkpoints.save(2, pack(folder))
        checkpoints.wait()
        with pytest.raises(CheckpointError, match=r"another model.*remove the stage's checkpoints"):
            attempt(job)
    (folder / LEARNT).write_bytes(b"no tensors")
    checkpoints.save(2, pack(folder))
    checkpoints.wait()
    with pytest.raises(CheckpointError, match=r"learnt.safetensors of checkpoint-2 cannot be read"):
        attempt(job)


def test_noise_is_a_function_of_seed_step_and_place() -> None:
    drawn = [draw(*at) for at in itertools.product(range(3), range(3), range(3))]
    assert len(set(drawn)) == 27
    assert drawn[0] == draw(0, 0, 0)


def test_storage_of_a_stage_holds_what_the_next_one_reads(
    tmp_path: Path, talks: Manifest, captions: Manifest
) -> None:
    pretrain, finetune = jobs(tmp_path, "bunny", ("clip_b16", "qwen2_0_5b"), (captions, talks))
    attempt(pretrain)
    storage = Storage(pretrain.storage_root)
    with storage.local_directory("stages", "pretrain", pretrain.key, "output") as directory:
        learnt = load_file(f"{directory}/projector.safetensors")
    model = build(finetune, torch.device("cpu")).model
    for name, value in model.model.multi_modal_projector.state_dict().items():
        assert torch.equal(value, learnt[name])
