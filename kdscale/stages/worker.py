"""Ray Train glue: run a stage's worker function on a group of workers fed by a stream."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import ray.data
import ray.train
import ray.train.torch
import torch

from kdscale.core.causes import final_cause, in_words, note_place
from kdscale.core.checkpoints import Checkpoints
from kdscale.core.lease import check_lease
from kdscale.core.nodes import on_gpus_for
from kdscale.core.signals import was_noticed
from kdscale.core.stage_log import StageLog
from kdscale.core.stop import check_stop
from kdscale.core.storage import StageStore
from kdscale.core.types import OrderBroken, StageFailed, StageRefused, StageStopped
from kdscale.data.instruct_stream import InstructStream
from kdscale.data.stream import TrainStream, quiet
from kdscale.stages.group import StreamJob, TrainJob, is_leaving, make_trainer
from kdscale.stages.jobs import (
    AnswersJob,
    CkaJob,
    DistillJob,
    FeaturesJob,
    GateJob,
    LanguageJob,
    ShardJob,
    VlmJob,
)
from kdscale.stages.streams import instruct_config, stream_config


def fit(jobs: Sequence[TrainJob]) -> None:
    """Runs stages one after the other in one group of workers, each until it is finished.

    Where a worker or its node is to go away soon, all write a checkpoint and end before the stages
    are finished: another call goes on from there.

    Starting processes costs more than a short stage, so a trial's stages share them. A stream is
    made anew whenever a worker group starts, from the newest checkpoint's step; a killed worker
    therefore costs at most `checkpoint_every` steps.

    Args:
        jobs: What the workers do, in order; all with the first one's execution.

    Raises:
        StageFailed: If the workers failed more often than `Execution.max_failures` allows.
        StageRefused: At the first failure that another attempt would meet again.
        StageStopped: If a stage was asked to; the jobs after it have not been begun.
    """
    for job in jobs:
        job.stage.forget_failure()
        if isinstance(job, DistillJob):
            job.rewind()
    failure: Exception | None = None
    with tempfile.TemporaryDirectory() as bookkeeping:  # Ray Train's own; nothing reads it
        trainer = make_trainer(_work, jobs, bookkeeping)
        try:
            trainer.fit()
        except Exception as error:
            failure = error
    raise_failed(jobs, failure)
    for job in jobs:
        if not job.stage.is_done():
            check_stop(job.stage, job.lease)


def raise_failed(jobs: Sequence[TrainJob | ShardJob | AnswersJob], error: Exception | None) -> None:
    """Raises what has ended an attempt, and notes it in the stage unless a worker has.

    Args:
        jobs: What was to be done, in order.
        error: What reached the driver; None where the workers came to an end.

    Raises:
        LeaseLost: If another writer has taken a stage over: how it ends there is not for us to say.
        StageRefused: If another attempt would end in the same way.
        StageFailed: If it might not.
    """
    for job in jobs:
        if not job.stage.is_done():
            check_lease(job.stage, job.lease)
    noted = [job for job in jobs if job.stage.failure() is not None]
    if error is None and not noted:
        return
    job = next(iter(noted or [job for job in jobs if not job.stage.is_done()] or jobs))
    if not noted and error is not None:
        note_failure(job.stage, error)
    known = in_words(error) if error is not None else "the reason is no longer on storage"
    found = job.stage.failure() or {"message": known, "final": False}
    kind = StageRefused if found["final"] else StageFailed
    raise kind(f"{job.kind} {job.key} failed: {found['message']}") from error


def note_failure(stage: StageStore, error: Exception) -> None:
    """Notes in a stage why an attempt has ended, and whether another would end likewise."""
    with StageLog(stage, "trial", quiet=True) as log:
        log.tell(error)
    cause = final_cause(error)
    stage.fail(in_words(cause or error), final=cause is not None)


def embed(job: ShardJob) -> None:
    """Embeds what is left of a data set: in this process, or by a pool of actors.

    Args:
        job: What to embed; `run.num_workers` actors, or none where it is 0.

    Raises:
        StageFailed: If a shard could not be embedded.
        StageRefused: If another attempt could not embed it either.
    """
    from kdscale.stages.by_shard import finish, left_of, run_shards, shards_of, threads_of

    started, summary = time.time(), "{}"
    with job.log("trial") as log:
        lacking, make = _lacking(job, threads_of(job))
        left = left_of(job, lacking)
        for row in run_shards(job, left, make, len(shards_of(job))):
            summary = row["summary"]
        finish(job, json.loads(summary) if left else make().summary(), time.time() - started)
        log.say("finished")


def _lacking(job: ShardJob, threads: int) -> tuple[list[int], Callable[[], Any]]:
    """Returns the shards that lack a file, and what makes the function that does one."""
    if isinstance(job, FeaturesJob):
        from kdscale.stages import features

        return features.pending(job), partial(features.FeatureWriter, job, None, threads)
    from kdscale.stages import embed

    return embed.pending(job), partial(embed.Embedder, job, None, threads)


def actor_map(
    items: Sequence[int] | Sequence[bytes],
    make: Callable[[], Callable[[Any], dict[str, Any]]],
    *,
    num_actors: int,
    resources: Mapping[str, float],
) -> Iterator[dict[str, Any]]:
    """Maps numbers or bytes through a pool of Ray Data actors; yields results as they come.

    Args:
        items: What to map; each is a task of its own, done again elsewhere if its actor dies.
            Without any, no actor is started.
        make: Called once per actor; gives the function that maps one item to a flat row.
        num_actors: Actors at most.
        resources: CPU and GPU of one actor.
    """

    class Actor:
        """Holds what is expensive to make."""

        def __init__(self) -> None:
            self._work = make()

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            (item,) = batch["item"]
            item = item if isinstance(item, bytes) else int(item)
            return {name: [value] for name, value in self._work(item).items()}

    if not items:
        return

    dataset = ray.data.from_items(
        [{"item": item} for item in items], override_num_blocks=len(items)
    )
    dataset = dataset.map_batches(
        Actor,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(num_actors, len(items))),
        num_cpus=resources.get("CPU", 1.0),
        num_gpus=resources.get("GPU", 0.0) or None,
        resources=on_gpus_for("inference", resources.get("GPU", 0.0)) or None,
    )
    quiet(dataset)
    yield from dataset.iter_rows()


def _work(config: dict[str, Any]) -> None:
    """Runs on every worker, the only process that needs the model libraries."""
    jobs = [job for job in config["jobs"] if not job.stage.is_done()]
    # Ray starts a failed group again whatever the error was; `fit` tells of a final one.
    if not jobs or any(job.stage.failure() for job in jobs):
        return
    for job in jobs:
        check_lease(job.stage, job.lease)
    rank, size, device, report = _place(config["in_group"])
    first: _Started | None = None
    log = jobs[0].log(f"worker{rank}", quiet=rank > 0)
    with log, noting(jobs[0].stage):
        if isinstance(jobs[0], DistillJob):
            # Its stream starts its processes while this one imports the model libraries.
            first = _Started(jobs[0], rank, size)
        from kdscale.stages.loop import World
        from kdscale.stages.stop import Requests, stop_at_checkpoint

    noticed = is_leaving if config["in_group"] else was_noticed
    world = World(rank=rank, size=size, device=device, noticed=noticed)
    with suppress(StageStopped):  # `fit` tells of it
        for job in jobs:
            if job.recipe.run is not None and job.recipe.run.threads_per_worker is not None:
                torch.set_num_threads(job.recipe.run.threads_per_worker)
            if job is not jobs[0]:
                log = job.log(f"worker{rank}", quiet=rank > 0)
            with log, noting(job.stage):
                if Requests(job, world).have_come(look=True):
                    stop_at_checkpoint(job, world, Checkpoints(job.stage, keep=1))
                attempt = _attempt_of(job)
                stream, first = first or _Started(job, rank, size), None
                attempt(job, world, report).train(stream.batches)
                log.say("finished")


def _attempt_of(job: TrainJob) -> Any:
    """Returns the class that attempts a kind of stage, importing what it needs.

    A VLM's stream unpickles a tokenizer in a thread of its own, and two threads must not import
    transformers at once: its classes are found while they are being defined, and then are not.
    """
    if isinstance(job, DistillJob):
        from kdscale.stages.run import Run

        return Run
    if isinstance(job, VlmJob):
        from kdscale.stages.vlm_run import VlmRun

        return VlmRun
    if isinstance(job, LanguageJob):
        from kdscale.stages.language import LanguageRun

        return LanguageRun
    if isinstance(job, CkaJob):
        from kdscale.stages.cka import CkaRun

        return CkaRun
    if isinstance(job, GateJob):
        from kdscale.stages.gate_run import GateRun

        return GateRun
    from kdscale.stages.answer import EvaluateRun

    return EvaluateRun


@contextmanager
def noting(stage: StageStore) -> Generator[None]:
    """Notes an error that another attempt would meet again; of any other, where it arose.

    It is raised all the same: other workers may wait for this one, and only Ray can end them.
    """
    try:
        yield
    except Exception as error:
        cause = final_cause(error)
        if cause is None:
            note_place(error)
        else:
            stage.fail(in_words(cause), final=True)
        raise


def _place(in_group: bool) -> tuple[int, int, torch.device, Callable[[dict[str, float]], None]]:
    """Returns rank, world size, device and where to report.

    In local mode, inside a Tune trial, Ray refuses its context functions; nothing is lost, since
    there is one process and progress goes through the journal.
    """
    if not in_group:
        return 0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"), lambda _: None
    context = ray.train.get_context()
    device = _single(ray.train.torch.get_device())
    return context.get_world_rank(), context.get_world_size(), device, ray.train.report


class _Started:
    """A worker's stream of one stage, already on its way to the first batch."""

    def __init__(self, job: TrainJob, rank: int, size: int) -> None:
        self.job = job
        self._batches: Iterator[Any] = iter(())
        self._first: Future[Any] | None = None
        if not isinstance(job, StreamJob):
            return
        self._start = Checkpoints(job.stage, keep=1).latest_step()
        if self._start < job.total_steps:
            shard = ray.train.get_dataset_shard(job.key)
            if isinstance(job, VlmJob):
                told = replace(instruct_config(job, size), start_step=self._start)
                self._batches = iter(InstructStream(shard, told, rank))
            else:
                config = replace(stream_config(job, size), start_step=self._start)
                self._batches = iter(TrainStream(shard, config, rank))
            self._first = ThreadPoolExecutor(1).submit(next, self._batches, None)

    def batches(self, start: int) -> Iterator[Any]:
        """Yields the batches, which begin where the newest checkpoint ends.

        Raises:
            OrderBroken: If the run resumes from another step.
        """
        if start != self._start or self._first is None:
            raise OrderBroken(
                f"the stream of {self.job.key} begins at step {self._start}, the run at {start}: "
                "another process has written a checkpoint meanwhile"
            )
        batch = self._first.result()
        if batch is not None:
            yield batch
            yield from self._batches


def _single(device: Any) -> torch.device:
    """Returns the first of the devices that Ray gives a worker."""
    return device[0] if isinstance(device, list) else device
