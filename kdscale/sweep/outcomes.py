"""What a stage's directory says: its scores, and the rows that a report makes of them.

Needs neither torch nor Ray. An unfinished stage has no score: it is None, never zero.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pyarrow as pa  # pyright: ignore[reportMissingTypeStubs]
import pyarrow.parquet as pq  # pyright: ignore[reportMissingTypeStubs]

from kdscale.analysis.stats import (
    Interval,
    bootstrap_interval,
    paired_difference,
    percent,
    wilson_interval,
)
from kdscale.core.answers_config import Answers
from kdscale.core.config import Distill, ZeroShotSpec
from kdscale.core.eval_config import Cka
from kdscale.core.journal import Line, read_steps
from kdscale.core.stop import early_in_words
from kdscale.core.storage import StageStore, Storage
from kdscale.core.trained import epoch_suffix
from kdscale.core.types import DataError, StorageError, UnfinishedStage
from kdscale.core.vlm_config import Evaluate
from kdscale.core.zero_shot_config import Gate
from kdscale.eval.answers import load_items
from kdscale.sweep.kept import is_finished, until
from kdscale.sweep.plan import Stage

LEVEL = 0.95
DONE = "done"
NOT_FINISHED = "not finished"
NUM_IMAGENET_CLASSES = 1000
ANSWERS = "answers.parquet"


@dataclass(frozen=True, kw_only=True)
class Score:
    """Zero-shot accuracy of one model.

    Attributes:
        top1: Percent.
        n: Images scored.
        chance: Percent that guessing gives.
        interval: 95 % interval of `top1`, percent.
        method: `bootstrap`, or `wilson` where all or none are right and resampling would claim
            certainty.
    """

    top1: float
    n: int
    chance: float
    interval: Interval
    method: str


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A model minus its control on the same images.

    Attributes:
        points: Percentage points; positive where the model is better.
        interval: 95 % interval of a paired bootstrap.
        n: Images that all of them answered.
        controls: Names of the controls; several are averaged.
    """

    points: float
    interval: Interval
    n: int
    controls: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """`better` or `worse` where the interval excludes zero, else `undecided`."""
        if self.interval.low > 0:
            return "better"
        return "worse" if self.interval.high < 0 else "undecided"


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Answers of one model, in the order of the benchmark.

    Attributes:
        keys: Sample keys as stored; shards may repeat them.
        labels: True labels.
        answers: Predicted labels.
    """

    keys: list[str]
    labels: list[int]
    answers: list[int]

    def correct(self) -> dict[tuple[str, int], float]:
        """Returns {(key, its how-manieth occurrence): 1 where right, 0 where wrong}."""
        seen: Counter[str] = Counter()
        scores: dict[tuple[str, int], float] = {}
        for key, label, answer in zip(self.keys, self.labels, self.answers, strict=True):
            scores[key, seen[key]] = float(label == answer)
            seen[key] += 1
        return scores


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a stage's directory holds.

    Attributes:
        journal: One line a step, also of an unfinished stage.
        metrics: Of the last evaluation; empty where unfinished.
        seconds: Wall time, as the record says.
        note: What is odd about it, in words; empty where nothing is.
        answers: One row a question, of an evaluated VLM.
        items: What `kdscale.eval.score` takes, of answers to a benchmark.
        comparison: What `cka.json` says; empty for other stages and where unfinished.
        epoch: Where it was read; None for the stage's end.
        early: `stopped early at step N`, where a scheduler has.
    """

    stage: Stage
    done: bool
    journal: list[Line]
    predictions: Predictions | None = None
    answers: list[dict[str, Any]] | None = None
    items: list[dict[str, Any]] | None = None
    comparison: dict[str, Any] = field(default_factory=dict)
    score: Score | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float | None = None
    note: str = ""
    epoch: int | None = None
    early: str = ""

    @property
    def last_step(self) -> int | None:
        """Last step in the journal, None where the stage has not started."""
        return self.journal[-1]["step"] if self.journal else None


