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

from kdscale.core.config import Distill
from kdscale.core.vlm_config import Vlm
from kdscale.sweep.plan import PlannedTrial

VIEW_TAG, VIEW_KEY = "mlflow.sharedViewState.", "viewStateShareKey"
NOTE_TAG = "mlflow.note.content"
TRIALS_VIEW, TREE_VIEW = "kdscale-trials", "kdscale-tree"
OF_DISTILLATION = ("student", "teacher", "loss", "epochs")
OF_VLM = ("recipe", "llm")
MEASURED_DISTILLATION = ("zero_shot_top1", "minus_control", "cka_debiased")
MEASURED_VLM = ("vlm_average", "vlm_average_blind", "vlm_accuracy", "vlm_accuracy_blind")
WIDTHS = {"metrics": 130, "params": 100}
NAME_COLUMN, NAME_WIDTH = "attributes.`Run Name`", 330
MAX_ABOUT = 3000  # of 5000 characters that a tag may have


def runs_page(experiment: str, view: str = TRIALS_VIEW) -> str:
    """Returns the page of an experiment's runs, below a server's address."""
    return f"#/experiments/{experiment}/runs?workflowType=machine_learning&{VIEW_KEY}={view}"


def experiment_tags(
    experiment: str, trials: Sequence[PlannedTrial], about: str, created_ms: int
) -> dict[str, str]:
    """Returns the tags that make an experiment's pages useful.

    Args:
        experiment: Its id.
        trials: What it holds.
        about: What it asks, and what runs it again.
        created_ms: When it was created: a view's time, so that its tag never changes by itself.
    """
    columns = trial_columns(trials)
    order = next((name for name in columns if name.startswith("metrics.")), None)
    flat = {"searchFilter": "tags.level = 'trial'", "orderByKey": order, "orderByAsc": False}
    return {
        "mlflow.experimentKind": "custom_model_development",
        "mlflow.experiment.primaryMetric.name": "zero_shot_top1",
        "mlflow.experiment.primaryMetric.greaterIsBetter": "True",
        VIEW_TAG + TRIALS_VIEW: _view("Trials", columns, flat, created_ms),
        VIEW_TAG + TREE_VIEW: _view("Trials with their stages", columns, {}, created_ms),
        NOTE_TAG: _note(experiment, about),
    }


def trial_columns(trials: Sequence[PlannedTrial]) -> list[str]:
    """Returns what is worth a column: what trials are, what else they differ in, what came out."""
    kinds = {type(trial.trial.recipe) for trial in trials}
    params = [*(OF_VLM if Vlm in kinds else ()), *OF_DISTILLATION]
    params += [name for trial in trials for name in trial.trial.chosen if name != "vision"]
    metrics = [*MEASURED_DISTILLATION, *(MEASURED_VLM if Vlm in kinds else ())]
    if Distill not in kinds:
        metrics = [*MEASURED_VLM, *MEASURED_DISTILLATION[:1]]
    columns = [f"params.`{name}`" for name in dict.fromkeys(params)]
    return [*columns, *(f"metrics.`{name}`" for name in metrics)]


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
