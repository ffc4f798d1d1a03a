"""The group of workers that Ray Train makes for a stage, and the notices that its processes get.

Ray Train offers its developers what is needed here, but no public place to import it from.
"""

# pyright: basic
# (Ray carries too few types for strict checking)
from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import ray.train
import ray.train.torch
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.context import get_train_context

from kdscale.core.checkpoints import Checkpoints
from kdscale.core.config import Execution
from kdscale.core.nodes import on_gpus_for
from kdscale.core.signals import take_notice, was_noticed
from kdscale.data.instruct_stream import instruct_dataset
from kdscale.data.stream import data_config, execution_options, train_dataset
from kdscale.stages.jobs import (
    CkaJob,
    DistillJob,
    EvaluateJob,
    GateJob,
    LanguageJob,
    VlmJob,
)
from kdscale.stages.streams import instruct_config, stream_config

StreamJob = DistillJob | VlmJob
TrainJob = StreamJob | EvaluateJob | CkaJob | GateJob | LanguageJob

HEALTH_CHECK_INTERVAL_S = "0.2"
PREEMPTION_POLL_INTERVAL_S = "2"


def make_trainer(
    work: Callable[[dict[str, Any]], None], jobs: Sequence[TrainJob], bookkeeping: str
) -> ray.train.torch.TorchTrainer:
    """Makes the group of workers that runs jobs.

    Args:
        work: Runs on every worker.
        jobs: What is to be done, in order; all with the first one's execution.
        bookkeeping: A directory for Ray Train itself.
    """
    run = jobs[0].recipe.run
    assert run is not None
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", HEALTH_CHECK_INTERVAL_S)
    os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", PREEMPTION_POLL_INTERVAL_S)
    return ray.train.torch.TorchTrainer(
        work,
        train_loop_config={"jobs": list(jobs), "in_group": run.num_workers > 0},
        scaling_config=_scaling(run),
        datasets={job.key: _dataset_from_cursor(job) for job in jobs if isinstance(job, StreamJob)},
        dataset_config=data_config(run.data_cpus),
        run_config=ray.train.RunConfig(
            name=jobs[-1].key,
            storage_path=bookkeeping,
            failure_config=ray.train.FailureConfig(max_failures=run.max_failures),
            callbacks=[TakingNotice()],  # pyright: ignore[reportArgumentType]
        ),
    )


class TakingNotice(WorkerGroupCallback):
    """Lets every worker note SIGTERM, which Ray lets end the process.

    It is the process's main thread that must ask for signals; training runs in another.
    """

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Is called in Ray Train's controller, before training starts."""
        worker_group.execute(_take_sigterm)


def _take_sigterm() -> None:
    """Runs in a worker's main thread."""
    take_notice(signal.SIGTERM)


def is_leaving() -> bool:
    """Tells whether this worker got SIGTERM, or Ray drains a node of its group.

    `ray.train.get_preemption_info` says the same, but is a barrier of all workers: too slow to be
    asked at every step.
    """
    return was_noticed() or get_train_context().preemption_context.preemption_info is not None


def _scaling(run: Execution) -> ray.train.ScalingConfig:
    """Translates an execution into Ray Train's terms."""
    resources = {"CPU": run.cpus_per_worker}
    if run.gpus_per_worker:
        resources["GPU"] = run.gpus_per_worker
        resources |= on_gpus_for("training", run.gpus_per_worker)
    return ray.train.ScalingConfig(
        num_workers=run.num_workers,
        use_gpu=run.gpus_per_worker > 0,
        resources_per_worker=resources,
    )


def _dataset_from_cursor(job: StreamJob) -> Callable[[], Any]:
    """Returns a function that makes the stream from the newest checkpoint on."""

    def make() -> Any:
        """Makes it, when a group of workers starts."""
        # A stage that has all its steps reads no stream, but Ray wants one to exist.
        start = min(Checkpoints(job.stage, keep=1).latest_step(), job.total_steps - 1)
        if isinstance(job, VlmJob):
            dataset = instruct_dataset(replace(instruct_config(job), start_step=start))
        else:
            dataset = train_dataset(replace(stream_config(job), start_step=start))
        # Local mode has no DataConfig, so the dataset carries its own budget.
        assert job.recipe.run is not None
        dataset.context.execution_options = execution_options(job.recipe.run.data_cpus)
        return dataset

    return make
