"""Ray Train glue: run a stage's worker function on a group of workers fed by a stream."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import ray.train
import ray.train.torch
import torch

from kdscale.core.checkpoints import Checkpoints
from kdscale.core.config import Execution, TowerSpec
from kdscale.core.types import StageFailed
from kdscale.data.samples import Batch, Crop
from kdscale.data.stream import StreamConfig, TrainStream, data_config, train_dataset
from kdscale.models.preprocess import tokenizer
from kdscale.stages.jobs import DistillJob

DATASET = "train"
HEALTH_CHECK_INTERVAL_S = "0.2"


def fit(job: DistillJob, stream: StreamConfig, scratch: str | None = None) -> None:
    """Runs a stage on Ray Train until its output is written.

    The stream is made anew whenever a worker group starts, from the newest checkpoint's step;
    a killed worker therefore costs at most `checkpoint_every` steps.

    Args:
        job: What the workers do.
        stream: The stream from step 0.
        scratch: Directory for Ray Train's own bookkeeping, which nothing depends on.

    Raises:
        StageFailed: If the workers failed more often than `Execution.max_failures` allows.
    """
    run = job.recipe.run
    assert run is not None
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", HEALTH_CHECK_INTERVAL_S)
    with tempfile.TemporaryDirectory() as temporary:
        trainer = ray.train.torch.TorchTrainer(
            _work,
            train_loop_config={"job": job, "stream": stream},
            scaling_config=_scaling(run),
            datasets={DATASET: _dataset_from_cursor(job, stream)},
            dataset_config=data_config(run.data_cpus),
            run_config=ray.train.RunConfig(
                name=job.key,
                storage_path=scratch or temporary,
                failure_config=ray.train.FailureConfig(max_failures=run.max_failures),
            ),
        )
        try:
            trainer.fit()
        except Exception as error:
            raise StageFailed(f"{job.kind} {job.key} failed: {_root_cause(error)}") from error


def stream_config(job: DistillJob) -> StreamConfig:
    """Returns the stream of a job from its first step: pixels and tokens for each tower."""
    recipe = job.recipe
    assert recipe.run is not None
    towers = [tower for tower in (recipe.student, recipe.teacher) if isinstance(tower, TowerSpec)]
    return StreamConfig(
        manifest=job.data,
        global_batch_size=recipe.global_batch_size,
        sizes=tuple(sorted({tower.image_px for tower in towers})),
        epochs=recipe.epochs,
        total_steps=job.total_steps,
        seed=recipe.seed,
        num_workers=recipe.run.num_workers,
        crop=Crop(seed=recipe.crop_seed, scale=recipe.crop_scale),
        views=recipe.views,
        tokenizers={tower.tokens_name: partial(tokenizer, tower) for tower in towers},
        cpus_per_task=recipe.run.cpus_per_data_task,
    )


def _scaling(run: Execution) -> ray.train.ScalingConfig:
    """Translates an execution into Ray Train's terms."""
    resources = {"CPU": run.cpus_per_worker}
    if run.gpus_per_worker:
        resources["GPU"] = run.gpus_per_worker
    return ray.train.ScalingConfig(
        num_workers=run.num_workers,
        use_gpu=run.gpus_per_worker > 0,
        resources_per_worker=resources,
    )


def _dataset_from_cursor(job: DistillJob, stream: StreamConfig) -> Callable[[], Any]:
    """Returns a function that makes the stream from the newest checkpoint on."""

    def make() -> Any:
        start = Checkpoints(job.stage, keep=1).latest_step()
        return train_dataset(replace(stream, start_step=start))

    return make


def _work(config: dict[str, Any]) -> None:
    """Runs on every worker, the only process that needs the model libraries."""
    from kdscale.stages.distill import Run
    from kdscale.stages.loop import World

    job: DistillJob = config["job"]
    stream: StreamConfig = config["stream"]
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    world = World(
        rank=context.get_world_rank(), size=context.get_world_size(), device=_single(device)
    )
    if job.recipe.run is not None and job.recipe.run.threads_per_worker is not None:
        torch.set_num_threads(job.recipe.run.threads_per_worker)

    def batches(start: int) -> Iterator[Batch]:
        shard = ray.train.get_dataset_shard(DATASET)
        return iter(TrainStream(shard, replace(stream, start_step=start), world.rank))

    Run(job, world, lambda metrics: ray.train.report(metrics)).train(batches)


def _single(device: Any) -> torch.device:
    """Returns the first of the devices that Ray gives a worker."""
    return device[0] if isinstance(device, list) else device


def _root_cause(error: BaseException) -> str:
    """Returns the innermost message, which is the one a person can act on."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[-1] if text else ''}"
