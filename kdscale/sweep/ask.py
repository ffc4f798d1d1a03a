"""One VLM and some benchmarks: everything is checked first, then asked one after the other."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kdscale.core.answers_config import Answers, answers_key
from kdscale.core.config import STAGE_WEIGHTS, Execution, Mode, Precision
from kdscale.core.find import find_stage
from kdscale.core.storage import Lease, StageStore, Storage
from kdscale.core.types import ConfigError, UnknownStage, WeightsError, unknown_name
from kdscale.sweep.orders import record_of
from kdscale.sweep.plan import Stage

ALL = "all"
WAIT_FOR_WRITER_S = 2.0
KINDS = ("finetune",)
NEEDED = ("config.json", "*.safetensors", "tokenizer_config.json", "*processor_config.json")
_KEY = re.compile(r"[0-9a-f]{1,16}")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be asked.

    Attributes:
        model: As a person names it: a directory, a key or its first digits, a hub id with or
            without `@revision`.
        benchmarks: Names, or `all`.
        data: Directory of the benchmarks' files, None for the hub.
        blind: Ask once more without the images.
        run: Actors and what each takes; no actors for this process.
    """

    model: str
    benchmarks: tuple[str, ...]
    storage: Storage
    run: Execution
    data: str | None = None
    blind: bool = False
    mode: Mode = "paper"
    limit: int | None = None
    precision: Precision = "fp32"
    batch_size: int = 16


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Answers to one benchmark, finished or not yet.

    Attributes:
        count: Questions.
        recipe: What is asked.
        key: Of the stage.
    """

    count: int
    recipe: Answers
    key: str

    def store(self, storage: Storage) -> StageStore:
        """Where the answers are."""
        return StageStore(storage, self.recipe.kind, self.key)

    @property
    def label(self) -> str:
        """For people."""
        return self.recipe.benchmark + (", blind" if self.recipe.blind else "")


def check_benchmarks(names: Sequence[str], known: Sequence[str]) -> list[str]:
    """Returns the benchmarks that are meant, each once.

    Raises:
        UnknownName: One is not known; the nearest names are given.
        ConfigError: There is none.
    """
    wanted = list(dict.fromkeys(name.strip() for name in names if name.strip()))
    if wanted == [ALL]:
        return list(known)
    for name in wanted:
        if name not in known:
            raise unknown_name("benchmark", name, [*known, ALL])
    if not wanted:
        raise ConfigError(f"name a benchmark: {', '.join([ALL, *known])}")
    return wanted


def find_model(name: str, storage: Storage) -> str:
    """Returns the `model` of an `Answers` recipe for what a person calls it.

    Raises:
        UnknownStage, WrongStage, AmbiguousStage, UnfinishedStage: As `find_stage`.
        WeightsError: The directory holds no whole model, or the hub cannot be reached.
    """
    directory = Path(name).expanduser()
    if directory.is_dir():
        return str(_checked(directory.resolve()))
    key = name.removeprefix(STAGE_WEIGHTS).removeprefix("finetune/")
    if _KEY.fullmatch(key):
        stage = find_stage(storage, key, KINDS, "evaluate")
        return f"{STAGE_WEIGHTS}{stage.kind}/{stage.key}"
    if _HUB_ID.fullmatch(name) and not name.startswith("."):
        return str(_checked(_downloaded(name)))
    try:
        find_stage(storage, key, KINDS, "evaluate")
    except UnknownStage as error:
        raise WeightsError(
            f"{name!r} is no directory and no hub id (org/name), and {error}"
        ) from None
    raise WeightsError(f"{name!r} is no directory, no hub id (org/name) and no key of a stage")


def _checked(directory: Path) -> Path:
    """Returns a directory that has the files of a model and its processor."""
    lacking = [pattern for pattern in NEEDED if not any(directory.glob(pattern))]
    if lacking:
        raise WeightsError(
            f"{directory} holds no vision-language model in the hub's layout: it lacks "
            f"{', '.join(lacking)}; `kdscale export KEY --to hf` writes one"
        )
    return directory


def _downloaded(name: str) -> Path:
    """Returns the local copy of a model on the hub."""
    from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType]

    hub_id, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(hub_id, revision=revision or None))
    except Exception as error:  # the hub's client has a dozen kinds
        reason = str(error).strip().partition("\n")[0]
        raise WeightsError(f"{name!r} is no directory here, nor to be had: {reason}") from error


def prepare(request: Request, progress: Progress) -> list[Asked]:
    """Checks names, model and data: reads every question once, keeping none.

    Returns:
        What is to be asked, benchmark by benchmark, the blind one after the seeing one.

    Raises:
        ConfigError, WeightsError, DataError: What is wrong, by name.
    """
    from kdscale.eval.answers import blocks_of, questions_digest
    from kdscale.eval.benchmarks import BENCHMARKS
    from kdscale.stages.ask import read_questions

    names = check_benchmarks(request.benchmarks, list(BENCHMARKS))
    model = find_model(request.model, request.storage)
    found: list[Asked] = []
    for number, name in enumerate(names):
        progress(f"reading {name}", number, len(names))
        recipe = Answers(
            model=model,
            benchmark=name,
            questions="",
            data=request.data,
            mode=request.mode,
            limit=request.limit,
            precision=request.precision,
            batch_size=request.batch_size,
            run=request.run,
        )
        questions = read_questions(recipe)
        blocks_of(questions)
        seeing = recipe.replace(questions=questions_digest(questions))
        for one in (seeing, seeing.replace(blind=True))[: 1 + request.blind]:
            found.append(Asked(count=len(questions), recipe=one, key=answers_key(one)))
    return found


def ask_all(asked: Sequence[Asked], storage: Storage, progress: Progress) -> None:
    """Asks what is not answered yet; finished answers are taken as they are.

    Raises:
        StageFailed: A benchmark could not be asked, at the first that could not.
    """
    left = [one for one in asked if not one.store(storage).is_done()]
    if not left:
        return
    if any(one.recipe.run and one.recipe.run.num_workers for one in left):
        from kdscale.sweep.schedule import start_ray

        progress("starting Ray", 0, None)
        start_ray()
    for one in left:
        _ask(one, storage, progress)


def _ask(one: Asked, storage: Storage, progress: Progress) -> None:
    """Asks one benchmark; waits where another process is doing so."""
    from kdscale.stages.ask import ask, read_questions
    from kdscale.stages.jobs import AnswersJob

    stage = one.store(storage)
    while not stage.is_done():
        lease = Lease.acquire(stage)
        if lease is None:
            progress(f"{one.label}: another process asks it, waiting", 0, None)
            time.sleep(WAIT_FOR_WRITER_S)
            continue
        with lease:
            progress(f"{one.label}: loading the model", 0, one.count)
            record = record_of(_stage(one)) | {"model": one.recipe.model, "data": one.recipe.data}
            job = AnswersJob(one.key, storage.root, one.recipe, record, lease.token)
            ask(
                job,
                read_questions(one.recipe),
                lambda done, total: progress(one.label, done, total) if done else None,
            )


def _stage(one: Asked) -> Stage:
    """Describes the stage for its record."""
    model = one.recipe.model
    inputs = (model.rpartition("/")[2],) if model.startswith(STAGE_WEIGHTS) else ()
    return Stage(
        kind=one.recipe.kind,
        key=one.key,
        name=one.label,
        recipe=one.recipe,
        inputs=inputs,
        num_samples=one.count,
        total_steps=None,
        flops=None,
        bytes_out=None,
        reused=False,
    )
