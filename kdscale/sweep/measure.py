"""The numbers of a report, one by one, with the names of the roles that they are of."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from kdscale.analysis.stats import Interval
from kdscale.core.answers_config import Answers
from kdscale.core.config import Distill, Pretrained, Recipe
from kdscale.core.scale import resolve
from kdscale.core.trained import student_key
from kdscale.core.vlm_config import SuiteSpec, Vlm
from kdscale.eval.benchmarks import BENCHMARKS
from kdscale.eval.scores import influences
from kdscale.sweep.benchmark_outcomes import BenchmarkRow, counted, interval_of
from kdscale.sweep.beside_runs import Measured, Z
from kdscale.sweep.naming import label
from kdscale.sweep.outcomes import Outcome
from kdscale.sweep.places import AVERAGE, CKA, Influence, combined, mean_influence
from kdscale.sweep.plan import Plan, PlannedTrial
from kdscale.sweep.report import Report
from kdscale.sweep.suite import suite_of
from kdscale.sweep.vlm_outcomes import VlmRow

CONSTANT = 0.95
# What makes no other way of training: it names the place, or it changes no number.
NAMES = {"student", "teacher", "loss", "data", "epochs", "read_epoch", "seed", "zero_shot"}
VLM_NAMES = {"vision", "llm", "recipe", "questions", "suite", "seed"}
EXECUTION = {"run", "teacher_outputs", "eval_outputs", "cka", "cka_with", "keep_epochs"}
TAP = "patch_mean"  # of the CKA that stands beside table 3


def measured(report: Report, plan: Plan) -> list[Measured]:
    """Returns what the finished trials of a report have measured.

    Args:
        report: The report.
        plan: The plan that it was made of; its trials still name roles.

    Returns:
        Each number once, however many trials and sweeps share its stages.
    """
    sweeps = {table.sweep for table in report.tables}
    found: dict[tuple[Any, ...], Measured] = {}
    for trial in plan.trials:
        if trial.sweep not in sweeps:
            continue
        for one in numbers_of(trial, report, plan):
            names = (one.framework, one.llm, one.student_or_encoder, one.teacher, one.loss)
            how = (one.data, one.epochs, one.schedule, one.variant, one.vlm_variant)
            found.setdefault((*names, *how, one.seed, one.metric), one)
    return [*found.values()]


def numbers_of(trial: PlannedTrial, report: Report, plan: Plan) -> Iterator[Measured]:
    """Yields what a trial has measured; arguments as of `measured`."""
    rows = (row for row in report.vlms if (row.sweep, row.key) == (trial.sweep, trial.key))
    row = next(rows, None)
    recipe = trial.trial.recipe
    distilled = recipe if isinstance(recipe, Distill) else recipe.vision
    if isinstance(distilled, Distill):
        yield from _of_student(distilled, _outcome(trial, distilled, report, plan))
        yield from _of_comparisons(trial, distilled, report)
    if isinstance(recipe, Vlm) and row is not None:
        outcomes = [report.outcomes[key] for key in trial.path]
        yield from _of_vlm(recipe, row, outcomes, suite_of(recipe.suite, plan.scale))


def _outcome(trial: PlannedTrial, recipe: Distill, report: Report, plan: Plan) -> Outcome | None:
    """Returns what a trial's student has left; None where one on the way was not read."""
    kinds = {key: report.outcomes[key].stage.kind for key in trial.path}
    key = [key for key, kind in kinds.items() if kind == Distill.kind][-1]  # behind its teacher's
    if not _is_early(recipe):
        return report.outcomes[key]
    return report.outcomes.get(student_key(key, resolve(recipe, plan.scale).read_epoch))


def _is_early(recipe: Distill) -> bool:
    """Tells whether a recipe stands for a student on the way of its schedule."""
    return recipe.read_epoch not in (None, recipe.epochs)


def _blank(model: Any, seed: int) -> Measured:
    """Returns a model's name, without a number yet."""
    return Measured(
        framework=None,
        llm=None,
        student_or_encoder=str(label(model)),
        teacher=None,
        loss=None,
        data=None,
        epochs=None,
        seed=seed,
        metric="",
        value=math.nan,
        n=0,
        interval=None,
        chance=None,
        constant=False,
        weights_of=str(label(model.student)) if isinstance(model, Pretrained) else None,
    )


def student_names(recipe: Distill) -> Measured:
    """Returns a student's names, without a number yet."""
    return replace(
        _blank(recipe.student, recipe.seed),
        teacher=None if recipe.teacher is None else str(label(recipe.teacher)),
        loss=str(label(recipe.loss)),
        data=str(label(recipe.data)),
        epochs=recipe.read_epoch or recipe.epochs,
        schedule=recipe.epochs if _is_early(recipe) else None,
        variant=departures(recipe, NAMES | EXECUTION),
    )


