"""What a reader of MLflow finds: the tree of runs, columns, curves, filters, artifacts."""

from __future__ import annotations

import base64
import io
import json
import re
import zlib
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdscale import Distill, Sweep, choose
from kdscale.core.journal import JournalWriter
from kdscale.core.scale import MINI
from kdscale.core.storage import Storage
from kdscale.sweep.plan import Plan, Stage, make_plan
from kdscale.sweep.report import build_report
from kdscale.sweep.report_files import write_files
from kdscale.sweep.tracked import TrialRun
from kdscale.sweep.tracked_facts import curve, score_trial, trial_scores
from kdscale.sweep.tracking import PARENT_TAG, Tracker, address

STEPS_PER_EPOCH = 64  # of the miniature CC12M
DOCS = Path(__file__).parent.parent / "docs" / "tracking.md"
KEPT: dict[str, Any] = {"epochs": 64, "keep_epochs": (32,)}  # two epochs in miniature
SWEEP = Sweep(
    name="losses",
    stages=[
        Distill(student="vit_t16", loss="clip", **KEPT),
        Distill(
            student="vit_t16",
            teacher=choose("clip_b16", "clip_l14"),
            loss=choose("clip_kd", "kl"),
            **KEPT,
        ),
    ],
    baseline={"teacher": None},
    scale="mini",
)
TOP1 = {
    "vit_t16 alone clip": 25,
    "vit_t16 from clip_b16 clip_kd": 40,
    "vit_t16 from clip_b16 kl": 32,
    "vit_t16 from clip_l14 clip_kd": 45,
    "vit_t16 from clip_l14 kl": 20,
}


