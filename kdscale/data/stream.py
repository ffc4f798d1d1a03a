"""The training stream: Ray Data reads and decodes ahead, every worker gets exactly its rows.

Pipeline: one read task per window of shards (compressed bytes, in the order of
`kdscale.data.order`) -> blocks of equal row count -> decode, crop and tokenise -> split. With
`preserve_order` and equal blocks Ray deals blocks to the workers in turn, so that the place of
every row is known beforehand; `TrainStream` checks it at each step.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from kdscale.core.types import ConfigError, DataError, KdscaleError, OrderBroken
from kdscale.data.blocks import EMBEDDINGS, Plan, Reading, Tokenizer, deal, finish, read_segment
from kdscale.data.order import WINDOW_SAMPLES, Order, Segment
from kdscale.data.samples import Batch, Crop
from kdscale.data.shards import Manifest
from kdscale.data.sidecars import CacheRef

if TYPE_CHECKING:
    import ray.data

    from kdscale.data.instruct_stream import InstructConfig

BLOCK_BYTES = 64 << 20
_MIN_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class StreamConfig:
    """What to stream, to how many workers, from which step on.

    Attributes:
        epochs: Passes over the data; `total_steps` may end the run earlier, or stand alone.
        num_workers: Must divide `global_batch_size`; changes no row's place.
        start_step: First step, that of the checkpoint which training resumes from.
        views: Distinct crops per sample, None for a new one each epoch.
        captions: Captions per sample that the epochs take in turn.
        cache: Teacher embeddings to read beside the shards, of the same crops and views.
        sizes: Image sides in pixels; all are rendered from the same crop.
        tokenizers: Picklable functions without arguments, each making a tokenizer that turns
            a list of captions into (B, T) integers; called once per process.
        cpus_per_task: What a read or decode task asks of the scheduler. Every task that runs at
            the same time is a process that takes some seconds of CPU to start.
        readers: Windows read at the same time, each in memory.
        own_steps: First steps whose rows each worker reads and decodes itself while the data
            tasks start, which takes them some seconds.
    """

    manifest: Manifest
    global_batch_size: int
    sizes: tuple[int, ...]
    epochs: int | None = None
    total_steps: int | None = None
    seed: int = 0
    window_samples: int = WINDOW_SAMPLES
    num_workers: int = 1
    start_step: int = 0
    crop: Crop = field(default_factory=Crop)
    views: int | None = None
    captions: int = 1
    cache: CacheRef | None = None
    tokenizers: Mapping[str, Callable[[], Tokenizer]] = field(default_factory=dict)
    cpus_per_task: float = 1.0
    prefetch_batches: int = 2
    readers: int = 1
    own_steps: int = 1

    def __post_init__(self) -> None:
        if self.num_workers < 1 or self.global_batch_size % self.num_workers:
            raise ConfigError(
                f"a global batch of {self.global_batch_size} cannot be shared equally by "
                f"{self.num_workers} workers"
            )
        if not 0 <= self.start_step <= self.order.num_steps:
            raise ConfigError(
                f"start_step {self.start_step} lies outside a run of {self.order.num_steps} steps"
            )
        if not self.sizes and not self.tokenizers:
            raise ConfigError("a stream needs image sizes or tokenizers, it has neither")
        cache = self.cache
        if cache is not None and (self.views, self.crop) != (cache.views, cache.crop):
            raise ConfigError(
                f"the cache holds {cache.views} views by {cache.crop}, the stream wants "
                f"{self.views} by {self.crop}"
            )

    @cached_property
    def order(self) -> Order:
        """The order of the whole run."""
        return Order(
            self.manifest.counts,
            self.seed,
            self.global_batch_size,
            self.epochs,
            self.total_steps,
            self.window_samples,
        )

    @property
    def batch_size(self) -> int:
        """One worker's share of the global batch."""
        return self.global_batch_size // self.num_workers

    @property
    def data_step(self) -> int:
        """The first step that the data tasks prepare."""
        return min(self.start_step + self.own_steps, self.order.num_steps)

    @property
    def reading(self) -> Reading:
        """What is read of a sample."""
        return Reading(self.views, self.captions, self.cache)

    @property
    def plan(self) -> Plan:
        """What becomes of what is read."""
        return Plan(
            self.crop,
            self.views,
            self.sizes,
            {name: pickled(make) for name, make in self.tokenizers.items()},
            tuple(shard.path for shard in self.manifest.shards),
            self.seed,
        )

    @property
    def block_rows(self) -> int:
        """Rows per block: the share, or its largest divisor whose pixels fit `BLOCK_BYTES`.

        Where only needlessly small blocks would do, the share it is.
        """
        limit = max(1, BLOCK_BYTES // self.row_bytes)
        share = self.batch_size
        best = max(rows for rows in range(1, min(limit, share) + 1) if share % rows == 0)
        return best if best == share or best >= limit // 4 else share

    @property
    def row_bytes(self) -> int:
        """Size of a decoded row, tokens guessed."""
        return 3 * sum(px * px for px in self.sizes) + 2048


def train_dataset(config: StreamConfig) -> ray.data.Dataset:
    """Builds the stream of all steps from `config.data_step` to the end of the run.

    Columns: `row`, `epoch` (int64), `key`, `image_{px}` (px, px, 3) uint8, `tokens_{name}` (T,)
    int64. Nothing is read before somebody iterates.
    """
    rows, cpus = config.block_rows, config.cpus_per_task
    options: dict[str, Any] = {"batch_format": "pyarrow", "num_cpus": cpus}
    even: dict[str, Any] = {"target_num_rows_per_block": rows, "strict": True}
    reading = Reading(config.views, config.captions, config.cache)
    dataset = compressed(config, reading)
    dealt = rows < config.batch_size and config.num_workers > 1
    if dealt:
        whole = config.global_batch_size
        dealer = partial(deal, num_workers=config.num_workers, rows=rows)
        dataset = dataset.repartition(target_num_rows_per_block=whole, strict=True)
        dataset = dataset.map_batches(dealer, batch_size=whole, **options)
    finisher = partial(finish, plan=config.plan)
    # The other way round Ray would fuse the two, and one task would do several blocks in a row.
    dataset = dataset.repartition(**even).map_batches(finisher, batch_size=rows, **options)
    configure(dataset, rows * config.row_bytes)
    return dataset


def pickled(value: Any) -> bytes:
    """Pickles by value what a worker could not import."""
    import ray.cloudpickle

    return ray.cloudpickle.dumps(value)


def configure(dataset: ray.data.Dataset, block_bytes: int) -> None:
    """Sets what Ray Data keeps beside the plan: order and block size."""
    quiet(dataset)
    context = dataset.context
    # A finished block that Ray would cut in two no longer goes to one worker; what is read may
    # not be much larger, since a task takes a whole block of it.
    context.target_max_block_size = max(_MIN_BLOCK_BYTES, block_bytes)
    context.execution_options = execution_options()


def quiet(dataset: ray.data.Dataset) -> None:
    """Leaves progress, warnings and errors to us; Ray Data's log files keep all."""
    for handler in logging.getLogger("ray.data").handlers:  # set anew by the import of ray.data
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.ERROR)
    context = dataset.context
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True


