"""What the stages that work shard by shard share: embedding a teacher, a frozen tower's features.

A shard whose files are all there is never done again, so a killed run loses the shards in work
and nothing else.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import fsspec
import numpy as np
import torch

from kdscale.core.storage import check_lease
from kdscale.data.raw import RawSample
from kdscale.data.shards import ShardEntry, read_good
from kdscale.data.sidecars import SUMMARY, Values
from kdscale.stages.jobs import EmbedJob, ShardJob
from kdscale.stages.loop import chunks


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


def clear_leftovers(job: ShardJob) -> None:
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
