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
from functools import partial
from typing import Any

import ray.train
import ray.train.torch
import ray.util
from ray.train.torch.config import (
    TorchConfig,
    _set_torch_distributed_env_vars,
    _TorchBackend,
)
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2._internal.execution.preemption import _get_draining_nodes
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision

from kdscale.core.checkpoints import Checkpoints
from kdscale.core.nodes import on_gpus_for
from kdscale.core.signals import note, take_notice, was_noticed
from kdscale.data.instruct_stream import instruct_dataset
from kdscale.data.stream import execution_options, train_dataset
from kdscale.stages.jobs import (
    CkaJob,
    DistillJob,
    EvaluateJob,
    GateJob,
    LanguageJob,
    VlmJob,
)
from kdscale.stages.rendezvous import join, listen
from kdscale.stages.shares import allowed_workers, gpus_for
from kdscale.stages.streams import instruct_config, stream_config

StreamJob = DistillJob | VlmJob
TrainJob = StreamJob | EvaluateJob | CkaJob | GateJob | LanguageJob

HEALTH_CHECK_INTERVAL_S = "0.2"
PREEMPTION_POLL_INTERVAL_S = "2"
GROW_EVERY_S = 60.0


def make_trainer(
    work: Callable[[dict[str, Any]], None], jobs: Sequence[TrainJob], bookkeeping: str
) -> ray.train.torch.TorchTrainer:
    """Makes the group of workers that runs jobs.

    Args:
        work: Runs on every worker.
        jobs: What is to be done, in order; all with the first one's execution, on GPUs for the
            same, and by as many workers.
        bookkeeping: A directory for Ray Train itself.
    """
    run = jobs[0].recipe.run
    assert run is not None
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", HEALTH_CHECK_INTERVAL_S)
    os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", PREEMPTION_POLL_INTERVAL_S)
    in_group = run.num_workers > 0
    allowed = sorted(set.intersection(*(set(allowed_workers(job.recipe)) for job in jobs)))
    streams = [job for job in jobs if isinstance(job, StreamJob)]
    return Trainer(
        work,
        allowed=allowed,
        train_loop_config={"jobs": list(jobs), "in_group": in_group},
        scaling_config=_scaling(jobs, allowed),
        torch_config=AtOneAddress(),
        datasets={job.key: job if in_group else partial(stream_of, job, 1) for job in streams},
        dataset_config=SharedStreams(run.data_cpus),
        run_config=ray.train.RunConfig(
            name=jobs[-1].key,
            storage_path=bookkeeping,
            failure_config=ray.train.FailureConfig(max_failures=run.max_failures),
            callbacks=[TakingNotice()],  # pyright: ignore[reportArgumentType]
        ),
    )


class Trainer(ray.train.torch.TorchTrainer):
    """Ray Train's trainer, for numbers of workers that can share a batch equally.

    Args:
        work: Runs on every worker.
        allowed: These numbers.
        options: As of `TorchTrainer`.
    """

    def __init__(self, work: Any, *, allowed: Sequence[int], **options: Any) -> None:
        super().__init__(work, **options)
        self._allowed = allowed

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        """Puts the policy in, where the number may change."""
        if self.scaling_config.elasticity_enabled:
            options["scaling_policy"] = SomeWorkers(self.scaling_config, self._allowed)
        return super()._initialize_and_run_controller(**options)


