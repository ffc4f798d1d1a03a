"""MLflow's runs of stages and trials: mirrors that may be broken off and made anew at any time.

What a run has already is asked of the server before anything is sent, and a metric's time is that
of its journal line: sent twice, by two drivers or after a time-out, it is the same metric.
"""

# pyright: basic
# (MLflow carries too few types for strict checking)
from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kdscale.core.answers_config import Answers
from kdscale.core.config import Distill
from kdscale.core.journal import JournalReader, Line, read_steps, span
from kdscale.core.stop import stopped
from kdscale.core.storage import StageStore, Storage
from kdscale.core.types import DataError, StorageError, UnfinishedStage
from kdscale.core.vlm_config import VlmStage
from kdscale.sweep.benchmark_outcomes import score_metrics
from kdscale.sweep.kept import is_finished
from kdscale.sweep.plan import Stage
from kdscale.sweep.tracked_facts import CURVES, Point, stage_params

NOT_METRICS = {
    *("step", "epoch", "ids", "attempt", "time"),
    *("shard", "shards", "block", "asked", "questions"),
}
MAX_ATTACHED_BYTES = 8 * 2**20
MAX_METRICS_PER_CALL = 1000  # the server's limits
MAX_PARAMS_PER_CALL = 100
FINISHED, FAILED, STOPPED = "FINISHED", "FAILED", "KILLED"
NOTE = "mlflow.note.content"


