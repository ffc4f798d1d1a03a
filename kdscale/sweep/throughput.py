"""How fast a data set reaches a consumer on this machine or cluster, and how long one waits."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kdscale.core.types import DataError
from kdscale.data.shards import Manifest
from kdscale.data.stream import StreamConfig, TrainStream, train_dataset
from kdscale.models.bpe import build_bpe, openai_merges
from kdscale.sweep.schedule import start_ray

CONTEXT_LENGTH = 77
_SKIPPED = 4  # batches that were ready before the first was asked for
_MOST_PER_CORE = 10_000  # samples/s that no core reaches


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """What was measured.

    Attributes:
        samples_per_s: Rate after the first batches.
        first_batch_s: From asking to having the first batch, processes started included.
        data_wait: Share of the time that the consumer waited.
        num_samples: Samples that the rate is of.
        cores: Cores of this machine.
    """

    samples_per_s: float
    first_batch_s: float
    data_wait: float
    num_samples: int
    cores: int

    @property
    def per_core(self) -> float:
        """Samples per second and core."""
        return self.samples_per_s / self.cores


def measure(
    manifest: Manifest,
    *,
    image_px: int,
    batch_size: int,
    seconds: float,
    consumer_samples_per_s: float | None = None,
) -> Throughput:
    """Streams batches for some seconds, as one training worker would take them.

    Args:
        manifest: The data.
        image_px: Side of the crops.
        batch_size: Samples per batch.
        seconds: How long to measure after the first batches.
        consumer_samples_per_s: Speed of the step that is imitated; None takes all there is.

    Raises:
        DataError: The data hold too few samples for a batch.
    """
    config = StreamConfig(
        manifest,
        batch_size,
        (image_px,),
        total_steps=steps_within(seconds, batch_size),
        tokenizers={"clip_bpe": _tokenizer},
    )
    start_ray()
    (split,) = train_dataset(config).streaming_split(1, equal=True)
    stream = TrainStream(split, config, 0)
    asked = time.perf_counter()
    first = began = waited = 0.0
    batches = 0
    for batch in stream:
        now = time.perf_counter()
        first = first or now - asked
        batch.images[image_px].clone()  # as a copy to the device would
        if batch.step == _SKIPPED:
            began, waited = now, 0.0
            stream.take_wait_s()
        elif batch.step > _SKIPPED:
            batches += 1
            waited += stream.take_wait_s()
            if now - began > seconds:
                break
        if consumer_samples_per_s is not None:
            time.sleep(max(0.0, batch_size / consumer_samples_per_s - time.perf_counter() + now))
    elapsed = time.perf_counter() - began
    if not batches:
        raise DataError("the stream ended before anything could be measured")
    return Throughput(
        samples_per_s=batches * batch_size / elapsed,
        first_batch_s=first,
        data_wait=min(1.0, waited / elapsed),
        num_samples=batches * batch_size,
        cores=os.cpu_count() or 1,
    )


def steps_within(seconds: float, batch_size: int) -> int:
    """Returns more steps than can be taken in some seconds; planning a million takes minutes."""
    most = seconds * (os.cpu_count() or 1) * _MOST_PER_CORE
    return _SKIPPED + 2 + math.ceil(most / batch_size)


def _tokenizer() -> Callable[[list[str]], np.ndarray]:
    """Makes CLIP's tokenizer on a data task."""
    return build_bpe(openai_merges(), CONTEXT_LENGTH)
