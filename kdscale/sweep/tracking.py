"""MLflow: one experiment a sweep, one run a stage, every step once.

The journal in the stage's directory is the truth; MLflow is a view of it. A run is looked up by
its key before it is created, and a step is sent only if the run does not have it, so killed and
restarted sweeps leave neither duplicates nor gaps. A metric's time is that of its journal line:
sent twice, by two drivers or after a time-out, it is the same metric. While the server is away
nothing is lost: the next synchronisation sends what is missing.
"""

# pyright: basic
# (MLflow carries too few types for strict checking)
from __future__ import annotations

import json
import logging
import os
import re
import shlex
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from kdscale.core.answers_config import Answers
from kdscale.core.config import Distill
from kdscale.core.journal import JournalReader, Line, read_steps
from kdscale.core.stopping import stopped
from kdscale.core.storage import Storage
from kdscale.core.types import DataError, StorageError, UnfinishedStage
from kdscale.core.vlm_config import VlmStage
from kdscale.sweep.benchmark_outcomes import score_metrics
from kdscale.sweep.plan import Plan, Stage

os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

logger = logging.getLogger(__name__)
KEY_TAG = "kdscale.key"
SWEEP_TAG = "kdscale.sweep"
TAGS = ("student", "teacher", "loss", "vision", "llm", "template", "a", "b", "tap", "images")
NOT_METRICS = {"step", "epoch", "ids", "attempt", "shards", "questions", "asked", "time"}
SMALL_MODEL_BYTES = 64 * 2**20
MAX_METRICS_PER_CALL = 1000  # the server's limit