class StageRun:
    """Mirrors one stage's journal into its run.

    Args:
        client: MLflow's.
        run_id: The run.
        stage: The stage.
        storage: The stage store.
        known: The run as it was read lately, None to read it.

    Attributes:
        epoch: The newest in the journal, counted from 1.
        status: How the run has ended, None while it goes on.
        note: Why it failed or was stopped.
    """

    def __init__(
        self, client: Any, run_id: str, stage: Stage, storage: Storage, known: Any = None
    ) -> None:
        self._client, self.run_id, self.stage, self._storage = client, run_id, stage, storage
        self._store = stage.store(storage)
        self._reader = JournalReader(self._store)
        learns = isinstance(stage.recipe, Distill | VlmStage)
        self._marker = "loss" if learns else "samples_per_s"
        self._unsent: list[Line] = []
        self._may_score = isinstance(stage.recipe, Answers)
        self._evaluations: dict[int, Line] = {}
        self.epoch = 1
        self.status: str | None = None
        self.note = ""
        run = known or client.get_run(run_id)
        if run.info.status == FINISHED and is_finished(stage, storage):
            self.status = FINISHED  # it has all that there is
            return
        log_params(client, run_id, run.data.params, stage_params(stage.recipe))
        if run.info.status in (FAILED, STOPPED) and not self._store.is_done():
            client.update_run(run_id, "RUNNING")

    @property
    def evaluations(self) -> dict[int, Line]:
        """{step: journal line} of those that hold a point of a curve."""
        if self.status == FINISHED and not self._evaluations:
            self._take(self._reader.new_lines())
            self._unsent = []
        return self._evaluations

    def send(self) -> None:
        """Sends new lines, keeping them for the next time where the server refuses."""
        self._take(self._reader.new_lines())
        self._send_lines()
        if self._may_score and self._store.is_done():
            self._send_score()
            self._may_score = False

    def sync(self) -> None:
        """Sends what is new, and ends the run where the stage is finished; then does no more."""
        if self.status == FINISHED:
            return
        is_over = is_finished(self.stage, self._storage)  # before the last lines are read
        self.send()
        if is_over:
            self.end()

    def _take(self, lines: list[Line]) -> None:
        """Notes new lines as unsent, and what they say of epochs."""
        self._unsent += lines
        for line in lines:
            self.epoch = max(self.epoch, line.get("epoch", 0) + 1)
            if "epoch" in line and any(name in line for name in CURVES):
                self._evaluations[line["step"]] = line

    def _send_lines(self) -> None:
        """Sends the lines that the run lacks."""
        if not self._unsent:
            return
        history = self._client.get_metric_history(self.run_id, self._marker)
        lines = unsent(self._unsent, {metric.step for metric in history})
        for metrics in in_calls(lines):
            self._client.log_batch(self.run_id, metrics=metrics)
        self._unsent = []

    def _send_score(self) -> None:
        """Sends the score of finished answers, unless the run has it; or says why there is none."""
        from mlflow.entities import Metric

        if self._client.get_metric_history(self.run_id, "score"):
            return
        recipe = self.stage.recipe
        assert isinstance(recipe, Answers)
        try:
            found = score_metrics(recipe, self._store)
        except (DataError, StorageError, UnfinishedStage) as error:
            self._client.set_tag(self.run_id, NOTE, f"no score: {error}")
            return
        steps = read_steps(self._store)
        at, step = (int(1000 * steps[-1]["time"]), steps[-1]["step"]) if steps else (0, 0)
        metrics = [Metric(name, value, at, step) for name, value in found.items()]
        self._client.log_batch(self.run_id, metrics=metrics)

    def end(self) -> None:
        """Marks the run finished, once, with its outputs attached; or stopped, or failed."""
        if self._store.is_done():
            if self._client.get_run(self.run_id).info.status != FINISHED:
                self._attach()
                self._client.set_terminated(self.run_id, FINISHED, ended_ms(self._store))
            self.status = FINISHED
            return
        early, failure = stopped(self._store), self._store.failure()
        self.status = STOPPED if early is not None or failure is None else FAILED
        if early is not None:
            self.note = f"stopped early at step {early['step']}: {early['reason']}"
        elif failure is not None:
            self.note = failure["message"]
        else:
            self.note = "interrupted: another run goes on from the last checkpoint"
        if self.note:
            self._client.set_tag(self.run_id, NOTE, self.note)
        self._client.set_terminated(self.run_id, self.status)

    def _attach(self) -> None:
        """Attaches the record, small results and, of what is large, where it lies."""
        parts = (*self._store.parts, "output")
        sizes = self._storage.sizes(*parts)
        attach(self._client, self.run_id, {
            "stage.json": _json(self._store.record()),
            "output.json": _json(
                {"url": self._store.url("output"), "files": sizes, "key": self.stage.key}
            ),
        })  # fmt: skip
        small = [name for name, size in sizes.items() if size <= MAX_ATTACHED_BYTES]
        files = {name: self._storage.read(*parts, name) for name in small}
        attach(self._client, self.run_id, files, "output")


class TrialRun:
    """Tells of one trial what the journals and the report say."""

    def __init__(self, client: Any, run_id: str, status: str | None = None) -> None:
        self._client, self.run_id, self.status = client, run_id, status
        self._known: dict[str, set[int]] = {}

    def plot(self, points: Iterable[Point]) -> None:
        """Sends the points of the curves that the run lacks; a step is an epoch."""
        from mlflow.entities import Metric

        metrics: list[Any] = []
        for point in points:
            for name, value in point.values.items():
                if point.epoch not in self._steps(name):
                    metrics.append(Metric(name, value, int(1000 * point.time), point.epoch))
        if metrics:
            self._client.log_batch(self.run_id, metrics=metrics)
            for metric in metrics:
                self._known[metric.key].add(metric.step)

    def _steps(self, name: str) -> set[int]:
        """Returns the steps that the run has of a metric."""
        if name not in self._known:
            history = self._client.get_metric_history(self.run_id, name)
            self._known[name] = {metric.step for metric in history}
        return self._known[name]

    def score(self, values: Mapping[str, float], at_ms: int | None) -> None:
        """Sends the values that are new or have changed: a control may have come later.

        Args:
            values: {metric: value}.
            at_ms: When the trial ended, None for its start; a value that has changed comes now.
        """
        from mlflow.entities import Metric

        if not values:
            return
        run = self._client.get_run(self.run_id)
        first, now = at_ms or run.info.start_time, int(1000 * time.time())
        known = run.data.metrics
        new = {name: value for name, value in values.items() if known.get(name) != value}
        if new:
            metrics = [Metric(n, v, now if n in known else first, 0) for n, v in new.items()]
            self._client.log_batch(self.run_id, metrics=metrics)

    def end(self, status: str, note: str, end_ms: int | None, result: Mapping[str, Any]) -> None:
        """Marks the run ended, once, with a document of its stages and models attached."""
        run = self._client.get_run(self.run_id)
        if run.info.status != status:
            if note:
                self._client.set_tag(self.run_id, NOTE, note)
            if status == FINISHED:
                attach(self._client, self.run_id, {"trial.json": _json(result)})
            self._client.set_terminated(self.run_id, status, end_ms)
        self.status = status


