"""The conversation stream: every worker gets exactly its micro-batches, ready to be collated.

As in `kdscale.data.stream`, whose reading side this shares, step s trains on rows [s * G,
(s + 1) * G). They are cut into micro-batches of m consecutive rows, whatever the number of
workers; of N workers, worker r takes micro-batches r, r + N, ... of each step. A block is one
micro-batch, so Ray deals them out in just that way; `InstructStream` checks it at each step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa

from kdscale.core.types import ConfigError, DataError, OrderBroken
from kdscale.data.blocks import Reading, read_segment
from kdscale.data.features import FeatureRef
from kdscale.data.instruct_blocks import (
    InstructPlan,
    MicroBatch,
    Render,
    finish_instruct,
    micro_batch,
)
from kdscale.data.order import WINDOW_SAMPLES, Order
from kdscale.data.shards import Manifest
from kdscale.data.stream import compressed, configure, next_block, pickled
from kdscale.data.templates import spec_of

CONVERSATIONS = Reading(conversations=True)
_TEXT_BYTES = 2048


@dataclass(frozen=True, kw_only=True)
class InstructConfig:
    """What to stream, to how many workers, from which step on.

    Attributes:
        manifest: Of content `conversations`.
        micro_batch_size: Samples of one forward pass; divides `global_batch_size`.
        template: One of `kdscale.data.instruct.TEMPLATES`.
        tokenizer: Picklable function without arguments that makes the tokenizer; called once per
            process.
        image_token_id: Id of `<image>` in it.
        num_image_tokens: Visual tokens of one image.
        max_length: Tokens after which a conversation is cut.
        image_px: Side of the rendered images.
        render: Picklable function without arguments that makes the function from (H, W, 3) uint8
            to what the tower sees of it, (image_px, image_px, 3) uint8.
        pad_colour: Fills images up to squares before they are rendered; None leaves them.
        features: The tower's features, read in place of the images.
        epochs: Passes over the data; `total_steps` may end the run earlier, or stand alone.
        group_size: Samples of a megabatch of one modality and like length; None is off.
        num_workers: Must divide the micro-batches of a step; changes no row's place.
        start_step: First step, that of the checkpoint which training resumes from.
        cpus_per_task: As in `StreamConfig`, and so are `readers` and `own_steps`.
        prefetch_batches: Micro-batches fetched ahead.
    """

    manifest: Manifest
    global_batch_size: int
    micro_batch_size: int
    template: str
    tokenizer: Callable[[], Any]
    image_token_id: int
    num_image_tokens: int
    max_length: int
    image_px: int
    render: Callable[[], Render]
    pad_colour: tuple[int, int, int] | None = None
    features: FeatureRef | None = None
    epochs: int | None = None
    total_steps: int | None = None
    seed: int = 0
    window_samples: int = WINDOW_SAMPLES
    group_size: int | None = None
    num_workers: int = 1
    start_step: int = 0
    cpus_per_task: float = 1.0
    prefetch_batches: int = 2
    readers: int = 1
    own_steps: int = 1

    def __post_init__(self) -> None:
        micro, whole = self.micro_batch_size, self.global_batch_size
        if micro < 1 or whole % micro:
            raise ConfigError(f"micro-batches of {micro} do not make up a global batch of {whole}")
        if self.num_workers < 1 or (whole // micro) % self.num_workers:
            raise ConfigError(
                f"the {whole // micro} micro-batches of a step cannot be shared equally by "
                f"{self.num_workers} workers: change their number or micro_batch_size"
            )
        if not 0 <= self.start_step <= self.order.num_steps:
            raise ConfigError(
                f"start_step {self.start_step} lies outside a run of {self.order.num_steps} steps"
            )
        self._check_content()

    def _check_content(self) -> None:
        """Checks that the data are conversations that the template can render."""
        if self.manifest.content != "conversations":
            raise DataError(
                f"the manifest vouches for {self.manifest.content}, conversations are needed: "
                "verify the data with --conversations"
            )
        if not spec_of(self.template).terminator:
            texts = sum(n < 0 for shard in self.manifest.lengths or () for n in shard)
            if texts:
                raise DataError(
                    f"template {self.template!r} is for images with one caption each; {texts} "
                    "samples of the data have no image"
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
            self.group_size,
            self.micro_batch_size,
            None if self.group_size is None else self.manifest.lengths,
        )

    @property
    def data_step(self) -> int:
        """The first step that the data tasks prepare."""
        return min(self.start_step + self.own_steps, self.order.num_steps)

    @property
    def pixel_shape(self) -> tuple[int, ...]:
        """Shape of what stands for one image."""
        if self.features is not None:
            return self.features.shape
        return self.image_px, self.image_px, 3

    @property
    def accumulation(self) -> int:
        """Micro-batches of one worker in a step."""
        return self.global_batch_size // (self.micro_batch_size * self.num_workers)

    @property
    def block_bytes(self) -> int:
        """Size of a finished micro-batch at most, keys guessed."""
        pixels = 3 * self.image_px**2 if self.features is None else self.features.row_bytes
        return self.micro_batch_size * (pixels + 8 * self.max_length + _TEXT_BYTES)

    def plan(self) -> InstructPlan:
        """Returns what the data tasks need to know."""
        return InstructPlan(
            self.template,
            pickled(self.tokenizer),
            pickled(self.render),
            self.pad_colour,
            (self.image_token_id, self.num_image_tokens),
            self.max_length,
            self.manifest.shards,
            self.features,
        )


@dataclass(frozen=True)
class InstructBatch:
    """One worker's share of one optimizer step.

    Attributes:
        step: Optimizer step, counted from the start of the whole run.
        micro: Its micro-batches, in order.
    """

    step: int
    epoch: int
    micro: list[MicroBatch]


def instruct_dataset(config: InstructConfig) -> Any:
    """Builds the Ray dataset of all steps from `config.data_step` to the end of the run.

    Columns as `finish_instruct` says. Nothing is read before somebody iterates.
    """
    rows = config.micro_batch_size
    finisher = partial(finish_instruct, plan=config.plan())
    dataset = compressed(config, CONVERSATIONS)
    # As in `train_dataset`: the other way round Ray would fuse the two.
    dataset = dataset.repartition(target_num_rows_per_block=rows, strict=True).map_batches(
        finisher, batch_size=rows, batch_format="pyarrow", num_cpus=config.cpus_per_task
    )
    configure(dataset, config.block_bytes)
    return dataset


class InstructStream:
    """One worker's side of the stream: an `InstructBatch` per step until the run's last step.

    Attributes:
        wait_s: Seconds spent waiting for micro-batches since the last `take_wait_s`.
    """

    def __init__(self, iterator: Any, config: InstructConfig, rank: int) -> None:
        """Wraps a shard of `instruct_dataset`.

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

    def __iter__(self) -> Iterator[InstructBatch]:
        """Yields the batches of all remaining steps.

        Raises:
            DataError: The stream ended early, its rows are not those of the step, or a
                conversation does not fit the template.
            ShardChanged: A shard no longer fits the manifest.
        """
        config = self._config
        blocks = self._blocks() if config.data_step < config.order.num_steps else iter(())
        starter = ThreadPoolExecutor(1)
        # As in `TrainStream`: Ray starts its tasks while the first steps are read here.
        later = starter.submit(next_block, blocks)
        try:
            for step in range(config.start_step, config.order.num_steps):
                if step < config.data_step:
                    tables = self._own(step)
                else:
                    ahead = [later] if step == config.data_step else []
                    tables = [
                        self._next(blocks, ahead, (step, place))
                        for place in range(config.accumulation)
                    ]
                micro = [micro_batch(table, config.pixel_shape) for table in tables]
                yield InstructBatch(step, tables[0].column("epoch")[0].as_py(), micro)
        finally:
            starter.shutdown(wait=False, cancel_futures=True)
            if later.done():
                close = getattr(blocks, "close", lambda: None)
                close()

    def _blocks(self) -> Iterator[Any]:
        """Asks Ray for the micro-batches that its tasks prepare."""
        return iter(
            self._iterator.iter_batches(
                batch_size=self._config.micro_batch_size,
                batch_format="pyarrow",
                prefetch_batches=self._config.prefetch_batches,
            )
        )

    def _own(self, step: int) -> list[Any]:
        """Reads and finishes this worker's micro-batches of a step in this process."""
        config, began = self._config, time.perf_counter()
        shards, plan, size = config.manifest.shards, config.plan(), config.micro_batch_size
        whole = pa.concat_tables(
            table
            for segment in config.order.segments(step, step + 1)
            for table in read_segment(
                segment, tuple(shards[n] for n in segment.shards), CONVERSATIONS
            )
        )
        numbers = range(self._rank, config.global_batch_size // size, config.num_workers)
        parts = [whole.slice(number * size, size).combine_chunks() for number in numbers]
        tables = [finish_instruct(part, plan) for part in parts]
        self.wait_s += time.perf_counter() - began
        return tables

    def _next(
        self, blocks: Iterator[Any], ahead: list[Future[Any]], place_in: tuple[int, int]
    ) -> Any:
        """Waits for a step's next micro-batch and checks that it is this worker's."""
        config, (step, place) = self._config, place_in
        began = time.perf_counter()
        table = ahead.pop().result() if ahead else next_block(blocks)
        self.wait_s += time.perf_counter() - began
        if table is None:
            raise DataError(f"the stream ended before step {step} of {config.order.num_steps}")
        size = config.micro_batch_size
        number = place * config.num_workers + self._rank
        first = step * config.global_batch_size + number * size
        rows = table.column("row").to_numpy()
        if not np.array_equal(rows, np.arange(first, first + size)):
            raise OrderBroken(
                f"order contract broken: micro-batch {place} of worker {self._rank} in step "
                f"{step} should be rows {first} to {first + size - 1} and is {len(rows)} rows "
                f"from {rows[:1]}"
            )
        return table