def default_tracking_uri(storage: Storage) -> str:
    """Returns a SQLite file in a local storage root, or in the working directory.

    Raises:
        StorageError: The root cannot be made.
    """
    root = storage.root if storage.is_local else os.getcwd()
    try:
        os.makedirs(root, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make {root}: {error}; choose another --storage") from error
    return f"sqlite:///{root}/mlflow.db"


def redacted(text: str) -> str:
    """Hides user names and passwords in URLs, for what is printed or kept."""
    return re.sub(r"://[^/\s]*@", "://***@", text)


def viewing(uri: str) -> str:
    """Returns what to open, or the command to type, to look at what is tracked."""
    if uri.startswith(("http://", "https://")):
        return redacted(uri)
    beside = Path(sys.executable).with_name("mlflow")
    program = "mlflow" if shutil.which("mlflow") or not beside.exists() else str(beside)
    return shlex.join([program, "ui", "--backend-store-uri", redacted(uri)])


class Tracker:
    """Writes one sweep's runs.

    Args:
        uri: MLflow tracking URI.
        sweep: The sweep's name, also the experiment's.
        plan: What is run; only stages of this sweep's trials are tracked.
    """

    def __init__(self, uri: str, sweep: str, plan: Plan) -> None:
        from mlflow import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self._client = MlflowClient(tracking_uri=uri)
        self.sweep, self._plan = sweep, plan
        self._experiment = self._find_experiment(uri)
        self._parent = self._find_or_create({SWEEP_TAG: sweep}, sweep, {})
        self._stages: dict[str, _StageRun] = {}

    @property
    def parent_run_id(self) -> str:
        """The sweep's own run."""
        return self._parent

    def sync(self) -> None:
        """Sends what the journals hold and MLflow lacks."""
        for stage in self._own_stages():
            run = self._stages.get(stage.key)
            if run is None:
                if not stage.store(self._plan.storage).has_started():
                    continue
                run = self._stages[stage.key] = self._open(stage)
            run.send()

    def close(self, files: Mapping[str, str] | None = None) -> None:
        """Sends the rest, ends all runs and attaches the report; nothing may run any more.

        Args:
            files: {artifact name: local path} for the sweep's own run.
        """
        self.sync()
        for run in self._stages.values():
            run.end()
        for path in (files or {}).values():
            self._client.log_artifact(self._parent, path, "report")
        complete = all(self._has_ended(stage) for stage in self._own_stages())
        self._client.set_terminated(self._parent, "FINISHED" if complete else "FAILED")

    def _has_ended(self, stage: Stage) -> bool:
        """Tells whether a stage is finished, or it or one of its inputs was stopped early."""
        if stage.store(self._plan.storage).is_done():
            return True
        needed = [self._plan.stages[key] for key in stage.inputs]
        return any(stopped(s.store(self._plan.storage)) for s in [stage, *needed])

    def _own_stages(self) -> list[Stage]:
        """Returns the stages of this sweep's trials."""
        own = {key for t in self._plan.trials if t.sweep == self.sweep for key in t.path}
        return [stage for stage in self._plan.stages.values() if stage.key in own]

    def _find_experiment(self, uri: str) -> str:
        name = f"kdscale/{self.sweep}"
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            return found.experiment_id
        location = None
        if uri.startswith("sqlite:///"):
            location = (Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts").as_uri()
        return self._client.create_experiment(name, artifact_location=location)

    def _find_or_create(self, identity: dict[str, str], name: str, tags: dict[str, str]) -> str:
        """Returns the run with these tags, creating it at most once."""
        found = self._oldest(identity)
        if found is not None:
            return found
        own = self._client.create_run(self._experiment, run_name=name, tags={**tags, **identity})
        kept = self._oldest(identity) or own.info.run_id
        if kept != own.info.run_id:  # another driver was as quick
            self._client.delete_run(own.info.run_id)
        return kept

    def _oldest(self, identity: dict[str, str]) -> str | None:
        """Returns the first run with these tags, the same one for all who ask."""
        query = " and ".join(f"tags.`{tag}` = '{value}'" for tag, value in identity.items())
        found = self._client.search_runs([self._experiment], query)
        runs = sorted((run.info.start_time, run.info.run_id) for run in found)
        return runs[0][1] if runs else None

    def _open(self, stage: Stage) -> _StageRun:
        recipe = stage.recipe
        tags = {
            "mlflow.parentRunId": self._parent,
            "sweep": self.sweep,
            "stage": stage.kind,
            "inputs": ",".join(stage.inputs),
            "scale": self._plan.scale.name,
            **{field: _name(getattr(recipe, field)) for field in TAGS if hasattr(recipe, field)},
            "storage": stage.store(self._plan.storage).url(),
        }
        run_id = self._find_or_create({KEY_TAG: stage.key}, f"{stage.kind}: {stage.name}", tags)
        return _StageRun(self._client, run_id, stage, self._plan.storage)


class _StageRun:
    """Mirrors one stage's journal into its run."""

    def __init__(self, client: Any, run_id: str, stage: Stage, storage: Storage) -> None:
        self._client, self._run_id, self._stage = client, run_id, stage
        self._store = stage.store(storage)
        self._reader = JournalReader(self._store)
        learns = isinstance(stage.recipe, Distill | VlmStage)
        self._marker = "loss" if learns else "samples_per_s"
        self._unsent: list[Line] = []
        self._may_score = isinstance(stage.recipe, Answers)
        self._log_params()
        run = client.get_run(run_id)
        if run.info.status in ("FAILED", "KILLED") and not self._store.is_done():
            client.update_run(run_id, "RUNNING")

    def send(self) -> None:
        """Sends new lines, keeping them for the next time where the server refuses."""
        self._unsent += self._reader.new_lines()
        self._send_lines()
        if self._may_score and self._store.is_done():
            self._send_score()
            self._may_score = False

    def _send_lines(self) -> None:
        """Sends the lines that the run lacks."""
        if not self._unsent:
            return
        history = self._client.get_metric_history(self._run_id, self._marker)
        lines = unsent(self._unsent, {metric.step for metric in history})
        for metrics in in_calls(lines):
            self._client.log_batch(self._run_id, metrics=metrics)
        self._unsent = []

    def _send_score(self) -> None:
        """Sends the score of finished answers, unless the run has it; or says why there is none."""
        from mlflow.entities import Metric

        if self._client.get_metric_history(self._run_id, "score"):
            return
        recipe = self._stage.recipe
        assert isinstance(recipe, Answers)
        try:
            found = score_metrics(recipe, self._store)
        except (DataError, StorageError, UnfinishedStage) as error:
            self._client.set_tag(self._run_id, "mlflow.note.content", f"no score: {error}")
            return
        steps = read_steps(self._store)
        at, step = (int(1000 * steps[-1]["time"]), steps[-1]["step"]) if steps else (0, 0)
        metrics = [Metric(name, value, at, step) for name, value in found.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def end(self) -> None:
        """Marks the run finished, once, with its outputs attached; or failed."""
        if not self._store.is_done():
            note = stopped(self._store)
            if note is not None:
                words = f"stopped early at step {note['step']}: {note['reason']}"
                self._client.set_tag(self._run_id, "mlflow.note.content", words)
                self._client.set_terminated(self._run_id, "KILLED")
                return
            failure = self._store.failure()
            if failure is not None:
                self._client.set_tag(self._run_id, "mlflow.note.content", failure["message"])
            self._client.set_terminated(self._run_id, "FAILED")
            return
        run = self._client.get_run(self._run_id)
        if run.info.status == "FINISHED":
            return
        self._log_outputs()
        self._client.set_terminated(self._run_id, "FINISHED")

    def _log_params(self) -> None:
        from mlflow.entities import Param

        known = self._client.get_run(self._run_id).data.params
        flat = flatten(self._stage.recipe)
        params = [Param(k, v) for k, v in flat.items() if k not in known]
        for start in range(0, len(params), 90):
            self._client.log_batch(self._run_id, params=params[start : start + 90])

    def _log_outputs(self) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            path = os.path.join(scratch, "stage.json")
            Path(path).write_text(json.dumps(self._store.record(), indent=2, sort_keys=True))
            self._client.log_artifact(self._run_id, path)
        storage = self._store.storage
        with storage.local_directory(*self._store.parts, "output") as directory:
            for file in sorted(Path(directory).rglob("*")):
                if file.is_file() and file.stat().st_size <= SMALL_MODEL_BYTES:
                    target = "/".join(("output", *file.relative_to(directory).parts[:-1]))
                    self._client.log_artifact(self._run_id, str(file), target)


class Mirror:
    """Keeps MLflow up to date from a thread, whatever happens to the server.

    Args:
        make_trackers: Connects; called again until it works.
        every_s: Seconds between synchronisations.
    """

    def __init__(self, make_trackers: Callable[[], list[Tracker]], every_s: float = 2.0) -> None:
        self._make, self._every_s = make_trackers, every_s
        self._trackers: list[Tracker] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True, name="mlflow")
        self._warned = False

    def __enter__(self) -> Mirror:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def publish(self, sweep: str, files: Mapping[str, str]) -> None:
        """Ends a sweep's finished runs and attaches its report; a lost server is only a warning."""
        try:
            for tracker in self._connected():
                if tracker.sweep == sweep:
                    tracker.close(files)
        except Exception as error:
            reason = redacted(str(error))
            logger.warning("MLflow is not reachable, the report stays in storage: %s", reason)

    def _connected(self) -> list[Tracker]:
        """Returns the trackers, connecting if that has not worked yet."""
        if not self._trackers:
            self._trackers = self._make()
        return self._trackers

    def _loop(self) -> None:
        while not self._stop.wait(self._every_s):
            self._sync()
        self._sync()

    def _sync(self) -> None:
        try:
            for tracker in self._connected():
                tracker.sync()
            self._warned = False
        except Exception as error:  # the server's faults must not stop training
            if not self._warned:
                reason = redacted(str(error))
                logger.warning("MLflow is not reachable, metrics wait in storage: %s", reason)
            self._warned = True


def flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Flattens a recipe into MLflow params: dotted names, at most 500 characters a value."""
    if isinstance(value, BaseModel):
        value = {name: getattr(value, name) for name in type(value).model_fields}
    if isinstance(value, Mapping):
        flat: dict[str, str] = {}
        for name, item in value.items():
            flat |= flatten(item, f"{prefix}.{name}" if prefix else str(name))
        return flat
    return {prefix: (_name(value) if callable(value) else str(value))[:500]}


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


def _name(value: Any) -> str:
    """Returns a short name of a recipe value."""
    if isinstance(value, Mapping):
        return "+".join(f"{v:g} {k}" for k, v in value.items())
    return str(getattr(value, "name", None) or getattr(value, "__qualname__", None) or value)