def log_params(client: Any, run_id: str, known: Container[str], params: Mapping[str, str]) -> None:
    """Sends the params that a run lacks; those that it has cannot change."""
    from mlflow.entities import Param

    new = [Param(name, value) for name, value in params.items() if name not in known]
    for start in range(0, len(new), MAX_PARAMS_PER_CALL):
        client.log_batch(run_id, params=new[start : start + MAX_PARAMS_PER_CALL])


def log_dataset(client: Any, run: Any, dataset: Mapping[str, str] | None) -> None:
    """Names the data of a run that names none yet."""
    from mlflow.entities import Dataset, DatasetInput

    known = run.inputs.dataset_inputs if run.inputs else []
    if dataset is not None and not known:
        client.log_inputs(run.info.run_id, [DatasetInput(Dataset(**dataset))])


def attach(client: Any, run_id: str, files: Mapping[str, bytes], folder: str | None = None) -> None:
    """Attaches files to a run; one of the same name is replaced."""
    with tempfile.TemporaryDirectory() as scratch:
        for name, data in files.items():
            path = os.path.join(scratch, name)
            Path(path).write_bytes(data)
            client.log_artifact(run_id, path, folder)


def started_ms(store: StageStore) -> int | None:
    """Returns when a stage's first attempt began, None where it has written nothing."""
    found = span(store)
    if found is None:
        return None
    first, last = found
    if store.is_done():  # a stage that only measures begins its journal when it is through
        first = min(first, last - store.record().get("seconds", 0.0))
    return int(1000 * first)


def ended_ms(store: StageStore) -> int | None:
    """Returns when a stage's last line was written, None where there is none."""
    found = span(store)
    return None if found is None else int(1000 * found[1])


def unsent(lines: Iterable[Line], known: Container[int]) -> list[Line]:
    """Returns one line for each step that is not known yet, the first where it was repeated."""
    first: dict[int, Line] = {}
    for line in lines:
        if line["step"] not in known:
            first.setdefault(line["step"], line)
    return list(first.values())


def in_calls(lines: Iterable[Line]) -> Iterator[list[Any]]:
    """Translates lines to metrics, as many a call as the server takes.

    All of a step's metrics go in one call, so in one transaction.
    """
    call: list[Any] = []
    for metrics in map(_metrics, lines):
        if call and len(call) + len(metrics) > MAX_METRICS_PER_CALL:
            yield call
            call = []
        call += metrics
    if call:
        yield call


def _metrics(line: Line) -> list[Any]:
    """Translates a journal line; its own time makes a second sending the same metric."""
    from mlflow.entities import Metric

    at = int(1000 * line.get("time", 0))
    names = {"total": "loss"}
    terms = {k: v for k, v in line.items() if k not in NOT_METRICS}
    return [Metric(names.get(k, k), float(v), at, line["step"]) for k, v in terms.items()]


def _json(document: Any) -> bytes:
    """Returns a document as an artifact."""
    return json.dumps(document, indent=2, sort_keys=True).encode()
