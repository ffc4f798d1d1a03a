"""Ray Tune runs the trials; a stage is run by the first trial that needs it.

Finished means `DONE` in storage, not anything that Tune remembers: a sweep that is run again
skips what is finished and resumes what is not.
"""

# pyright: basic
# (Ray carries too few types for strict checking)
from __future__ import annotations

import logging
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import ray
import ray.cloudpickle
import ray.tune
from ray._private import ray_constants

from kdscale.core.answers_config import Answers
from kdscale.core.causes import final_cause, named_cause
from kdscale.core.config import Embed
from kdscale.core.eval_config import Cka
from kdscale.core.lease import Lease
from kdscale.core.memory import release_memory
from kdscale.core.nodes import growth, on_gpus_for, with_growth
from kdscale.core.signals import notice_kept
from kdscale.core.stage_log import logs_command
from kdscale.core.stop import check_stop, forget_stop
from kdscale.core.storage import StageStore, Storage
from kdscale.core.types import (
    KdscaleError,
    LeaseLost,
    StageFailed,
    StageRefused,
    StageStopped,
)
from kdscale.core.vlm_config import Evaluate, Features
from kdscale.stages.jobs import AnswersJob
from kdscale.stages.shares import allowed_workers, gpus_for
from kdscale.sweep.fitting import concurrent_trials, sharing_cores, trial_resources
from kdscale.sweep.grid import Sweep
from kdscale.sweep.kept import is_finished, reopen_unless_finished
from kdscale.sweep.orders import group_job, record_of, shard_job
from kdscale.sweep.plan import Plan, PlannedTrial, Stage

WAIT_FOR_WRITER_S = 1.0
START_ATTEMPTS = 3
TRIAL_RETRIES = 1  # for a killed trial process; failed workers are Ray Train's to restart
REFUSED = "refused"
QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # it would put each line into a stage's log twice
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # signals are ours: `kdscale.sweep.interrupt`
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


# Starting a process and importing Ray Data takes seconds of CPU: do it early, and keep it.
LOCAL_SYSTEM = {
    "idle_worker_killing_time_threshold_ms": 600_000,
    "preload_python_modules": ["kdscale.data.blocks", "ray.data"],
}


@dataclass(frozen=True)
class TrialFailure:
    """A trial that ended with an error, and the error's last line."""

    trial: PlannedTrial
    message: str


def start_ray() -> None:
    """Connects to the cluster at RAY_ADDRESS, or starts Ray on this machine."""
    if ray.is_initialized():
        return
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # failures are ours to tell
    address = os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if address is None:
        _stay_on_this_machine()
        # Workers inherit the environment; a runtime environment would cost each a second start.
        options |= {"address": "local", "include_dashboard": False, "num_cpus": local_cpus()}
        options["_system_config"] = LOCAL_SYSTEM
    else:
        options["runtime_env"] = {"env_vars": QUIET}
    for attempt in range(START_ATTEMPTS):
        try:
            with notice_kept():
                ray.init(**options)
            return
        except Exception as error:  # a busy machine misses Ray's own fixed start-up limits
            ray.shutdown()
            if attempt == START_ATTEMPTS - 1:
                raise StageFailed(f"Ray did not start: {last_line(error)}") from error


def _stay_on_this_machine() -> None:
    """Lets Ray's processes, and gloo's and NCCL's in them, listen on the loopback alone.

    Ray has no option for it: it takes 127.0.0.1 for the network's address, but where it allows no
    cluster, as on a Mac. Its processes read the variable, this one has read it already.
    """
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, loopback)


def ship_own_losses(plan: Plan) -> None:
    """Sends losses that a sweep file defines with the job: no worker could import them."""
    losses = [getattr(stage.recipe, "loss", None) for stage in plan.stages.values()]
    for name in {loss.__module__ for loss in losses if callable(loss)}:
        module = sys.modules[name]
        if isinstance(getattr(module, "sweep", None), Sweep):
            ray.cloudpickle.register_pickle_by_value(module)


def local_cpus() -> int:
    """Returns Ray's CPU tokens on a machine of one's own: two more than cores.

    Ray Data's repartition takes a whole CPU however little it does; with the bare number of
    cores a small machine would reserve them all for training and never feed it.
    """
    return (os.cpu_count() or 1) + 2