def execution_options(num_cpus: float | None = None) -> ray.data.ExecutionOptions:
    """Makes Ray Data keep the order, and stay within a budget where one is given."""
    from ray.data import ExecutionOptions, ExecutionResources

    limits = ExecutionResources.for_limits(cpu=num_cpus)
    return ExecutionOptions(resource_limits=limits, preserve_order=True, verbose_progress=False)


def compressed(config: StreamConfig | InstructConfig, reading: Reading) -> ray.data.Dataset:
    """Makes the dataset of compressed samples: one read task per segment."""
    import ray.data
    from ray.data import Datasource, ReadTask
    from ray.data.block import BlockMetadata

    # Where workers read all that is left, nobody asks for the dataset, but Ray wants one.
    segments = config.order.segments(min(config.data_step, config.order.num_steps - 1))
    shards = config.manifest.shards

    class Shards(Datasource):
        """Reads segments in the order of the run."""

        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
            return [_task(segment) for segment in segments]

    def _task(segment: Segment) -> ReadTask:
        """Returns the task that reads a segment."""
        entries = tuple(shards[number] for number in segment.shards)
        unknown = {"size_bytes": None, "exec_stats": None, "input_files": None}
        metadata = BlockMetadata(num_rows=segment.num_rows, **unknown)
        return ReadTask(partial(read_segment, segment, entries, reading), metadata)

    # Half, because a reader waits for storage; and unlike the decoders, or Ray would fuse the
    # two and lose the rows that a block takes from two windows.
    return ray.data.read_datasource(
        Shards(),
        override_num_blocks=len(segments),
        num_cpus=config.cpus_per_task / 2,
        concurrency=config.readers,
    )