@dataclass(frozen=True, kw_only=True)
class Row:
    """What trials and teachers have in common.

    Attributes:
        key: Content key of the stage; None for a teacher that no stage trains.
        state: `done` or `not finished`; for given weights `pretrained` or `random`.
        step: Last step in the journal.
        seconds: Wall time of the stage, as its record says.
        note: What is odd about it, in words.
    """

    name: str
    key: str | None
    state: str
    step: int | None = None
    total_steps: int | None = None
    seconds: float | None = None
    score: Score | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class TrialRow(Row):
    """One trial.

    Attributes:
        row: Its row in the sweep's table.
        column: Its column there.
        is_baseline: Whether others are compared with it.
        cka_debiased: CKA with the teacher at the end; NaN where undefined, None without teacher.
        difference: To the control; None for controls and where one of the two is not finished.
        metrics: All that the last evaluation measured.
    """

    sweep: str
    chosen: dict[str, Any]
    row: str
    column: str
    is_baseline: bool
    cka_debiased: float | None = None
    cka_biased: float | None = None
    difference: Difference | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    def value(self, metric: str) -> float | None:
        """Returns a number by the name that a sweep's table gives it, None where it has none."""
        if metric == "zero_shot_top1":
            return None if self.score is None else self.score.top1
        if metric == "difference":
            return None if self.difference is None else self.difference.points
        if self.state != DONE:
            return None
        return self.metrics.get(metric, getattr(self, metric, None))


@dataclass(frozen=True, kw_only=True)
class TeacherRow(Row):
    """One teacher and its tower.

    Attributes:
        roles: Names that trials give it.
        loss: What its stage trains it with; None for given weights.
        published_top1: What its makers state for ImageNet, percent.
    """

    roles: tuple[str, ...]
    width: int
    patch_px: int | None
    image_px: int
    tokenizer: str
    loss: str | None
    published_top1: float | None = None


def read_outcome(stage: Stage, storage: Storage, epoch: int | None = None) -> Outcome:
    """Reads a stage's directory; whether it is finished is looked up anew.

    Args:
        stage: A planned stage.
        storage: The stage store.
        epoch: Where a distillation's student is read, one that it keeps; None for its end.
    """
    store = stage.store(storage)
    journal = until(epoch, stage, read_steps(store))
    if not is_finished(stage, storage):
        early, why = early_in_words(store)
        return Outcome(stage=stage, done=False, journal=journal, note=why, early=early, epoch=epoch)
    classes = _classes_of(stage)
    predictions, items, score, note = None, None, None, "the recipe names no benchmark"
    if classes is not None:
        try:
            predictions = read_predictions(store, epoch)
            score, note = score_of(predictions, classes), _oddity(predictions)
        except (DataError, StorageError) as error:
            predictions, note = None, f"no score: {error}"
    seconds = None if epoch is not None else _json(store, "stage.json").get("seconds")
    answers = read_answers(store) if isinstance(stage.recipe, Evaluate) else None
    if isinstance(stage.recipe, Answers):
        try:
            items, note = load_items(store), ""
        except (UnfinishedStage, DataError, StorageError) as error:
            note = str(error)
    return Outcome(
        stage=stage,
        done=True,
        journal=journal,
        predictions=predictions,
        answers=answers,
        items=items,
        comparison=_json(store, "output", "cka.json") if isinstance(stage.recipe, Cka) else {},
        score=score,
        metrics=_json(store, "output", f"metrics{epoch_suffix(epoch)}.json"),
        seconds=None if seconds is None else float(seconds),
        note=note,
        epoch=epoch,
    )


def _classes_of(stage: Stage) -> int | None:
    """Returns among how many classes a stage has predicted, None where it has not."""
    if isinstance(stage.recipe, Gate):
        return NUM_IMAGENET_CLASSES
    spec = stage.recipe.zero_shot if isinstance(stage.recipe, Distill) else None
    return num_classes(spec) if isinstance(spec, ZeroShotSpec) else None


def read_answers(store: StageStore) -> list[dict[str, Any]]:
    """Reads what an evaluated VLM has answered, one row a question."""
    data = store.storage.read(*store.parts, "output", ANSWERS)
    table: Any = cast(Any, pq).read_table(io.BytesIO(data))
    return table.to_pylist()


