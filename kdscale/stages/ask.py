"""The answers stage: a VLM answers the questions of one benchmark, block by block.

The unit of work is a block of questions (`kdscale.eval.answers`); a block that is written is not
asked again. Blocks carry no images: whoever answers one reads those of its 64 questions.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import chain, groupby
from typing import Any

from transformers.utils import logging

from kdscale.core.answers_config import Answers
from kdscale.core.config import STAGE_WEIGHTS, Execution, Precision
from kdscale.core.journal import JournalWriter, noted
from kdscale.core.lease import check_lease
from kdscale.core.stop import stop_if_asked
from kdscale.core.storage import Storage
from kdscale.core.types import DataError, StageStopped
from kdscale.data.samples import decode
from kdscale.eval.answers import Block, blocks_of, missing, questions_digest, write_block
from kdscale.eval.generate import Generator, Prompt
from kdscale.eval.images import StoredImage, read_images
from kdscale.eval.questions import Question
from kdscale.models.language import DTYPES
from kdscale.models.vlm import attention_for, load_vlm
from kdscale.stages.by_shard import clear_leftovers, device_for, threads_of
from kdscale.stages.jobs import AnswersJob
from kdscale.stages.loop import check_precision


class Asker:
    """Answers blocks of questions with one model, loaded once.

    Args:
        jobs: Whom to ask what; one model in one precision, as of `team_of`.
        device: Where the model runs, None for a GPU if there is one.
        threads: Threads that decode ahead.

    Raises:
        WeightsError: There is no such model.
        PrecisionError, ConfigError: It cannot run here like that.
    """

    def __init__(
        self, jobs: Sequence[AnswersJob], device: str | None = None, threads: int = 1
    ) -> None:
        recipe, place = jobs[0].recipe, device_for(device)
        self.jobs = jobs
        self._logs = [job.log("actor", quiet=True) for job in jobs]
        check_precision(recipe.precision, place.type)
        if recipe.attention == "flash_attention_2":
            attention_for(recipe.attention, place, recipe.precision)
        logging.disable_progress_bar()  # its bar would cut through ours
        with self._logs[0]:
            model, processor = _loaded(
                jobs[0].storage_root, recipe.model, recipe.precision, recipe.attention, str(place)
            )
        self.generator = Generator(
            model, processor, decode_any, batch_size=recipe.batch_size, threads=threads
        )

    def __call__(self, packed: bytes) -> dict[str, Any]:
        """Answers one block and writes its file.

        Args:
            packed: A pickled number of a job, and one of its blocks.

        Returns:
            That number, the block's, how many questions were answered, and in how many seconds.

        Raises:
            DataError: An image cannot be read or decoded; names the item.
            AnswerFailed, WeightsError: As `kdscale.eval.generate.Generator`.
            StorageError: The file could not be written; nothing half-written remains.
        """
        number, block = pickle.loads(packed)
        with self._logs[number]:
            return self._answer(number, block)

    def _answer(self, number: int, block: Block) -> dict[str, Any]:
        """Answers one block of a job."""
        began = time.perf_counter()
        job = self.jobs[number]
        recipe = job.recipe
        try:
            answers = self.generator(
                prompts_of(block.questions, blind=recipe.blind, longest=recipe.max_new_tokens)
            )
            lengths = [len(answer.token_ids) for answer in answers]
            write_block(job.stage, block, [answer.text for answer in answers], lengths)
        except Exception as error:
            from kdscale.stages.worker import note_failure

            note_failure(job.stage, error)  # whoever waits cannot tell whose block it was
            raise
        seconds = time.perf_counter() - began
        known = {"job": number, "block": block.number, "samples": len(answers)}
        return known | {"seconds": seconds}


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
    """Asks what is left of one benchmark; arguments and errors as of `ask_all`.

    Args:
        job: Whom to ask.
        questions: Those of its recipe (`read_questions`).
        progress: Told how many questions are answered, and of how many.
    """
    ask_all([(job, questions)], lambda _, done, total: progress(done, total))


def ask_all(
    asked: Iterable[tuple[AnswersJob, Sequence[Question]]],
    progress: Callable[[AnswersJob, int, int], None] = lambda job, done, total: None,
) -> None:
    """Asks what is left of benchmarks: in this process, or by a pool of actors.

    Neighbours of one model and one execution share a pool, whose actors load the model once.

    Args:
        asked: Whom to ask what: jobs with `run.num_workers` actors, or none where it is 0, each
            with the questions of its recipe. In this process one is taken after the other.
        progress: Told of which job how many questions are answered, and of how many.

    Raises:
        StageFailed: If a block could not be answered.
        StageRefused: If another attempt could not answer it either.
        DataError: The questions are not those of the recipe.
        CacheMismatch, CacheCorrupt: What was answered before does not fit them.
    """
    for _, team in groupby(asked, lambda pair: team_of(pair[0])):
        began = time.time()
        rounds = [_Round(job, questions, progress) for job, questions in team]
        whole = [each for each in rounds if each.is_whole]  # but for its last mark
        for each in chain(whole, _answered(rounds)):
            if each.is_whole:
                each.finish(time.time() - began)
                began = time.time()


class _Round:
    """One benchmark being asked: what is left of it, and its journal.

    A step of the journal is a number of questions answered; blocks that an earlier attempt has
    noted are behind the first one, so that no step comes twice.
    """

    def __init__(
        self,
        job: AnswersJob,
        questions: Sequence[Question],
        progress: Callable[[AnswersJob, int, int], None],
    ) -> None:
        self.job, self.total, self._progress = job, len(questions), progress
        lacking, blocks = pending(job, questions)
        # Blocks that were written and nobody lived to note: the same again, and every step comes.
        known = noted(job.stage, "block") - {block.number for block in lacking}
        self.left = [block for block in blocks if block.number not in known]
        self._num_blocks = len(blocks)
        self.done = self.total - sum(len(block.questions) for block in self.left)
        self._journal = JournalWriter(job.stage, 1)
        job.stage.forget_failure()
        clear_leftovers(job)
        progress(job, self.done, self.total)

    @property
    def is_whole(self) -> bool:
        """Whether every question is answered."""
        return self.done == self.total

    def add(self, row: dict[str, Any]) -> None:
        """Notes a block that was answered."""
        self.done += row["samples"]
        speed = row["samples"] / row["seconds"]
        line = {"step": self.done, "asked": self.total, "block": row["block"]}
        self._journal.append(line | {"samples_per_s": speed})
        self._progress(self.job, self.done, self.total)

    def finish(self, seconds: float) -> None:
        """Marks the stage done."""
        check_lease(self.job.stage, self.job.lease)
        about = {"seconds": round(seconds, 1), "blocks": self._num_blocks}
        self.job.stage.finish(self.job.record | about)


def _answered(rounds: Sequence[_Round]) -> Iterator[_Round]:
    """Answers what is left, and yields after each block whose it was."""
    jobs = [each.job for each in rounds]
    items = [pickle.dumps((n, block)) for n, each in enumerate(rounds) for block in each.left]
    run, make = jobs[0].recipe.run or Execution(), partial(Asker, jobs, None, threads_of(jobs[0]))
    try:
        rows: Iterator[dict[str, Any]] = iter(())
        if run.num_workers > 0:
            from kdscale.stages.worker import actor_map

            resources = {"CPU": run.cpus_per_worker, "GPU": run.gpus_per_worker}
            rows = actor_map(items, make, num_actors=run.num_workers, resources=resources)
        elif items:
            rows = map(make(), items)
        for row in rows:
            rounds[row["job"]].add(row)
            yield rounds[row["job"]]
            left = next((each for each in rounds if not each.is_whole), None)
            if left is not None:
                stop_if_asked(left.job.stage, left.job.lease, left.done)
    except StageStopped:
        raise
    except Exception as error:
        from kdscale.stages.worker import raise_failed

        raise_failed(jobs, error)


def team_of(job: AnswersJob) -> tuple[Any, ...]:
    """Names the actors that a job needs; in one process there are none to be shared."""
    recipe, run = job.recipe, job.recipe.run or Execution()
    alone = "" if run.num_workers else job.key
    settings = (recipe.precision, recipe.attention, recipe.batch_size)
    return job.storage_root, recipe.model, *settings, run.model_dump_json(), alone


def prompts_of(
    questions: Sequence[Question], *, blind: bool, longest: int | None = None
) -> list[Prompt]:
    """Turns questions into prompts, without their images where the model is to be blind.

    Args:
        questions: Of one benchmark.
        blind: Leave the images out.
        longest: Tokens of any answer at most; None leaves each question's own.

    Raises:
        DataError: An image is not where it was, or another one is there.
    """
    shown = [] if blind else [question.image for question in questions]
    stored = read_images(image for image in shown if isinstance(image, StoredImage))
    return [
        Prompt(
            name=f"{question.benchmark} {question.item_id}",
            text=question.prompt,
            images=() if image is None else (_bytes(image, stored),),
            max_new_tokens=min(question.max_new_tokens, longest or question.max_new_tokens),
        )
        for question, image in zip(questions, shown or [None] * len(questions), strict=True)
    ]


def _bytes(image: bytes | StoredImage, stored: Mapping[StoredImage, bytes]) -> bytes:
    """Returns an image's bytes, wherever they are."""
    return stored[image] if isinstance(image, StoredImage) else image


def decode_any(data: bytes) -> Any:
    """Decodes an image of a benchmark, which may be a GIF: (H, W, 3) uint8 RGB.

    Raises:
        BadImage: As `kdscale.data.samples.decode`.
    """
    return decode(data, gif=True)


def pending(job: AnswersJob, questions: Sequence[Question]) -> tuple[list[Block], list[Block]]:
    """Returns the blocks that have no file, and all blocks.

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
    return missing(job.stage, blocks), blocks


def read_questions(recipe: Answers) -> list[Question]:
    """Reads the questions that a recipe asks; all of them are checked, their images too."""
    from kdscale.eval.sources import questions

    return questions(recipe.benchmark, recipe.data, recipe.limit, recipe.mode, recipe.revision)


@contextmanager
def model_directory(model: str, storage: Storage) -> Iterator[str]:
    """Yields a local directory that holds the `model` of a recipe."""
    if not model.startswith(STAGE_WEIGHTS):
        yield model
        return
    kind, key = model.removeprefix(STAGE_WEIGHTS).split("/")
    with storage.local_directory("stages", kind, key, "output", "model") as directory:
        yield directory