def departures(recipe: Recipe, names: set[str]) -> str:
    """Says in which fields, apart from the given names, a recipe departs from its defaults."""
    parts: list[str] = []
    for name, info in type(recipe).model_fields.items():
        value, default = getattr(recipe, name), info.get_default(call_default_factory=True)
        if name not in names and value != default:
            text = label(value)
            if isinstance(value, Mapping):
                text = " ".join(f"{key}={item}" for key, item in value.items())  # pyright: ignore
            parts.append(f"{name}={text}")
    return ", ".join(parts)


def _of_student(recipe: Distill, outcome: Outcome | None) -> Iterator[Measured]:
    """Yields a student's accuracy and its CKA with the teacher, on the images of its benchmark."""
    if outcome is None:
        return
    answers, score = outcome.predictions, outcome.score
    if not outcome.done or answers is None or score is None:
        return
    benchmark = str(label(recipe.zero_shot))
    own = replace(student_names(recipe), n=score.n)
    most = Counter(answers.answers).most_common(1)[0][1]
    yield replace(
        own,
        metric=benchmark,
        value=score.top1,
        interval=score.interval,
        chance=score.chance,
        constant=most > CONSTANT * score.n,
        influence=mean_influence(answers.correct()),
    )
    cka = outcome.metrics.get("cka_debiased", math.nan)
    if math.isfinite(cka):
        yield replace(own, metric=CKA + benchmark, value=cka, counted=f"{score.n:,} images")


def _of_comparisons(trial: PlannedTrial, recipe: Distill, report: Report) -> Iterator[Measured]:
    """Yields a student's CKA with its own teacher on the images of benchmarks."""
    if recipe.teacher is None or trial.trial.recipe.cka_with != recipe.teacher:
        return
    for row in report.compared(trial.sweep):
        mine = (row.trial_key, row.tap) == (trial.key, TAP) and row.images in BENCHMARKS
        if mine and row.debiased is not None and math.isfinite(row.debiased):
            own = replace(student_names(recipe), metric=CKA + row.images, n=row.n or 0)
            yield replace(own, value=row.debiased, counted=f"{own.n:,} images")


def _of_vlm(
    recipe: Vlm, row: VlmRow, outcomes: list[Outcome], suite: SuiteSpec | None
) -> Iterator[Measured]:
    """Yields a VLM's benchmarks and their average."""
    own = vlm_names(recipe, suite)
    parts: dict[str, Measured] = {}
    for found in row.benchmarks:
        if found.score is None:
            continue
        parts[found.benchmark] = replace(
            own,
            metric=found.benchmark,
            value=found.score.value,
            n=found.score.n,
            interval=interval_of(found.benchmark, found.score),
            chance=found.score.chance,
            constant=found.score.constant_share > CONSTANT,
            limited=found.limited,
            influence=_influence(found, outcomes),
            counted=counted(found.benchmark, found.mode, found.score),
        )
    yield from parts.values()
    if row.average is not None:
        yield _average(row.average, own, parts)


def vlm_names(recipe: Vlm, suite: SuiteSpec | None) -> Measured:
    """Returns a VLM's names, without a number yet."""
    vision = recipe.vision
    how = [departures(recipe, VLM_NAMES | EXECUTION)]
    if suite is not None and suite.mode != "paper":
        how.append(f"scored by {suite.mode} rules")
    own = student_names(vision) if isinstance(vision, Distill) else _blank(vision, recipe.seed)
    if own.seed != recipe.seed:
        how.append(f"student of seed {own.seed}")
    return replace(
        own,
        framework=recipe.recipe,
        llm=str(label(recipe.llm)),
        seed=recipe.seed,
        vlm_variant=", ".join(filter(None, how)),
    )


def _influence(found: BenchmarkRow, outcomes: list[Outcome]) -> Influence | None:
    """Returns what each question contributes to the error of a benchmark's score."""
    for outcome in outcomes:
        asked = outcome.stage.recipe
        if isinstance(asked, Answers) and asked.benchmark == found.benchmark and not asked.blind:
            moved = influences(found.benchmark, outcome.items or [], found.mode)
            keys = tuple((found.benchmark, *key) for key in moved)
            return Influence(keys, np.array([*moved.values()]))
    return None


def _average(value: float, own: Measured, parts: Mapping[str, Measured]) -> Measured:
    """Returns the average of all 16 with its error."""
    weights = {name: (1 / 20 if name == "mme_p" else 1.0) / len(BENCHMARKS) for name in parts}
    known = [(weights[name], part.influence) for name, part in parts.items() if part.influence]
    influence = combined(known) if len(known) == len(parts) else None
    interval = None
    if influence is not None:
        half = Z * math.sqrt(influence.variance)
        interval = Interval(value - half, value + half)
    chances = [weights[name] * part.chance for name, part in parts.items() if part.chance]
    return replace(
        own,
        metric=AVERAGE,
        value=value,
        n=sum(part.n for part in parts.values()),
        interval=interval,
        chance=sum(chances),
        constant=all(part.constant for part in parts.values()),
        influence=influence,
    )
