"""What a tracker tells people of trials and stages: params, tags, curves and scores.

Pure functions of plans, journals and reports; `kdscale.sweep.tracking` sends what they say.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from kdscale.core.config import STAGE_WEIGHTS, DataSpec, Distill, Recipe
from kdscale.core.journal import Line
from kdscale.core.trained import epoch_suffix, student_key, trained_by
from kdscale.core.vlm_config import Pretrain, Vlm
from kdscale.sweep.controls import controls_of, is_baseline
from kdscale.sweep.grid import Sweep
from kdscale.sweep.naming import label
from kdscale.sweep.plan import Plan, PlannedTrial, Stage
from kdscale.sweep.report import Report, build_report

TRIAL_TAGS = ("recipe", "llm", "vision", "student", "teacher", "loss", "epochs", "data", "seed")
STAGE_TAGS = ("student", "teacher", "loss", "vision", "llm", "template", "a", "b", "tap", "images")
CURVES = ("zero_shot_top1", "cka_debiased")
MAX_CHARACTERS = 500


@dataclass(frozen=True)
class Point:
    """What was measured at the end of an epoch.

    Attributes:
        time: In seconds since 1970.
    """

    epoch: int
    time: float
    values: dict[str, float]


def distilled(trial: PlannedTrial, plan: Plan) -> tuple[Stage, int | None] | None:
    """Returns the stage that trains a trial's student, and the epoch at which it is read.

    The epoch is None for the last one; there is no stage for a VLM on a tower from elsewhere.
    """
    if isinstance(trial.trial.recipe, Distill):
        return plan.stages[trial.key], trial.epoch
    for key in trial.path:
        recipe = plan.stages[key].recipe
        if isinstance(recipe, Pretrain):
            weights = str(getattr(recipe.vision, "weights", ""))
            if weights.startswith(f"{STAGE_WEIGHTS}distill/"):
                _, student, epoch = trained_by(weights)
                return plan.stages[student], epoch
    return None


def trial_params(trial: PlannedTrial, plan: Plan) -> dict[str, str]:
    """Returns what a trial is, in the sweep's words; sizes are those of the plan's scale."""
    recipe = trial.trial.recipe
    facts: dict[str, Any] = {}
    if isinstance(recipe, Vlm):
        facts |= {"recipe": recipe.recipe, "llm": recipe.llm}
        if not isinstance(recipe.vision, Distill):
            facts["vision"] = recipe.vision
    student = recipe.vision if isinstance(recipe, Vlm) else recipe
    if isinstance(student, Distill):
        facts |= {name: getattr(student, name) for name in ("student", "teacher", "loss", "data")}
    found = distilled(trial, plan)
    if found is not None:
        stage, epoch = found
        trained = stage.training
        facts |= {"epochs": epoch or trained.epochs, "batch_size": trained.global_batch_size}
        facts["lr"] = f"{trained.lr:g}"
    facts |= {"seed": recipe.seed, "scale": plan.scale.name}
    facts |= {name: value for name, value in trial.trial.chosen.items() if name not in facts}
    return {_name(name): told(value) for name, value in facts.items()}


def trial_tags(params: Mapping[str, str]) -> dict[str, str]:
    """Returns what trials are filtered by."""
    return {name: params[name] for name in (*TRIAL_TAGS, "scale") if name in params}


def stage_params(recipe: Recipe) -> dict[str, str]:
    """Returns a recipe's own fields; a spec in it stands by its name (`stage.json` has it all)."""
    names = (name for name in type(recipe).model_fields if name != "run")
    return {name: told(getattr(recipe, name)) for name in names}


def stage_tags(recipe: Recipe) -> dict[str, str]:
    """Returns what stages are filtered by."""
    return {name: told(getattr(recipe, name)) for name in STAGE_TAGS if hasattr(recipe, name)}


def told(value: Any) -> str:
    """Returns a short name of a recipe field's value."""
    found = label(value)
    return "none" if found is None else str(found)[:MAX_CHARACTERS]


def dataset_of(trial: PlannedTrial, plan: Plan) -> dict[str, str] | None:
    """Returns what MLflow keeps of the data that a trial's student, else its VLM, learns from."""
    found = distilled(trial, plan)
    learning = [plan.stages[key] for key in trial.path if plan.stages[key].kind == "finetune"]
    stage = found[0] if found is not None else learning[-1]
    spec = getattr(stage.recipe, "data", None)
    if not isinstance(spec, DataSpec):
        return None
    content = stage.data_hash or hashlib.sha256(spec.model_dump_json().encode()).hexdigest()
    return {
        "name": spec.name,
        "digest": content[:16],
        "source_type": "kdscale",
        "source": json.dumps({"uri": spec.urls or "drawn"}),
        "profile": json.dumps({"num_rows": stage.num_samples}),
    }


