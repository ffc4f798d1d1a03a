"""MLflow: one experiment a sweep, runs for it, its trials and their stages, every step once.

The journal in the stage's directory is the truth; MLflow is a view of it. A run is looked up by
its key before it is created, and a step is sent only if the run does not have it, so killed and
restarted sweeps leave neither duplicates nor gaps. A metric's time is that of its journal line:
sent twice, by two drivers or after a time-out, it is the same metric. While the server is away
nothing is lost: the next synchronisation sends what is missing.
"""

# pyright: basic
# (MLflow carries too few types for strict checking)
from __future__ import annotations

import logging
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from kdscale.core.redaction import redacted
from kdscale.core.stop import stopped
from kdscale.core.storage import StageStore, Storage
from kdscale.core.types import StorageError
from kdscale.sweep.plan import Plan, PlannedTrial, Stage
from kdscale.sweep.tracked import (
    FAILED,
    FINISHED,
    STOPPED,
    StageRun,
    TrialRun,
    ended_ms,
    log_dataset,
    log_params,
    started_ms,
)
from kdscale.sweep.tracked_facts import (
    curve,
    dataset_of,
    distilled,
    stage_tags,
    trial_document,
    trial_params,
    trial_tags,
)
from kdscale.sweep.tracked_views import NOTE_TAG, experiment_tags, runs_page

os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # with the password, where it has one

KEY_TAG, TRIAL_TAG, SWEEP_TAG = "kdscale.key", "kdscale.trial", "kdscale.sweep"
CREATED_TAG = "kdscale.created"
PARENT_TAG = "mlflow.parentRunId"
UNFOLDED = {"mlflow.runType": "evaluation"}  # MLflow's pages open the parents of such runs
RUNS_A_PAGE = 200  # which a server answers within the time-out above
MAX_NAME = 250  # of a run, in MLflow's tables
SQLITE = "sqlite:///"
LOCAL_UI = "http://127.0.0.1:5000"


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
    return f"{SQLITE}{root}/mlflow.db"


def _connect(uri: str) -> Any:
    """Returns MLflow's client; a SQLite file is made by one process at a time.

    Of two drivers that start together on one storage, one would find the other's tables half made,
    and the file would be of no use to anybody from then on.
    """
    from mlflow import MlflowClient

    if not uri.startswith(SQLITE):
        return MlflowClient(tracking_uri=uri)
    with FileLock(uri.removeprefix(SQLITE) + ".lock"):
        return MlflowClient(tracking_uri=uri)


def viewing(uri: str) -> str:
    """Returns what to open, or the command to type, to look at what is tracked."""
    if uri.startswith(("http://", "https://")):
        return redacted(uri)
    beside = Path(sys.executable).with_name("mlflow")
    program = "mlflow" if shutil.which("mlflow") or not beside.exists() else str(beside)
    return shlex.join([program, "ui", "--backend-store-uri", redacted(uri)])


def address(uri: str, page: str) -> str:
    """Returns where a page is opened: on the server, or on the one that `viewing` starts."""
    server = redacted(uri).rstrip("/") if uri.startswith(("http://", "https://")) else LOCAL_UI
    return f"{server}/{page}"