def cluster_resources() -> tuple[dict[str, float], list[dict[str, float]]]:
    """Returns what the whole cluster offers, and each node, those that may still come included."""
    there = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    total, grown = with_growth(ray.cluster_resources(), growth())
    others = [node for node in there if not any(kind.items() <= node.items() for kind in grown)]
    return total, others + grown


def check_room(plan: Plan) -> None:
    """Refuses, as `run_plan` does, stages for which the cluster, grown to its limits, has no room.

    Raises:
        ImpossibleResources: Naming the stage and what it lacks.
    """
    if not waiting_trials(plan):
        return
    ship_own_losses(plan)
    start_ray()
    concurrent_trials(plan.remaining(), *cluster_resources())


def run_plan(plan: Plan, run: str = "") -> list[TrialFailure]:
    """Runs every unfinished stage of a plan under Ray Tune.

    Args:
        plan: What to run.
        run: Name under which all of it may be asked to stop.

    Returns:
        Trials that failed; the others are finished.

    Raises:
        ImpossibleResources: Before anything starts.
    """
    waiting = waiting_trials(plan)
    if not waiting:
        return []
    ship_own_losses(plan)
    start_ray()
    concurrency = concurrent_trials(plan.remaining(), *cluster_resources())
    plan = sharing_cores(plan, min(concurrency, len(waiting)), os.cpu_count() or 1)
    trainable = ray.tune.with_resources(
        ray.tune.with_parameters(_run_trial, plan=plan, run=run), trial_resources(plan.remaining())
    )
    with tempfile.TemporaryDirectory() as scratch:
        tuner = ray.tune.Tuner(
            trainable,
            param_space={"trial": numbered(trial.key for trial in waiting)},
            tune_config=ray.tune.TuneConfig(
                max_concurrent_trials=concurrency,
                reuse_actors=True,
                trial_name_creator=_name,
                trial_dirname_creator=_name,
            ),
            run_config=run_config(scratch),
        )
        results = tuner.fit()
    return failures_in(results, lambda config: waiting[number_in(config)])


def numbered(keys: Iterable[str]) -> dict[str, Any]:
    """Returns a space of trials by number, each with its key.

    Tune keeps with each trial what names it: a function that held all the others would cost the
    driver memory by the square of their number.
    """
    trials = [{"number": number, "key": key} for number, key in enumerate(keys)]
    return ray.tune.grid_search(trials)


def number_in(config: Mapping[str, Any]) -> int:
    """Returns a trial's number in `numbered`."""
    return config["trial"]["number"]


def _name(trial: Any) -> str:
    """Names a trial for Tune: by its key."""
    return trial.config["trial"]["key"]


def run_config(scratch: str) -> ray.tune.RunConfig:
    """Returns how Tune keeps its own books; nothing reads them."""
    return ray.tune.RunConfig(
        name="trials",
        storage_path=scratch,
        verbose=0,
        failure_config=ray.tune.FailureConfig(max_failures=TRIAL_RETRIES),
    )


def waiting_trials(plan: Plan) -> list[PlannedTrial]:
    """Returns the unfinished trials, those first whose stages no earlier one needs.

    Two trials with one unfinished teacher would otherwise run side by side, the second waiting.
    """
    waiting = [trial for trial in plan.trials if not _is_finished(trial, plan)]
    seen: dict[str, int] = {}

    def rank(trial: PlannedTrial) -> int:
        first = next(key for key in trial.path if not plan.stages[key].reused)
        seen[first] = seen.get(first, 0) + 1
        return seen[first]

    return sorted(waiting, key=rank)


def _is_finished(trial: PlannedTrial, plan: Plan) -> bool:
    """Tells whether a trial has its outcomes: its own stage, and all that was measured of it.

    The stages that those came from may have been removed since, unless they are to be done again.
    """
    path = [plan.stages[key] for key in trial.path]
    wanted, measured = plan.redo | {trial.key}, Answers | Evaluate | Cka
    return all(s.reused for s in path if s.key in wanted or isinstance(s.recipe, measured))


def failures_in(
    results: Any, trial_of: Callable[[dict[str, Any]], PlannedTrial]
) -> list[TrialFailure]:
    """Collects the errors of trials, those that Tune has seen and those kept from it."""
    found: list[TrialFailure] = []
    for result in results:
        message: str | None = (result.metrics or {}).get(REFUSED)
        if result.error is not None:
            own = named_cause(result.error)
            message = str(own) if own is not None else last_line(result.error)
        if message is not None:
            found.append(TrialFailure(trial_of(result.config), message))
    return found