class TrainStream:
    """One worker's side of the stream: a `Batch` per step until the run's last step.

    Attributes:
        wait_s: Seconds spent waiting for batches since the last `take_wait_s`.
    """

    def __init__(self, iterator: Any, config: StreamConfig, rank: int) -> None:
        """Wraps a shard of `train_dataset`.

        Args:
            iterator: What `ray.train.get_dataset_shard` or `streaming_split` gives.
        """
        self._iterator = iterator
        self._config = config
        self._rank = rank
        self.wait_s = 0.0

    def __len__(self) -> int:
        return self._config.order.num_steps - self._config.start_step

    def take_wait_s(self) -> float:
        """Returns the seconds waited since the last call."""
        waited, self.wait_s = self.wait_s, 0.0
        return waited

    def __iter__(self) -> Iterator[Batch]:
        """Yields the batches of all remaining steps.

        Raises:
            DataError: The stream ended early.
            OrderBroken: Its rows are not those of the step.
            ShardChanged: A shard no longer fits the manifest.
        """
        config = self._config
        blocks = self._blocks() if config.data_step < config.order.num_steps else iter(())
        starter = ThreadPoolExecutor(1)
        # Ray starts its tasks when it is first asked; meanwhile the first steps are read here.
        later = starter.submit(next_block, blocks)
        try:
            for step in range(config.start_step, config.order.num_steps):
                began = time.perf_counter()
                if step < config.data_step:
                    columns = own_columns(config, step, self._rank)
                else:
                    columns = later.result() if step == config.data_step else next_block(blocks)
                self.wait_s += time.perf_counter() - began
                if columns is None:
                    raise DataError(
                        f"the stream ended before step {step} of {config.order.num_steps}"
                    )
                yield self._batch(step, columns)
        finally:
            starter.shutdown(wait=False, cancel_futures=True)
            if later.done():
                close = getattr(blocks, "close", lambda: None)
                close()

    def _blocks(self) -> Iterator[dict[str, Any]]:
        """Asks Ray for the share of every step that its tasks prepare."""
        return iter(
            self._iterator.iter_batches(
                batch_size=self._config.batch_size,
                batch_format="numpy",
                prefetch_batches=self._config.prefetch_batches,
            )
        )

    def _batch(self, step: int, columns: dict[str, Any]) -> Batch:
        """Checks a step's rows and wraps its arrays."""
        size, rows = self._config.batch_size, columns["row"]
        first = step * self._config.global_batch_size + self._rank * size
        if not np.array_equal(rows, np.arange(first, first + size)):
            raise OrderBroken(
                f"order contract broken: step {step} of worker {self._rank} should be rows "
                f"{first} to {first + size - 1} and is {len(rows)} rows from {rows[:1]}"
            )
        return Batch(
            step,
            int(columns["epoch"][0]),
            rows,
            columns["key"].tolist(),
            {px: _tensor(columns[f"image_{px}"]) for px in self._config.sizes},
            {name: _tensor(columns[f"tokens_{name}"]) for name in self._config.tokenizers},
            **{name: _tensor(columns[name]) for name in EMBEDDINGS if name in columns},
        )


def own_columns(config: StreamConfig, step: int, rank: int) -> dict[str, Any]:
    """Reads, decodes and tokenises one worker's share of a step in this process.

    Raises:
        ShardChanged: A shard no longer fits the manifest.
    """
    shards = config.manifest.shards
    tables = [
        table
        for segment in config.order.segments(step, step + 1)
        for table in read_segment(segment, tuple(shards[n] for n in segment.shards), config.reading)
    ]
    share = pa.concat_tables(tables).slice(rank * config.batch_size, config.batch_size)
    return finish(share.combine_chunks(), config.plan)


def next_block(blocks: Iterator[Any]) -> Any:
    """Takes the next block, raising our own errors as they were raised on the data task."""
    try:
        return next(blocks, None)
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not (
            isinstance(cause, KdscaleError) and not hasattr(cause, "cause_cls")
        ):
            cause = getattr(cause, "cause", None) or cause.__cause__
        if isinstance(cause, KdscaleError):
            raise cause from error
        raise


def _tensor(array: np.ndarray[Any, Any]) -> Any:
    """Wraps an array without a copy; that it is read-only, torch cannot express."""
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)
