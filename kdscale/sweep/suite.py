"""The benchmarks of a VLM in a plan: one stage of answers for each, seeing and blind."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import kdscale.eval
from kdscale.core.answers_config import Answers, answers_identity, answers_key
from kdscale.core.config import Execution
from kdscale.core.eval_config import BenchmarkImages
from kdscale.core.scale import Scale, data_names, lookup, path_of
from kdscale.core.storage import StageStore, Storage
from kdscale.core.vlm_config import SuiteSpec, VlmStage
from kdscale.data.image_sets import set_hash
from kdscale.eval.benchmarks import BENCHMARKS, find_benchmark
from kdscale.stages.images import NOT_AT_HAND, distinct_images
from kdscale.stages.inputs import fingerprint, suite_directory
from kdscale.sweep.absent import data_option
from kdscale.sweep.cost import answers_flops

if TYPE_CHECKING:
    from kdscale.sweep.plan import Planner

READERS = (
    "answers.py",
    "benchmarks.py",
    "images.py",
    "prompts.py",
    "questions.py",
    "rows.py",
    "sources.py",
)


class Asked(NamedTuple):
    """What a benchmark's questions are.

    Attributes:
        digest: Of the questions; `NOT_AT_HAND` where nobody has said where they are.
        num_questions: How many; None likewise.
        images: Names the set of their distinct images.
        num_images: How many those are.
    """

    digest: str = NOT_AT_HAND
    num_questions: int | None = None
    images: str = NOT_AT_HAND
    num_images: int | None = None


def suite_of(value: str | SuiteSpec | None, scale: Scale) -> SuiteSpec | None:
    """Returns what a recipe's suite stands for, with the place of its files filled in.

    The place is absolute: Ray's processes work in directories of their own.

    Raises:
        ConfigError: If the user gave a place for a suite that is drawn.
    """
    suite: SuiteSpec | None = lookup("suite", value, scale.suites)
    if suite is None:
        return None
    data = path_of(suite, scale) or suite.data
    if suite.mini is not None:
        return suite
    return suite.replace(data=data and str(Path(data).expanduser().absolute()))


def add_suite(
    planner: Planner, suite: SuiteSpec, model: str, run: Execution | None, path: list[str]
) -> None:
    """Adds a stage of answers for every benchmark of a suite.

    Args:
        planner: Receives the stages.
        suite: As of `suite_of`.
        model: `stage:finetune/<key>` of the VLM, which is the only input of each.
        run: How they are run.
        path: The trial's; their keys are appended.

    Raises:
        UnknownName: A benchmark is not known.
        MissingBenchmark, BadBenchmark: Its files are not there, or malformed.
    """
    directory = directory_of(planner, suite)
    for name in suite.benchmarks or tuple(BENCHMARKS):
        asked = Asked()
        if directory is not None:
            asked = questions_of(name, directory, suite, planner.plan.storage)
        for blind in (False, True) if suite.blind else (False,):
            recipe = Answers(
                model=model,
                benchmark=find_benchmark(name).name,
                questions=asked.digest,
                data=directory,
                mode=suite.mode,
                blind=blind,
                limit=suite.limit,
                max_new_tokens=suite.max_new_tokens,
                batch_size=suite.batch_size,
                precision=suite.precision,
                run=run,
            )
            label = f"{name}, blind" if blind else name
            _add_answers(planner, recipe, label, asked.num_questions)
            path.append(answers_key(recipe))


def images_of(planner: Planner, suite: SuiteSpec) -> Iterator[BenchmarkImages]:
    """Yields the distinct images of every benchmark of a suite.

    Raises:
        UnknownName, MissingBenchmark, BadBenchmark: As of `add_suite`.
    """
    directory = directory_of(planner, suite)
    for name in suite.benchmarks or tuple(BENCHMARKS):
        asked = Asked()
        if directory is not None:
            asked = questions_of(name, directory, suite, planner.plan.storage)
        yield BenchmarkImages(
            name=find_benchmark(name).name,
            digest=asked.images,
            num_images=asked.num_images,
            data=directory,
            mode=suite.mode,
            limit=suite.limit,
        )


def directory_of(planner: Planner, suite: SuiteSpec) -> str | None:
    """Returns where a suite's files are; a suite without a place is noted as missing."""
    planner.expect_data(*data_names(suite, planner.plan.scale))
    directory = suite_directory(suite, planner.plan.storage)
    note = f"benchmarks of {suite.name}: say {data_option(suite, planner.plan.scale)}"
    if directory is None and note not in planner.plan.missing:
        planner.plan.missing.append(note)
    return directory


def _add_answers(planner: Planner, recipe: Answers, name: str, count: int | None) -> None:
    """Adds the answers to a benchmark; they need the VLM alone, not the other benchmarks.

    Where the files are not at hand, the cost is that of as many questions as the original has.
    """
    from kdscale.sweep.plan import Stage

    key, kind = answers_key(recipe), Answers.kind
    if key in planner.plan.stages:
        return
    original = find_benchmark(recipe.benchmark).num_asked
    assumed = min(original, recipe.limit or original) if count is None else count
    model = planner.plan.stages[recipe.model.rpartition("/")[2]].recipe
    assert isinstance(model, VlmStage)
    planner.plan.stages[key] = Stage(
        kind=kind,
        key=key,
        name=name,
        recipe=recipe,
        inputs=(recipe.model.rpartition("/")[2],),
        num_samples=count,
        total_steps=count,
        flops=answers_flops(model, assumed, blind=recipe.blind),
        bytes_out=0.0,
        reused=StageStore(planner.plan.storage, kind, key).is_done(),
        estimated=count is None,
        identity=answers_identity(recipe),
    )


def questions_of(name: str, directory: str, suite: SuiteSpec, storage: Storage) -> Asked:
    """Returns what a benchmark's questions are.

    Files that have not changed since are not read again, unless the code that reads them has.
    """
    folder = Path(directory, name)
    files = sorted(str(file) for file in folder.rglob("*") if file.is_file())
    asked = f"{name}-{suite.mode}-{suite.limit}-{_reader()}-{fingerprint(files)}"
    parts = ("data", f"questions-{asked}.json")
    if files and storage.exists(*parts):
        known = storage.read_json(*parts)
        if "num_questions" in known:
            return Asked(**known)
    from kdscale.eval.answers import questions_digest
    from kdscale.eval.sources import questions

    found = questions(name, directory, suite.limit, suite.mode)
    images = distinct_images(found)
    asked = Asked(questions_digest(found), len(found), set_hash(images), len(images))
    storage.write_json(asked._asdict(), *parts)
    return asked


@lru_cache(maxsize=1)
def _reader() -> str:
    """Names the code that turns files into questions by its contents."""
    digest = hashlib.blake2b(digest_size=4)
    for module in READERS:
        digest.update(Path(kdscale.eval.__path__[0], module).read_bytes())
    return digest.hexdigest()