class SomeWorkers(ElasticScalingPolicy):
    """Starts as many workers as find room and can share a batch, and more when there is more room.

    Ray would kill a group in the midst of a step to replace it by a larger one. Here its workers
    are told to leave: they end with a checkpoint, and `fit` is called again.
    """

    def __init__(self, scaling_config: ray.train.ScalingConfig, allowed: Sequence[int]) -> None:
        super().__init__(scaling_config)
        self._allowed = allowed
        self._leaving: set[str] = set()
        self._told = False

    def make_decision_for_non_running_worker_group(self) -> Any:
        """Counts on no node that is being drained: Ray starts nothing there."""
        self._leaving, self._told = set(_get_draining_nodes() or {}), False
        return super().make_decision_for_non_running_worker_group()

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> Any:
        """Tells the workers to leave where there is room for more of them."""
        if self._told:
            return NoopDecision()
        found = super().make_decision_for_running_worker_group(
            worker_group_state, worker_group_status
        )
        if getattr(found, "num_workers", 0) > worker_group_state.num_workers:
            self._told = True
            for worker in worker_group_state.workers:
                worker.execute_async(note, "there is room for more workers")
        return NoopDecision()  # fewer there are only after a failure, which Ray sees by itself

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        """Returns the largest allowed number for which there is room, 0 if there is none."""
        staying = {n: r for n, r in reserved_resources.items() if n not in self._leaving}
        possible = super()._count_possible_workers(staying)
        return max((count for count in self._allowed if count <= possible), default=0)


class AtOneAddress(TorchConfig):
    """Lets the workers' process group listen at the address alone by which Ray knows their node.

    That is the loopback on one machine, and in the private network on a cluster.
    """

    @property
    def backend_cls(self) -> Any:
        """Returns what makes the group."""
        return OneAddressBackend


class OneAddressBackend(_TorchBackend):
    """Makes the workers' process group."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Is called in Ray Train's controller, once all workers have started."""
        address = worker_group.execute_single(0, ray.util.get_node_ip_address)
        port = worker_group.execute_single(0, listen, address)
        worker_group.execute(_set_torch_distributed_env_vars)
        on_gpus = worker_group.get_resources_per_worker().get("GPU", 0) > 0
        backend = "nccl" if on_gpus else "gloo"
        group = (len(worker_group), address, port, backend, backend_config.timeout_s)
        joined = [
            worker_group.execute_single_async(rank, join, rank, *group)
            for rank in range(len(worker_group))
        ]
        ray.get(joined)


class SharedStreams(ray.train.DataConfig):
    """Makes the stream of each stage once it is known how many workers share it.

    Args:
        num_cpus: What all read and decode tasks of a trainer may use together; the workers' own
            share is reserved by Ray Train already.
    """

    def __init__(self, num_cpus: float) -> None:
        options = execution_options(num_cpus)
        super().__init__(execution_options=options, enable_shard_locality=False)

    def configure(self, datasets: Any, world_size: int, *places: Any, **more: Any) -> Any:
        """Takes jobs in place of datasets."""
        made = {key: stream_of(job, world_size) for key, job in datasets.items()}
        return super().configure(made, world_size, *places, **more)


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


def _scaling(jobs: Sequence[TrainJob], allowed: Sequence[int]) -> ray.train.ScalingConfig:
    """Translates an execution into Ray Train's terms."""
    run = jobs[0].recipe.run
    assert run is not None
    resources = {"CPU": run.cpus_per_worker}
    if run.gpus_per_worker:
        resources["GPU"] = run.gpus_per_worker
        resources |= on_gpus_for(gpus_for(jobs[0].recipe), run.gpus_per_worker)
    return ray.train.ScalingConfig(
        num_workers=allowed[0] if len(allowed) == 1 else (allowed[0], allowed[-1]),
        elastic_resize_monitor_interval_s=GROW_EVERY_S,
        use_gpu=run.gpus_per_worker > 0,
        resources_per_worker=resources,
    )


def stream_of(job: StreamJob, num_workers: int) -> Any:
    """Makes a job's stream for so many workers, from its newest checkpoint on."""
    # A stage that has all its steps reads no stream, but Ray wants one to exist.
    start = min(Checkpoints(job.stage, keep=1).latest_step(), job.total_steps - 1)
    if isinstance(job, VlmJob):
        dataset = instruct_dataset(replace(instruct_config(job, num_workers), start_step=start))
    else:
        dataset = train_dataset(replace(stream_config(job, num_workers), start_step=start))
    # Local mode has no DataConfig, so the dataset carries its own budget.
    assert job.recipe.run is not None
    dataset.context.execution_options = execution_options(job.recipe.run.data_cpus)
    return dataset