def _json(store: StageStore, *parts: str) -> dict[str, Any]:
    """Reads a document of a stage; an absent one is empty."""
    if not store.storage.exists(*store.parts, *parts):
        return {}
    return store.storage.read_json(*store.parts, *parts)


def read_predictions(store: StageStore, epoch: int | None = None) -> Predictions:
    """Reads a finished stage's answers, at its end or at that of an epoch.

    Raises:
        StorageError: If the file is not there.
        DataError: If it is not the table that a stage writes.
    """
    parts = ("output", f"zero_shot{epoch_suffix(epoch)}.parquet")
    data = store.storage.read(*store.parts, *parts)
    columns = ["key", "label", "prediction"]
    try:
        table: Any = cast(Any, pq).read_table(io.BytesIO(data), columns=columns)
        found: dict[str, list[Any]] = table.to_pydict()
        keys, labels, answers = (found[name] for name in columns)
    except (pa.ArrowException, KeyError) as error:  # pyright: ignore
        raise DataError(f"{store.url(*parts)} is not a table of predictions: {error}") from error
    if not keys:
        raise DataError(f"{store.url(*parts)} holds no prediction")
    return Predictions(keys=keys, labels=labels, answers=answers)


def num_classes(spec: ZeroShotSpec) -> int:
    """Returns how many classes a benchmark has, without loading its names where it can."""
    if spec.classnames == "imagenet":
        return NUM_IMAGENET_CLASSES
    return len(class_names(spec))


def class_names(spec: ZeroShotSpec) -> tuple[str, ...]:
    """Returns a benchmark's class names in label order."""
    if spec.classnames == "mini":
        from kdscale.mini.scenes import CLASSNAMES

        return CLASSNAMES
    if spec.classnames == "imagenet":
        import open_clip  # pyright: ignore[reportMissingTypeStubs]

        return tuple(map(str, open_clip.IMAGENET_CLASSNAMES))  # pyright: ignore
    return spec.classnames


def score_of(predictions: Predictions, classes: int) -> Score:
    """Computes accuracy, chance and interval.

    Args:
        predictions: At least one.
        classes: Number of classes, >= 1.
    """
    correct = list(predictions.correct().values())
    n, right = len(correct), int(sum(correct))
    certain = right in (0, n)
    interval = (
        wilson_interval(right, n, level=LEVEL)
        if certain
        else bootstrap_interval(correct, level=LEVEL)
    )
    return Score(
        top1=100.0 * right / n,
        n=n,
        chance=100.0 / classes,
        interval=percent(interval),
        method="wilson" if certain else "bootstrap",
    )


def _oddity(predictions: Predictions) -> str:
    """Says so where a model ignores the image."""
    if len(predictions.answers) > 1 and len(set(predictions.answers)) == 1:
        return f"answers class {predictions.answers[0]} to every image"
    return ""


def compare(model: Predictions, controls: Mapping[str, Predictions]) -> Difference | None:
    """Compares a model with the mean of its controls, image by image.

    Args:
        model: Answers of the model.
        controls: {name: answers} of the controls, at least one.

    Returns:
        The difference, None where they share no image.
    """
    own, others = model.correct(), [control.correct() for control in controls.values()]
    shared = [key for key in own if all(key in other for other in others)]
    if not shared:
        return None
    found = paired_difference(
        [own[key] for key in shared],
        [sum(other[key] for other in others) / len(others) for key in shared],
        level=LEVEL,
    )
    return Difference(
        points=100.0 * found.difference,
        interval=percent(found.interval),
        n=found.n,
        controls=tuple(controls),
    )


def mean_interval(models: Sequence[Predictions]) -> Interval | None:
    """Computes the interval of the mean accuracy of models that saw the same images, percent.

    Returns:
        None where they did not.
    """
    scores = [model.correct() for model in models]
    if any(score.keys() != scores[0].keys() for score in scores):
        return None
    means = np.mean([[score[key] for key in scores[0]] for score in scores], axis=0)
    return percent(bootstrap_interval(means, level=LEVEL))