def trial_document(trial: PlannedTrial, plan: Plan) -> dict[str, Any]:
    """Returns where a trial's stages and its models lie, and how to export these."""
    stages = [plan.stages[key] for key in trial.path]
    models: list[dict[str, str]] = []
    found = distilled(trial, plan)
    if found is not None:
        stage, epoch = found
        url = stage.store(plan.storage).url("output", f"model{epoch_suffix(epoch)}")
        models.append({"key": student_key(stage.key, epoch), "url": url, "to": "open_clip"})
    for stage in stages:
        if stage.kind == "finetune":
            url = stage.store(plan.storage).url("output")
            models.append({"key": stage.key, "url": url, "to": "hf"})
    for model in models:
        model["export"] = f"kdscale export {model['key']} --to {model.pop('to')} --out DIR"
    return {
        "sweep": trial.sweep,
        "name": trial.trial.name,
        "key": trial.student,
        "models": models,
        "stages": [
            {"kind": s.kind, "key": s.key, "url": s.store(plan.storage).url()} for s in stages
        ],
    }


def curve(lines: Iterable[Line], epoch: int | None, newest: int | None) -> list[Point]:
    """Returns the last evaluation in each epoch of a distillation.

    An epoch that is still being trained has none yet, since a tracker cannot take it back.

    Args:
        lines: Of the journal, those that hold an evaluation, in the order of steps.
        epoch: Where the student is read; None for the end.
        newest: The epoch that is being trained, counted from 1; None where training is over.
    """
    last: dict[int, Line] = {line["epoch"] + 1: line for line in lines}
    return [
        Point(number, line.get("time", 0.0), {k: line[k] for k in CURVES if _is_told(line.get(k))})
        for number, line in last.items()
        if (epoch is None or number <= epoch) and (newest is None or number < newest)
    ]


def trial_scores(report: Report, sweep: str) -> dict[str, dict[str, float]]:
    """Returns {trial's name: {metric: value}} of a sweep's report, beside what the curves hold."""
    found: dict[str, dict[str, float | None]] = {}
    for row in report.of(sweep):
        found[row.name] = {
            "minus_control": row.difference and row.difference.points,
            "seconds": row.seconds,
        }
    for vlm in report.vlms:
        if vlm.sweep == sweep:
            asked = vlm.scores[0] if vlm.scores else None  # all questions come first
            found[vlm.name] = {
                "vlm_average": vlm.average,
                "vlm_average_blind": vlm.blind_average,
                "vlm_accuracy": asked and asked.accuracy,
                "vlm_accuracy_blind": asked and asked.blind,
                "seconds": vlm.seconds,
            }
            for one in vlm.benchmarks:
                found[vlm.name][f"benchmark/{one.benchmark}"] = one.score and one.score.value
                found[vlm.name][f"benchmark_blind/{one.benchmark}"] = one.blind and one.blind.value
    for compared in report.compared(sweep):
        found.setdefault(compared.trial, {})[_name(f"cka/{compared.images}")] = compared.debiased
    return {
        name: {k: float(v) for k, v in values.items() if v is not None and _is_told(v)}
        for name, values in found.items()
    }


def score_trial(plan: Plan, sweep: Sweep, planned: PlannedTrial) -> dict[str, float]:
    """Returns what `trial_scores` of the whole report will say of a trial that is finished.

    Only its own stages and its controls' are read. Of controls that are not finished yet the report
    says nothing, so the difference to them comes later.
    """
    others: list[PlannedTrial] = []
    if isinstance(planned.trial.recipe, Distill) and not is_baseline(planned, sweep):
        own = [trial for trial in plan.trials if trial.sweep == sweep.name]
        students = [trial for trial in own if isinstance(trial.trial.recipe, Distill)]
        others = controls_of(planned, students, sweep)
    alone = replace(plan, trials=[planned, *others])
    return trial_scores(build_report(alone, [sweep]), sweep.name).get(planned.trial.name, {})


def _is_told(value: float | None) -> bool:
    """Tells whether a number says something: NaN stands for what is undefined."""
    return value is not None and math.isfinite(value)


def _name(text: str) -> str:
    """Replaces what names of params and metrics may not hold."""
    return re.sub(r"[^\w\-./: ]", "_", text)