class Tracker:
    """Writes one sweep's runs: its own, below it the trials', below these their stages'.

    A stage that several trials go through belongs to the one whose outcome it is, else to the
    sweep's own run.

    Args:
        uri: MLflow tracking URI.
        sweep: The sweep's name, also the experiment's.
        plan: What is run; only stages of this sweep's trials are tracked.
        command: What runs the sweep, for people.
        question: What the sweep asks, for people.
        scored: Gives {metric: value} of a trial that is finished; None leaves scores to `close`.
    """

    def __init__(
        self,
        uri: str,
        sweep: str,
        plan: Plan,
        command: str = "kdscale run",
        question: str = "",
        scored: Callable[[PlannedTrial], Mapping[str, float]] | None = None,
    ) -> None:
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self._client = _connect(uri)
        self.sweep, self._plan, self._scored = sweep, plan, scored
        self._experiment = self._find_experiment(uri, f"{question.strip()}\n\n    {command}")
        self._known = self._runs()
        own = self._find_or_create((SWEEP_TAG, sweep), sweep, {"level": "sweep"}, None)
        self._parent: str = own.info.run_id
        self._stages: dict[str, StageRun] = {}
        self._parents: dict[str, str] = {}
        self._trials: dict[str, TrialRun] = {}

    @property
    def parent_run_id(self) -> str:
        """The sweep's own run."""
        return self._parent

    @property
    def page(self) -> str:
        """The table of trials, below a server's address."""
        return runs_page(self._experiment)

    def sync(self) -> None:
        """Sends what the journals hold and MLflow lacks."""
        trials, begun = self._own_trials(), self._plan.begun()
        users: dict[str, list[PlannedTrial]] = {}
        for trial in trials:
            for key in trial.path:
                users.setdefault(key, []).append(trial)
        for key, through in users.items():
            stage = self._plan.stages[key]
            run = self._stages.get(key)
            if run is None and not (key in begun and self._has_started(stage)):
                continue
            owner = through[0] if len(through) == 1 else _whose_outcome(through, key)
            parent = self._parent if owner is None else self._trial(owner, stage).run_id
            if run is None:
                run = self._stages[key] = self._open(stage, parent, owner)
            self._move(run, parent)
            run.sync()
        for trial in trials:
            self._sync_trial(trial)

    def close(
        self,
        files: Mapping[str, str] | None = None,
        scores: Mapping[str, Mapping[str, float]] | None = None,
    ) -> None:
        """Sends the rest, ends all runs and attaches the report; nothing may run any more.

        Args:
            files: {artifact name: local path} for the sweep's own run.
            scores: {trial's name: {metric: value}}; what runs have already is not sent again.
        """
        self.sync()
        for run in self._stages.values():
            if run.status is None:
                run.end()
        for trial in self._own_trials():
            run = self._trials.get(trial.student)
            if run is not None:
                if run.status is None:
                    self._end_trial(trial, run)
                run.score((scores or {}).get(trial.trial.name, {}), self._ended_ms(trial))
        for path in (files or {}).values():
            self._client.log_artifact(self._parent, path, "report")
        status = FINISHED if all(map(self._has_ended, self._own_stages())) else FAILED
        if self._client.get_run(self._parent).info.status != status:
            self._client.set_terminated(self._parent, status)

    def _has_started(self, stage: Stage) -> bool:
        """Tells whether there is anything to track of a stage."""
        return stage.store(self._plan.storage).has_started()

    def _has_ended(self, stage: Stage) -> bool:
        """Tells whether a stage is finished, or it or one of its inputs was stopped early."""
        if stage.store(self._plan.storage).is_done():
            return True
        needed = [self._plan.stages[key] for key in stage.inputs]
        return any(stopped(s.store(self._plan.storage)) for s in [stage, *needed])

    def _own_trials(self) -> list[PlannedTrial]:
        """Returns this sweep's trials; of those that are one and the same student, the first."""
        own: dict[str, PlannedTrial] = {}
        for trial in self._plan.trials:
            if trial.sweep == self.sweep:
                own.setdefault(trial.student, trial)
        return list(own.values())

    def _own_stages(self) -> list[Stage]:
        """Returns the stages of this sweep's trials."""
        own = {key for t in self._plan.trials if t.sweep == self.sweep for key in t.path}
        return [stage for stage in self._plan.stages.values() if stage.key in own]

    def _find_experiment(self, uri: str, about: str) -> str:
        """Returns the sweep's experiment, with the tags that its pages go by."""
        name = f"kdscale/{self.sweep}"
        found = self._client.get_experiment_by_name(name)
        if found is None:
            location = None
            if uri.startswith(SQLITE):
                location = (Path(uri.removeprefix(SQLITE)).parent / "mlartifacts").as_uri()
            self._client.create_experiment(name, artifact_location=location)
            found = self._client.get_experiment_by_name(name)
        assert found is not None
        tags = experiment_tags(
            found.experiment_id, self._own_trials(), self._plan, about, found.creation_time or 0
        )
        for tag, value in tags.items():
            is_theirs = tag == NOTE_TAG and tag in found.tags  # a description may be edited
            if found.tags.get(tag) != value and not is_theirs:
                self._client.set_experiment_tag(found.experiment_id, tag, value)
        return found.experiment_id

    def _find_or_create(
        self, identity: tuple[str, str], name: str, tags: dict[str, str], store: StageStore | None
    ) -> Any:
        """Returns the run with this tag, creating it at most once; it begins as its stage did."""
        found = self._known.pop(identity, None) or self._oldest(identity)
        if found is not None:
            return found
        start_ms = None if store is None else started_ms(store)
        common = {
            "sweep": self.sweep,
            "mlflow.source.name": f"kdscale run {self.sweep}",
            "mlflow.source.type": "LOCAL",
            CREATED_TAG: str(time.time_ns()),
        }
        own = self._client.create_run(
            self._experiment, start_ms, {**common, **tags, **dict([identity])}, name[:MAX_NAME]
        )
        kept = self._oldest(identity) or own
        if kept.info.run_id != own.info.run_id:  # another driver was as quick
            self._client.delete_run(own.info.run_id)
        return kept

    def _runs(self) -> dict[tuple[str, str], Any]:
        """Returns this plan's runs by what tells them apart, of several the oldest.

        A study that is run again finds hundreds of runs: one query for all, not some for each.
        """
        own = {(SWEEP_TAG, self.sweep)} | {(KEY_TAG, key) for key in self._plan.stages}
        own |= {(TRIAL_TAG, trial.student) for trial in self._own_trials()}
        found: dict[tuple[str, str], Any] = {}
        token: str | None = ""
        while token is not None:
            page = self._client.search_runs(
                [self._experiment], max_results=RUNS_A_PAGE, page_token=token or None
            )
            for run in page:
                for identity in own & run.data.tags.items():
                    kept = found.setdefault(identity, run)
                    found[identity] = min(kept, run, key=_created)
            token = page.token or None
        return found

    def _oldest(self, identity: tuple[str, str]) -> Any:
        """Returns the run with this tag that was created first, the same for all who ask."""
        tag, value = identity
        found = self._client.search_runs([self._experiment], f"tags.`{tag}` = '{value}'")
        return min(found, key=_created, default=None)

    def _open(self, stage: Stage, parent: str, owner: PlannedTrial | None) -> StageRun:
        """Finds or creates a stage's run."""
        store = stage.store(self._plan.storage)
        whose = {} if owner is None else trial_tags(trial_params(owner, self._plan))
        tags = {
            "level": "stage",
            "stage": stage.kind,
            "inputs": ",".join(stage.inputs),
            "scale": self._plan.scale.name,
            **stage_tags(stage.recipe),
            **whose,
            PARENT_TAG: parent,
            "storage": store.url(),
        }
        name = f"{stage.kind}: {stage.name}"
        run = self._find_or_create((KEY_TAG, stage.key), name, tags, store)
        self._parents[stage.key] = run.data.tags.get(PARENT_TAG, "")
        return StageRun(self._client, run.info.run_id, stage, self._plan.storage, run)

    def _move(self, run: StageRun, parent: str) -> None:
        """Moves a stage's run below another one: a trial may have come that shares the stage."""
        if self._parents[run.stage.key] != parent:
            self._client.set_tag(run.run_id, PARENT_TAG, parent)
            self._parents[run.stage.key] = parent

    def _trial(self, trial: PlannedTrial, stage: Stage) -> TrialRun:
        """Finds or creates a trial's run, of which a stage has begun."""
        found = self._trials.get(trial.student)
        if found is not None:
            return found
        params = trial_params(trial, self._plan)
        tags = {"level": "trial", PARENT_TAG: self._parent, **UNFOLDED, **trial_tags(params)}
        identity, store = (TRIAL_TAG, trial.student), stage.store(self._plan.storage)
        run = self._find_or_create(identity, trial.trial.name, tags, store)
        run_id, status = run.info.run_id, run.info.status
        if status != FINISHED:
            log_params(self._client, run_id, run.data.params, params)
            log_dataset(self._client, run, dataset_of(trial, self._plan))
        if status in (FAILED, STOPPED):
            self._client.update_run(run_id, "RUNNING")
        ended = status if status == FINISHED else None
        self._trials[trial.student] = TrialRun(self._client, run_id, ended)
        return self._trials[trial.student]

    def _sync_trial(self, trial: PlannedTrial) -> None:
        """Sends what the journal of its distillation says, and ends it with its last stage."""
        if trial.key not in self._stages and trial.student not in self._trials:
            return
        run = self._trial(trial, self._plan.stages[trial.key])
        if run.status is not None:
            return
        found = distilled(trial, self._plan)
        trained = found and self._stages.get(found[0].key)
        if found and trained:
            newest = None if trained.status == FINISHED else trained.epoch
            run.plot(curve(trained.evaluations.values(), found[1], newest))
        stages = [self._stages.get(key) for key in trial.path]
        if all(stage is not None and stage.status == FINISHED for stage in stages):
            self._end_trial(trial, run)

    def _end_trial(self, trial: PlannedTrial, run: TrialRun) -> None:
        """Ends a trial as its stages have ended; one that has ended has its scores."""
        stages = [self._stages.get(key) for key in trial.path]
        ends = {stage.status if stage else None for stage in stages}
        status = FINISHED if ends == {FINISHED} else STOPPED if STOPPED in ends else FAILED
        notes = [f"{s.stage.kind}: {s.note}" for s in stages if s is not None and s.note]
        at_ms = self._ended_ms(trial)
        if status == FINISHED and self._scored is not None:
            run.score(self._scored(trial), at_ms)
        run.end(status, "; ".join(notes), at_ms, trial_document(trial, self._plan))

    def _ended_ms(self, trial: PlannedTrial) -> int | None:
        """Returns when the last line of a trial's outcome was written."""
        return ended_ms(self._plan.stages[trial.key].store(self._plan.storage))


def _created(run: Any) -> tuple[int, str]:
    """Returns what the oldest of runs is told by, the same for all who ask."""
    return int(run.data.tags.get(CREATED_TAG, 0)), run.info.run_id


def _whose_outcome(trials: Sequence[PlannedTrial], key: str) -> PlannedTrial | None:
    """Returns the first of a stage's trials of which it is the outcome."""
    return next((trial for trial in trials if trial.key == key), None)
