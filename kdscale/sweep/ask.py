"""One VLM and some benchmarks: everything is checked first, then asked one after the other."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdscale.core.answers_config import Answers, answers_identity, answers_key
from kdscale.core.config import STAGE_WEIGHTS, Execution, Mode, Precision
from kdscale.core.find import find_stage
from kdscale.core.lease import Lease
from kdscale.core.storage import StageStore, Storage
from kdscale.core.types import ConfigError, UnknownStage, WeightsError, unknown_name
from kdscale.sweep.orders import record_of
from kdscale.sweep.plan import Stage

if TYPE_CHECKING:
    from kdscale.eval.questions import Question

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
        revisions: {benchmark: commit, tag or branch on the hub} where it is not the table's.
        blind: Ask once more without the images.
        run: Actors and what each takes; no actors for this process.
    """

    model: str
    benchmarks: tuple[str, ...]
    storage: Storage
    run: Execution
    data: str | None = None
    revisions: Mapping[str, str] = field(default_factory=dict[str, str])
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
    for name in wanted:
        if name not in (*known, ALL):
            raise unknown_name("benchmark", name, [*known, ALL])
    if ALL in wanted:
        return list(known)
    if not wanted:
        raise ConfigError(f"name a benchmark: {', '.join([ALL, *known])}")
    return wanted


def check_revisions(request: Request, names: Sequence[str]) -> None:
    """Checks that revisions are of benchmarks that are asked, from the hub.

    Raises:
        UnknownName: One is of another benchmark.
        ConfigError: The files come from a directory.
    """
    for name in request.revisions:
        if name not in names:
            raise unknown_name("benchmark", name, names)
    if request.revisions and request.data is not None:
        raise ConfigError(
            f"--revision pins data sets on the hub, and the files come from {request.data}; "
            "leave one of the two out"
        )


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
    """Checks names, model and data: reads every question once, keeping none of them.

    Returns:
        What is to be asked, benchmark by benchmark, the blind one after the seeing one.

    Raises:
        ConfigError, WeightsError, DataError: What is wrong, by name.
    """
    from kdscale.eval.answers import blocks_of, questions_digest
    from kdscale.eval.benchmarks import BENCHMARKS
    from kdscale.eval.sources import hub_commit
    from kdscale.stages.ask import read_questions

    names = check_benchmarks(request.benchmarks, list(BENCHMARKS))
    _check_device(request)
    check_revisions(request, names)
    model = find_model(request.model, request.storage)
    found: list[Asked] = []
    for number, name in enumerate(names):
        progress(f"reading {name}", number, len(names))
        commit = None
        if request.data is None:  # a branch may move before all is answered, its commit does not
            commit = hub_commit(name, request.revisions.get(name))
        recipe = Answers(
            model=model,
            benchmark=name,
            questions="",
            data=request.data,
            revision=commit,
            mode=request.mode,
            limit=request.limit,
            precision=request.precision,
            batch_size=request.batch_size,
            run=request.run,
        )
        questions = read_questions(recipe)
        blocks_of(questions)
        limit = None if _are_all(recipe, questions) else request.limit
        seeing = recipe.replace(questions=questions_digest(questions), limit=limit)
        for one in (seeing, seeing.replace(blind=True))[: 1 + request.blind]:
            found.append(Asked(count=len(questions), recipe=one, key=answers_key(one)))
    return found


def _check_device(request: Request) -> None:
    """Refuses a precision that the device is too slow for, before anything is read."""
    from kdscale.stages.by_shard import device_for
    from kdscale.stages.loop import check_precision

    run = request.run
    given = ("cuda" if run.gpus_per_worker else "cpu") if run.num_workers else None
    check_precision(request.precision, given or device_for(None).type)


def _are_all(recipe: Answers, questions: Sequence[Question]) -> bool:
    """Tells whether the recipe's limit leaves no question out: then it is none."""
    if recipe.limit is None or len(questions) < recipe.limit:
        return True
    from kdscale.stages.ask import read_questions

    return len(read_questions(recipe.replace(limit=len(questions) + 1))) == len(questions)


def ask_all(asked: Sequence[Asked], storage: Storage, progress: Progress) -> None:
    """Asks what is not answered yet; finished answers are taken as they are.

    Benchmarks that another process asks at the moment are waited for.

    Raises:
        StageFailed: A benchmark could not be asked, at the first that could not.
    """
    while left := [one for one in asked if not one.store(storage).is_done()]:
        with ExitStack() as leases:
            ours: list[tuple[Asked, str]] = []
            for one in left:
                lease = Lease.acquire(one.store(storage))
                if lease is not None:
                    token = leases.enter_context(lease).token
                    if not one.store(storage).is_done():  # whoever held it may have finished
                        ours.append((one, token))
            if ours:
                _ask(ours, storage, progress)
                continue
        progress(f"{left[0].label}: another process asks it, waiting", 0, None)
        time.sleep(WAIT_FOR_WRITER_S)


def _ask(ours: Sequence[tuple[Asked, str]], storage: Storage, progress: Progress) -> None:
    """Asks benchmarks whose leases we hold, all with the model loaded once."""
    from kdscale.stages.ask import ask_all as ask_jobs
    from kdscale.stages.ask import read_questions
    from kdscale.stages.jobs import AnswersJob

    if any(one.recipe.run and one.recipe.run.num_workers for one, _ in ours):
        from kdscale.sweep.schedule import start_ray

        progress("starting Ray", 0, None)
        start_ray()
    progress(f"{ours[0][0].label}: loading the model", 0, ours[0][0].count)
    labels = {one.key: one.label for one, _ in ours}
    jobs = (
        (AnswersJob(one.key, storage.root, one.recipe, _record(one), token), one.recipe)
        for one, token in ours
    )
    ask_jobs(
        ((job, read_questions(recipe)) for job, recipe in jobs),
        lambda job, done, total: progress(labels[job.key], done, total) if done else None,
    )


def _record(one: Asked) -> dict[str, Any]:
    """Begins the stage's record; commits on the hub are those that a branch stood for."""
    from kdscale.eval.sources import commit_of

    recipe = one.recipe
    places = {"model": recipe.model, "data": recipe.data, "revision": recipe.revision}
    return record_of(_stage(one)) | places | {"model_revision": commit_of(recipe.model)}


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
        total_steps=one.count,
        flops=None,
        bytes_out=None,
        reused=False,
        identity=answers_identity(one.recipe),
    )