def evaluated(stage: Stage, storage: Storage, steps: range, top1: float = 10.0) -> None:
    """Writes a distillation's journal, with an evaluation at every half of an epoch."""
    journal = JournalWriter(stage.store(storage), flush_every=1000)
    for step in steps:
        line: dict[str, Any] = {"step": step, "epoch": (step - 1) // STEPS_PER_EPOCH}
        line |= {"total": 9.0 / step, "lr": 1e-3, "samples_per_s": 500.0}
        if step % (STEPS_PER_EPOCH // 2) == 0:
            line |= {"zero_shot_top1": top1 - 10 + 10 * step / 128, "cka_debiased": step / 200}
        journal.append(line)
    journal.flush()


def finish(stage: Stage, storage: Storage, top1: int) -> None:
    """Writes what a finished distillation leaves behind; of 100 answers `top1` are right."""
    parts = (*stage.store(storage).parts, "output")
    labels = [number % 10 for number in range(100)]
    said = [label if n < top1 else label + 1 for n, label in enumerate(labels)]
    keys = [f"{number:05d}" for number in range(100)]
    for suffix in ("", "-epoch-0001"):
        buffer = io.BytesIO()
        pq.write_table(pa.table({"key": keys, "label": labels, "prediction": said}), buffer)
        storage.write(buffer.getvalue(), *parts, f"zero_shot{suffix}.parquet")
        storage.write_json({"zero_shot_top1": float(top1)}, *parts, f"metrics{suffix}.json")
    storage.write(b"weights", *parts, "model", "open_clip_model.safetensors")
    stage.store(storage).finish({"kind": stage.kind, "seconds": 40.0})


@dataclass
class Tracked:
    """A study that is finished and tracked."""

    plan: Plan
    uri: str
    files: dict[str, str] = field(default_factory=dict)

    @property
    def client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=self.uri)

    @property
    def experiment(self) -> Any:
        return self.client.get_experiment_by_name("kdscale/losses")

    def track(self) -> Tracker:
        """Does what a run does when all stages are done."""
        report = build_report(self.plan, [SWEEP])
        tracker = Tracker(self.uri, "losses", self.plan, "kdscale run losses.py")
        tracker.close(self.files, trial_scores(report, "losses"))
        return tracker

    def runs(self, query: str = "") -> list[Any]:
        return self.client.search_runs([self.experiment.experiment_id], query, max_results=200)

    def names(self, query: str) -> set[str]:
        return {run.info.run_name for run in self.runs(query)}

    def history(self, name: str, metric: str) -> list[tuple[int, float]]:
        (run,) = [r for r in self.runs("tags.level = 'trial'") if r.info.run_name == name]
        found = self.client.get_metric_history(run.info.run_id, metric)
        return [(point.step, point.value) for point in found]


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Tracked:
    root = tmp_path_factory.mktemp("tracked")
    plan = make_plan([SWEEP], Storage(str(root / "store")), MINI, {})
    for stage in plan.stages.values():
        evaluated(stage, plan.storage, range(1, 129), TOP1.get(stage.name, 30))
        finish(stage, plan.storage, TOP1.get(stage.name, 30))
    files = write_files(build_report(plan, [SWEEP]), plan, str(root))
    found = Tracked(plan, f"sqlite:///{root}/mlflow.db", files)
    found.track()
    return found


def test_runs_form_a_tree_of_sweep_trials_and_stages(tracked: Tracked) -> None:
    by_id = {run.info.run_id: run for run in tracked.runs()}
    parents = {
        run.info.run_name: by_id[run.data.tags[PARENT_TAG]].info.run_name
        for run in by_id.values()
        if PARENT_TAG in run.data.tags
    }
    trials = dict.fromkeys(TOP1, "losses")
    stages = {f"distill: {name}": name for name in TOP1}
    teachers = dict.fromkeys(("teacher: mini CLIP B/16", "teacher: mini CLIP L/14"), "losses")
    assert parents == trials | stages | teachers
    assert all(run.info.status == "FINISHED" for run in by_id.values())
    for run in by_id.values():
        if run.data.tags["level"] == "stage":
            assert run.info.end_time - run.info.start_time >= 39_990


def test_the_documented_filters_find_what_they_say(tracked: Tracked) -> None:
    (block,) = re.findall(r"```sql\n(.*?)```", DOCS.read_text(), re.DOTALL)
    filters = [line for line in block.splitlines() if line and not line.startswith("--")]
    trials = set(TOP1)
    expected = [
        trials,
        {"vit_t16 from clip_l14 clip_kd"},
        {"vit_t16 from clip_b16 clip_kd", "vit_t16 from clip_b16 kl"} | {
            "vit_t16 from clip_l14 clip_kd"
        },
        {f"distill: {name}" for name in trials if "clip_kd" in name},
        set(),
    ]  # fmt: skip
    assert [tracked.names(query) for query in filters] == expected


def test_curves_go_by_epochs_and_scores_come_from_the_report(tracked: Tracked) -> None:
    name = "vit_t16 from clip_l14 clip_kd"
    assert tracked.history(name, "zero_shot_top1") == [(1, 40.0), (2, 45.0)]
    assert tracked.history(name, "cka_debiased") == [(1, 0.32), (2, 0.64)]
    (run,) = [r for r in tracked.runs("tags.level = 'trial'") if r.info.run_name == name]
    assert run.data.metrics["minus_control"] == pytest.approx(20.0)
    assert run.data.params | {"lr": ""} == {
        "student": "vit_t16",
        "teacher": "clip_l14",
        "loss": "clip_kd",
        "data": "cc12m",
        "epochs": "2",
        "batch_size": "128",
        "lr": "",
        "seed": "0",
        "scale": "mini",
    }
    (data,) = run.inputs.dataset_inputs
    assert data.dataset.name == "mini CC12M"


def test_an_epoch_is_told_when_it_is_over() -> None:
    places = ((1, 0), (2, 0), (3, 1))
    lines = [{"step": n, "epoch": e, "zero_shot_top1": float(n)} for n, e in places]
    running, over = curve(lines, None, newest=2), curve(lines, None, newest=None)
    assert [(point.epoch, point.values) for point in running] == [(1, {"zero_shot_top1": 2.0})]
    assert [point.epoch for point in over] == [1, 2]
    assert [point.epoch for point in curve(lines, 1, newest=None)] == [1]
    undefined = [{"step": 1, "epoch": 0, "cka_debiased": float("nan"), "zero_shot_top1": 1.0}]
    assert curve(undefined, None, None)[0].values == {"zero_shot_top1": 1.0}


def test_small_results_are_attached_and_weights_only_named(tracked: Tracked) -> None:
    client = tracked.client
    (stage,) = tracked.runs("run_name = 'distill: vit_t16 from clip_l14 kl'")
    (trial,) = tracked.runs("run_name = 'vit_t16 from clip_l14 kl'")
    (sweep,) = tracked.runs("tags.level = 'sweep'")

    def files(run: Any, folder: str | None = None) -> set[str]:
        return {file.path for file in client.list_artifacts(run.info.run_id, folder)}

    assert files(stage) == {"stage.json", "output.json", "output"}
    assert "output/metrics.json" in files(stage, "output")
    assert not any("safetensors" in name or "model" in name for name in files(stage, "output"))
    reports = {"report/report.html", "report/trials.csv", "report/scores.png"}
    assert files(sweep, "report") == reports
    header = Path(tracked.files["trials.csv"]).read_text().splitlines()[0].split(",")
    assert {"trial", "teacher", "zero_shot_top1", "zero_shot_low", "minus_control"} <= set(header)
    document = json.loads(
        Path(client.download_artifacts(trial.info.run_id, "trial.json")).read_text()
    )
    (model,) = document["models"]
    assert Path(model["url"], "open_clip_model.safetensors").exists()
    assert model["export"].startswith(f"kdscale export {model['key']} --to open_clip")


def test_a_second_run_logs_nothing_twice(tracked: Tracked) -> None:
    def of(run: Any) -> tuple[Any, ...]:
        points = [
            (key, point.step, point.value, point.timestamp)
            for key in run.data.metrics
            for point in client.get_metric_history(run.info.run_id, key)
        ]
        return dict(run.info), run.data.params, run.data.tags, sorted(points)

    def everything() -> dict[str, Any]:
        return {run.info.run_id: of(run) for run in tracked.runs()}

    client = tracked.client
    before, tags = everything(), tracked.experiment.tags
    tracked.track()
    assert everything() == before
    assert tracked.experiment.tags == tags
    lengths = {
        len(client.get_metric_history(run.info.run_id, "loss"))
        for run in tracked.runs("tags.level = 'stage'")
    }
    assert lengths == {128}


def test_views_name_columns_that_trials_have(tracked: Tracked) -> None:
    tags = tracked.experiment.tags
    assert tags["mlflow.experimentKind"] == "custom_model_development"
    tracker = Tracker(tracked.uri, "losses", tracked.plan, "kdscale run losses.py")
    assert tracker.page in tags["mlflow.note.content"]
    assert address("http://me:secret@host:80/", tracker.page).startswith("http://***@host:80/#/exp")
    assert tags["mlflow.experiment.primaryMetric.name"] == "zero_shot_top1"
    trials = tracked.runs("tags.level = 'trial'")
    have = {f"params.`{name}`" for run in trials for name in run.data.params}
    have |= {f"metrics.`{name}`" for run in trials for name in run.data.metrics}
    for view in ("kdscale-trials", "kdscale-tree"):
        assert view == "kdscale-tree" or view in tracker.page
        envelope = json.loads(tags[f"mlflow.sharedViewState.{view}"])
        packed = envelope["state"].removeprefix("deflate;")
        state = json.loads(zlib.decompress(base64.b64decode(packed)))
        assert envelope["name"].startswith("Trials")
        columns = [name.partition(".")[2].strip("`") for name in state["selectedColumns"]]
        assert columns == ["zero_shot_top1", "minus_control", "cka_debiased", "teacher", "loss"]
        assert set(state["selectedColumns"]) <= have


def test_a_trial_ends_as_its_stages_do_and_opens_again(tmp_path: Path) -> None:
    two = Distill(student="vit_t16", loss="clip", lr=choose(1e-4, 2e-4), epochs=64)
    sweep = Sweep(name="losses", stages=[two], scale="mini")
    plan = make_plan([sweep], Storage(str(tmp_path / "store")), MINI, {})
    world = Tracked(plan, f"sqlite:///{tmp_path}/mlflow.db")
    broken, waiting = plan.stages.values()
    evaluated(broken, plan.storage, range(1, 97))
    broken.store(plan.storage).fail("TrainingDiverged: the loss is nan", final=True)
    Tracker(world.uri, "losses", plan).close()
    (trial,) = world.runs("tags.level = 'trial'")
    assert trial.info.status == "FAILED"
    assert trial.data.tags["mlflow.note.content"] == "distill: TrainingDiverged: the loss is nan"
    assert world.history(trial.info.run_name, "zero_shot_top1") == [(1, 5.0)]
    again = Tracker(world.uri, "losses", plan)
    again.sync()
    assert {run.info.status for run in world.runs("tags.level != 'sweep'")} == {"RUNNING"}
    evaluated(broken, plan.storage, range(65, 129))
    finish(broken, plan.storage, 10)
    again.sync()
    assert {run.info.status for run in world.runs("tags.level != 'sweep'")} == {"FINISHED"}
    assert world.history(trial.info.run_name, "zero_shot_top1") == [(1, 5.0), (2, 10.0)]
    assert waiting.name not in world.names("")


def test_scores_come_with_a_trial_and_differences_with_its_control(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan([SWEEP], Storage(str(tmp_path / "store")), MINI, {})
    world = Tracked(plan, f"sqlite:///{tmp_path}/mlflow.db")
    name = "vit_t16 from clip_l14 kl"

    def track() -> Tracker:
        scored = partial(score_trial, plan, SWEEP)
        tracker = Tracker(world.uri, "losses", plan, scored=scored)
        tracker.sync()
        return tracker

    def done(stage: Stage) -> None:
        evaluated(stage, plan.storage, range(1, 129), TOP1.get(stage.name, 30))
        finish(stage, plan.storage, TOP1.get(stage.name, 30))

    stages = {stage.name: stage for stage in plan.stages.values()}
    done(stages["mini CLIP L/14"])
    done(stages[name])
    with monkeypatch.context() as patch:
        patch.setattr(TrialRun, "end", _killed)  # between its scores and its end
        with pytest.raises(RuntimeError):
            track()
    tracker = track()
    (run,) = world.runs("tags.level = 'trial'")
    assert (run.info.run_name, run.info.status) == (name, "FINISHED")
    assert world.history(name, "seconds") == [(0, 40.0)]
    assert "minus_control" not in run.data.metrics
    done(stages["vit_t16 alone clip"])
    tracker.close({}, trial_scores(build_report(plan, [SWEEP]), "losses"))
    assert world.history(name, "minus_control") == [(0, pytest.approx(-5.0))]
    assert world.history(name, "seconds") == [(0, 40.0)]


def _killed(*_: Any) -> None:
    """Stands for a driver's death."""
    raise RuntimeError
