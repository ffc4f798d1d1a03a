"""What the stages that work shard by shard share: embeddings, features, and in part answers.

A shard whose files are all there and whose end is noted is never done again, so a killed run loses
the shards in work and nothing else.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import fsspec
import numpy as np
import torch

from kdscale.core.config import Execution
from kdscale.core.journal import JournalWriter, noted
from kdscale.core.lease import check_lease
from kdscale.core.stop import stop_if_asked
from kdscale.core.types import StageStopped
from kdscale.data.raw import RawSample
from kdscale.data.shards import ShardEntry, read_good
from kdscale.data.sidecars import SUMMARY, Values
from kdscale.stages.jobs import AnswersJob, EmbedJob, ShardJob
from kdscale.stages.loop import chunks


def left_of(job: ShardJob, lacking: Sequence[int]) -> list[int]:
    """Returns the shards that are left, in order.

    Also those that have their files but whose end nobody lived to note: done again they are the
    same, and the journal has every step.

    Args:
        job: The job.
        lacking: Shards that lack a file.
    """
    known = noted(job.stage, "shard") - set(lacking)
    return [number for number in shards_of(job) if number not in known]


def run_shards(
    job: ShardJob, left: Sequence[int], make: Callable[[], Any], total: int
) -> Iterator[dict[str, Any]]:
    """Does what is left of a job, in this process or by a pool of Ray Data actors.

    Args:
        job: `run.num_workers` actors, or none where it is 0.
        left: Shards by number.
        make: Gives the function that does one, called once per process.
        total: How many there are, finished ones included.

    Yields:
        What came of each, as of `shard_row`, noted in the journal.

    Raises:
        StageFailed: If one could not be done.
        StageRefused: If another attempt could not do it either.
        StageStopped: After a shard, if it was asked to stop.
    """
    job.stage.forget_failure()
    clear_leftovers(job)
    make = partial(Logged, job, make)
    run, journal = job.recipe.run or Execution(), JournalWriter(job.stage, 1)
    try:
        rows: Iterator[dict[str, Any]] = iter(())
        if run.num_workers > 0:
            from kdscale.stages.worker import actor_map

            resources = {"CPU": run.cpus_per_worker, "GPU": run.gpus_per_worker}
            rows = actor_map(left, make, num_actors=run.num_workers, resources=resources)
        elif left:
            rows = map(make(), left)
        for done, row in enumerate(rows, total - len(left) + 1):
            speed = {"samples_per_s": row["samples"] / row["seconds"]}
            journal.append({"step": done, "shards": total, "shard": row["shard"], **speed})
            yield row
            if done < total:
                stop_if_asked(job.stage, job.lease, done)
    except StageStopped:
        raise
    except Exception as error:
        from kdscale.stages.worker import raise_failed

        raise_failed([job], error)


class Logged:
    """What does one shard of a job, with a log of its own where it does so in an actor.

    Args:
        job: The job.
        make: Gives the function that does one.
    """

    def __init__(self, job: ShardJob, make: Callable[[], Any]) -> None:
        self._log = job.log("actor", quiet=True)
        with self._log:
            self._work = make()

    def __call__(self, number: int) -> dict[str, Any]:
        """Does one shard."""
        with self._log:
            return self._work(number)


def threads_of(job: ShardJob | AnswersJob) -> int:
    """Returns how many threads one process of a job may use to decode."""
    return max(1, round((job.recipe.run or Execution()).cpus_per_worker))


def shards_of(job: ShardJob) -> list[int]:
    """Returns the shards that a job covers, each content once, in the manifest's order."""
    limit = job.recipe.max_samples if isinstance(job, EmbedJob) else None
    chosen: list[int] = []
    seen: set[str] = set()
    covered = 0
    for number, entry in enumerate(job.data.shards):
        if entry.sha256 in seen or covered >= (limit or math.inf):
            continue
        seen.add(entry.sha256)
        covered += entry.num_samples
        chosen.append(number)
    return chosen


def device_for(name: str | None) -> torch.device:
    """Returns a device by name; None takes a GPU if there is one."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def samples_of(entry: ShardEntry) -> list[RawSample]:
    """Reads the usable samples of a shard.

    Raises:
        ShardChanged: It no longer fits the manifest.
    """
    fs, path = fsspec.core.url_to_fs(entry.path)
    return list(read_good(path, fs, entry, checked=True))


def rendered_ahead(
    pool: ThreadPoolExecutor,
    render: Callable[[RawSample], Values],
    samples: Sequence[RawSample],
    size: int,
) -> Iterator[tuple[slice, Values]]:
    """Yields samples rendered and stacked, the next two batches being decoded meanwhile.

    Args:
        pool: Threads that decode.
        render: Gives one sample's array.
        samples: All samples.
        size: Samples of a batch.

    Yields:
        Which samples, and their arrays.
    """
    parts = list(chunks(len(samples), size))
    ahead = [pool.submit(_stacked, render, samples[part]) for part in parts[:2]]
    for place, part in enumerate(parts):
        if place + 2 < len(parts):
            ahead.append(pool.submit(_stacked, render, samples[parts[place + 2]]))
        yield part, ahead.pop(0).result()


def _stacked(render: Callable[[RawSample], Values], samples: Sequence[RawSample]) -> Values:
    """Renders a batch."""
    return np.stack([render(sample) for sample in samples])


def shard_row(number: int, samples: int, began: float, summary: dict[str, Any]) -> dict[str, Any]:
    """Returns what an actor tells of a finished shard.

    Args:
        number: Its place in the manifest.
        samples: What it held.
        began: `time.perf_counter()` when the work began.
        summary: What a reader of the cache must know.
    """
    return {
        "shard": number,
        "samples": samples,
        "seconds": time.perf_counter() - began,
        "summary": json.dumps(summary),
    }


def clear_leftovers(job: ShardJob | AnswersJob) -> None:
    """Removes what a killed attempt has half written."""
    parts = (*job.stage.parts, "output")
    for name in job.stage.storage.names(*parts):
        if name.startswith("."):
            job.stage.storage.remove(*parts, name)


def finish(job: ShardJob, summary: dict[str, Any], seconds: float) -> None:
    """Writes the cache's summary and marks the stage done.

    Args:
        job: The finished job.
        summary: What its actors' `summary` returned.
        seconds: Wall-clock time of this attempt.
    """
    check_lease(job.stage, job.lease)
    storage, parts = job.stage.storage, (*job.stage.parts, "output")
    storage.write_json(summary, *parts, SUMMARY)
    job.stage.finish(job.record | {"seconds": round(seconds, 1), "cache": summary})