def last_line(error: BaseException) -> str:
    """Returns the last line of an error's text, where Ray puts the cause."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _run_trial(config: dict[str, Any], plan: Plan, run: str = "") -> dict[str, Any]:
    """Walks a trial's path; runs on a Tune actor that takes no resources itself."""
    trial = waiting_trials(plan)[number_in(config)]
    try:
        run_stages([plan.stages[key] for key in trial.path], plan.storage, run)
    except StageStopped:
        pass  # whoever asked for it tells of it
    except KdscaleError as error:
        return {"key": trial.key, REFUSED: refusal(error)}
    return {"key": trial.key}


def refusal(error: KdscaleError) -> str:
    """Returns the words of an error that another attempt would meet again; raises any other.

    Tune would try again what is raised.
    """
    if not isinstance(error, StageRefused) and final_cause(error) is None:
        raise error
    return str(error)


def run_stages(path: Sequence[Stage], storage: Storage, run: str = "") -> None:
    """Runs what is unfinished of a path, in one group of workers; waits for other writers.

    Workers that must go away soon end early, and the path is taken up again at once.

    Args:
        path: Stages, in order.
        storage: Where they are.
        run: Name under which the driver's run may be asked to stop.

    Raises:
        StageFailed: If the workers failed; StageRefused where they would fail again.
        StageStopped: If a stage was asked to stop.
    """
    while pending := _unfinished(path, storage):
        with ExitStack() as leases, suppress(LeaseLost):  # then another writer is waited for
            tokens: list[str] = []
            before: StageStore | None = None
            for store in (stage.store(storage) for stage in pending):
                check_stop(store, run)
                lease = Lease.acquire(store, run, before)
                if lease is None:
                    break
                tokens.append(leases.enter_context(lease).token)  # it beats from here on
                before = store
            else:
                # Whoever held a lease before may have finished: only now nobody else can.
                if _unfinished(path, storage) == pending:
                    for stage in pending:
                        reopen_unless_finished(stage, storage)
                        forget_stop(stage.store(storage))
                    _run_in_turn(pending, tokens, storage)
                    release_memory()
                continue
        time.sleep(WAIT_FOR_WRITER_S * random.uniform(0.5, 1.5))  # two must not stay in step


def _unfinished(path: Sequence[Stage], storage: Storage) -> list[Stage]:
    """Returns the stages of a path that are not finished."""
    return [stage for stage in path if not is_finished(stage, storage)]


def _run_in_turn(stages: Sequence[Stage], tokens: Sequence[str], storage: Storage) -> None:
    """Runs stages one after the other; neighbours that train share a group of workers."""
    from kdscale.stages.worker import embed, fit

    pairs = list(zip(stages, tokens, strict=True))
    for (by_shard, *_), group in groupby(pairs, lambda pair: _team(pair[0])):
        if by_shard:
            answers: list[tuple[AnswersJob, Answers]] = []
            for stage, token in group:
                if isinstance(stage.recipe, Answers):
                    job = AnswersJob(stage.key, storage.root, stage.recipe, record_of(stage), token)
                    answers.append((job, stage.recipe))
                else:
                    embed(shard_job(stage, token, storage))
            if answers:
                from kdscale.stages.ask import ask_all, read_questions  # with transformers

                ask_all((job, read_questions(recipe)) for job, recipe in answers)
        else:
            fit([group_job(stage, token, storage) for stage, token in group])


def _team(stage: Stage) -> tuple[bool, str, str]:
    """Names the group of processes that a stage wants."""
    run = stage.recipe.run
    by_shard = isinstance(stage.recipe, Embed | Features | Answers)
    if run is None:
        return by_shard, "", ""
    gpus = on_gpus_for(gpus_for(stage.recipe), run.gpus_per_worker)
    counts = allowed_workers(stage.recipe) if run.min_workers is not None else ()
    return by_shard, run.model_dump_json(), f"{counts} {gpus}"


def raise_failures(failures: Sequence[TrialFailure], storage: Storage) -> None:
    """Raises one error for all failed trials.

    Raises:
        StageFailed: Naming each trial and why, and how to read more.
    """
    if failures:
        lines = [f"  {f.trial.trial.name}: {f.message}" for f in failures]
        lines += [f"a stage's log: {logs_command('KEY', storage)}"]
        raise StageFailed(f"{len(failures)} trial(s) failed:\n" + "\n".join(lines))
