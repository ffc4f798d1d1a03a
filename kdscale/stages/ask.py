"""The answers stage: a VLM answers the questions of one benchmark, block by block.

The unit of work is a block of questions (`kdscale.eval.answers`); a block that is written is not
asked again.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

from transformers.utils import logging

from kdscale.core.answers_config import Answers
from kdscale.core.config import STAGE_WEIGHTS, Precision
from kdscale.core.storage import Storage, check_lease
from kdscale.core.types import DataError
from kdscale.data.samples import decode
from kdscale.eval.answers import Block, blocks_of, missing, questions_digest, write_block
from kdscale.eval.generate import Generator, Prompt
from kdscale.eval.questions import Question
from kdscale.models.language import DTYPES
from kdscale.models.vlm import attention_for, load_vlm
from kdscale.stages.by_shard import device_for, run_shards, shard_row, threads_of
from kdscale.stages.jobs import AnswersJob
from kdscale.stages.loop import check_precision


class Asker:
    """Answers blocks of questions with one model, loaded once.

    Args:
        job: Whom to ask what.
        device: Where the model runs, None for a GPU if there is one.
        threads: Threads that decode ahead.

    Raises:
        WeightsError: There is no such model.
        PrecisionError, ConfigError: It cannot run here like that.
    """

    def __init__(self, job: AnswersJob, device: str | None = None, threads: int = 1) -> None:
        recipe, place = job.recipe, device_for(device)
        self.job = job
        check_precision(recipe.precision, place.type)
        if recipe.attention == "flash_attention_2":
            attention_for(recipe.attention, place, recipe.precision)
        logging.disable_progress_bar()  # its bar would cut through ours
        model, processor = _loaded(
            job.storage_root, recipe.model, recipe.precision, recipe.attention, str(place)
        )
        self.generator = Generator(
            model, processor, decode_any, batch_size=recipe.batch_size, threads=threads
        )

    def __call__(self, packed: bytes) -> dict[str, Any]:
        """Answers one block and writes its file.

        Args:
            packed: A pickled `Block`.

        Returns:
            As of `kdscale.stages.by_shard.shard_row`.

        Raises:
            DataError: An image cannot be decoded; names the item.
            AnswerFailed, WeightsError: As `kdscale.eval.generate.Generator`.
            StorageError: The file could not be written; nothing half-written remains.
        """
        began = time.perf_counter()
        block: Block = pickle.loads(packed)
        answers = self.generator(prompts_of(block.questions, blind=self.job.recipe.blind))
        lengths = [len(answer.token_ids) for answer in answers]
        write_block(self.job.stage, block, [answer.text for answer in answers], lengths)
        return shard_row(block.number, len(answers), began, {"blocks": block.count})


@lru_cache(maxsize=1)
def _loaded(
    root: str, model: str, precision: Precision, attention: str, device: str
) -> tuple[Any, Any]:
    """Loads a VLM once for all benchmarks that this process asks it in a row."""
    with model_directory(model, Storage(root)) as directory:
        loaded, processor = load_vlm(directory, dtype=DTYPES[precision], attention=attention)
    whole: Any = loaded
    return whole.to(device), processor


def ask(
    job: AnswersJob,
    questions: Sequence[Question],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Asks what is left of a benchmark: in this process, or by a pool of actors.

    Args:
        job: Whom to ask; `run.num_workers` actors, or none where it is 0.
        questions: Those of its recipe (`read_questions`).
        progress: Told how many questions are answered, and of how many.

    Raises:
        StageFailed: If a block could not be answered.
        StageRefused: If another attempt could not answer it either.
        DataError: The questions are not those of the recipe.
        CacheMismatch, CacheCorrupt: What was answered before does not fit them.
    """
    started = time.time()
    left, num_blocks = pending(job, questions)
    done = len(questions) - sum(len(block.questions) for block in left)
    progress(done, len(questions))
    make = partial(Asker, job, None, threads_of(job))
    for row in run_shards(job, [pickle.dumps(block) for block in left], make, num_blocks):
        done += row["samples"]
        progress(done, len(questions))
    check_lease(job.stage, job.lease)
    seconds = round(time.time() - started, 1)
    job.stage.finish(job.record | {"seconds": seconds, "blocks": num_blocks})


def prompts_of(questions: Sequence[Question], *, blind: bool) -> list[Prompt]:
    """Turns questions into prompts, without their images where the model is to be blind."""
    return [
        Prompt(
            name=f"{question.benchmark} {question.item_id}",
            text=question.prompt,
            images=() if blind or question.image is None else (question.image,),
            max_new_tokens=question.max_new_tokens,
        )
        for question in questions
    ]


def decode_any(data: bytes) -> Any:
    """Decodes an image of a benchmark, which may be a GIF: (H, W, 3) uint8 RGB.

    Raises:
        BadImage: As `kdscale.data.samples.decode`.
    """
    return decode(data, gif=True)


def pending(job: AnswersJob, questions: Sequence[Question]) -> tuple[list[Block], int]:
    """Returns the blocks that are left to be answered, and how many there are in all.

    Args:
        job: Whom to ask what.
        questions: Those of its recipe.

    Raises:
        DataError: They are others.
        CacheMismatch, CacheCorrupt: What is there does not fit them.
    """
    if questions_digest(questions) != job.recipe.questions:
        raise DataError(
            f"the questions of {job.recipe.benchmark} in {job.recipe.data} have changed since the "
            "plan was made; run it again"
        )
    blocks = blocks_of(questions)
    return missing(job.stage, blocks), len(blocks)


def read_questions(recipe: Answers) -> list[Question]:
    """Reads the questions that a recipe asks, images included."""
    from kdscale.eval.sources import questions

    return questions(recipe.benchmark, recipe.data, recipe.limit, recipe.mode)


@contextmanager
def model_directory(model: str, storage: Storage) -> Iterator[str]:
    """Yields a local directory that holds the `model` of a recipe."""
    if not model.startswith(STAGE_WEIGHTS):
        yield model
        return
    kind, key = model.removeprefix(STAGE_WEIGHTS).split("/")
    with storage.local_directory("stages", kind, key, "output", "model") as directory:
        yield directory
