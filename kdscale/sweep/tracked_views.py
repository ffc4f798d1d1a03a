"""How MLflow's pages open: an experiment's kind, its description and its saved views.

MLflow keeps a saved view as a tag of the experiment, and lists it under "Views" above the runs; a
view holds columns, filter and order. Versions without saved views open them by their link, older
ones ignore the tags.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping, Sequence

from kdscale.core.vlm_config import Vlm
from kdscale.sweep.plan import Plan, PlannedTrial
from kdscale.sweep.tracked_facts import trial_params

VIEW_TAG, VIEW_KEY = "mlflow.sharedViewState.", "viewStateShareKey"
NOTE_TAG = "mlflow.note.content"
TRIALS_VIEW, TREE_VIEW = "kdscale-trials", "kdscale-tree"
OF_DISTILLATION = ("student", "teacher", "loss", "epochs")
OF_VLM = ("recipe", "llm")
MEASURED_DISTILLATION = ("zero_shot_top1", "minus_control", "cka_debiased")
AVERAGES = ("vlm_average", "vlm_average_blind")  # of a VLM's benchmarks
ACCURACIES = ("vlm_accuracy", "vlm_accuracy_blind")  # of its miniature questions
WIDTHS = {"metrics": 130, "params": 100}
NAME_COLUMN, NAME_WIDTH = "attributes.`Run Name`", 330
MAX_ABOUT = 3000  # of 5000 characters that a tag may have


def runs_page(experiment: str, view: str = TRIALS_VIEW) -> str:
    """Returns the page of an experiment's runs, below a server's address."""
    return f"#/experiments/{experiment}/runs?workflowType=machine_learning&{VIEW_KEY}={view}"


def experiment_tags(
    experiment: str, trials: Sequence[PlannedTrial], plan: Plan, about: str, created_ms: int
) -> dict[str, str]:
    """Returns the tags that make an experiment's pages useful.

    Args:
        experiment: Its id.
        trials: What it holds.
        plan: The trials'.
        about: What it asks, and what runs it again.
        created_ms: When it was created: a view's time, so that its tag never changes by itself.
    """
    metrics = _metrics(trials)
    columns = [f"metrics.`{name}`" for name in metrics]
    columns += [f"params.`{name}`" for name in _params(trials, plan)]
    flat = {"searchFilter": "tags.level = 'trial'", "orderByKey": columns[0], "orderByAsc": False}
    return {
        "mlflow.experimentKind": "custom_model_development",
        "mlflow.experiment.primaryMetric.name": metrics[0],
        "mlflow.experiment.primaryMetric.greaterIsBetter": "True",
        VIEW_TAG + TRIALS_VIEW: _view("Trials", columns, flat, created_ms),
        VIEW_TAG + TREE_VIEW: _view("Trials with their stages", columns, {}, created_ms),
        NOTE_TAG: _note(experiment, about),
    }


def _metrics(trials: Sequence[PlannedTrial]) -> list[str]:
    """Returns what came out, first what a sweep's trials are told apart by.

    VLMs of one student share its accuracy; of VLMs without benchmarks only the answers to miniature
    questions tell.
    """
    vlms = [trial.trial.recipe for trial in trials if isinstance(trial.trial.recipe, Vlm)]
    students = MEASURED_DISTILLATION if len(vlms) < len(trials) else MEASURED_DISTILLATION[:1]
    own = [
        *(AVERAGES if any(vlm.suite is not None for vlm in vlms) else ()),
        *(ACCURACIES if any(vlm.questions is not None for vlm in vlms) else ()),
    ]
    return [*own, *students]


def _params(trials: Sequence[PlannedTrial], plan: Plan) -> list[str]:
    """Returns what trials differ in; what all of them share is in no column."""
    values: dict[str, set[str]] = {}
    for trial in trials:
        for name, value in trial_params(trial, plan).items():
            values.setdefault(name, set()).add(value)
    chosen = [name for trial in trials for name in trial.trial.chosen if name != "vision"]
    names = dict.fromkeys([*OF_VLM, *OF_DISTILLATION, *chosen])
    return [name for name in names if len(values.get(name, ())) > 1]


def _view(name: str, columns: Sequence[str], search: Mapping[str, object], created_ms: int) -> str:
    """Returns a saved view as MLflow's pages write it."""
    widths = {column: WIDTHS[column.partition(".")[0]] for column in columns}
    state = {
        **{key: value for key, value in search.items() if value is not None},
        "selectedColumns": list(columns),
        "columnOrder": [NAME_COLUMN, *columns],  # widths of others are ignored
        "columnWidths": {NAME_COLUMN: NAME_WIDTH, **widths},
    }
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
    envelope = {"name": name, "createdAt": created_ms, "updatedAt": created_ms}
    return json.dumps(envelope | {"state": f"deflate;{packed}"})


def _note(experiment: str, about: str) -> str:
    """Describes an experiment to who opens it."""
    return (
        f"[Trials as a table]({runs_page(experiment)}), "
        f"[trials with their stages]({runs_page(experiment, TREE_VIEW)}). "
        f"The report is an artifact of the sweep's own run.\n\n{about[:MAX_ABOUT]}\n"
    )
