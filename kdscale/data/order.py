"""The order of the samples: a pure function of (seed, epoch, shard counts).

Each epoch permutes the shards, groups neighbours into windows that fit in a reader's memory, and
permutes the samples of each window together. Rows are numbered through the whole run: step s
trains on rows [s * G, (s + 1) * G), whoever computes them. What is left of an epoch after its
last whole global batch is dropped. Nothing here knows of workers, files or Ray.

Where lengths are given, a window is drawn in megabatches of one modality and like length, as
LLaVA and TinyLLaVA draw a whole epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from itertools import pairwise
from typing import Any, overload

import numpy as np

from kdscale.core.types import ConfigError, DataError

WINDOW_SAMPLES = 4096  # about open_clip's shuffle buffer of 5000; 150 MB of 256 px JPEGs
Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Grouping:
    """How one window is drawn in megabatches.

    Attributes:
        size: Samples of a megabatch.
        micro: Samples of a micro-batch; divides `size`.
        lead: Samples before the window's first whole megabatch, which complete the last one of
            the window before.
        lengths: Words of each of the window's samples, shard after shard; negative for samples
            without an image, as in the manifest.
    """

    size: int
    micro: int
    lead: int
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Segment:
    """A run of rows that one reader produces: a slice of one window's permutation.

    A segment knows all that its reader needs, so that it may be sent alone.

    Attributes:
        window: The window's number within its epoch.
        shards: Shard numbers (places in the manifest) of the window, in this epoch's order.
        counts: Usable samples of each of these shards.
        start: First place in the window's permutation; `stop` is one past the last.
        first_row: The row number, within the whole run, of the first sample.
        grouping: Megabatches of the window, None where its samples are merely permuted.
    """

    seed: int
    epoch: int
    window: int
    shards: tuple[int, ...]
    counts: tuple[int, ...]
    start: int
    stop: int
    first_row: int
    grouping: Grouping | None = None

    @property
    def num_rows(self) -> int:
        """Returns the number of samples in the segment."""
        return self.stop - self.start

    def positions(self) -> tuple[Ints, Ints]:
        """Returns where each row lies.

        Returns:
            Two (num_rows,) arrays: the index into `shards`, and the place among that shard's
            usable samples.
        """
        ends = np.cumsum(self.counts)
        name = (self.seed, self.epoch, self.window)
        order = permutation(int(ends[-1]), "window", *name)
        if self.grouping is not None:
            order = grouped(order, self.grouping, *name)
        chosen = order[self.start : self.stop]
        slot = np.searchsorted(ends, chosen, side="right")
        return slot, chosen - np.concatenate(([0], ends))[slot]


@dataclass(frozen=True)
class Order:
    """The order of a whole run.

    Attributes:
        counts: Usable samples of each shard, in the manifest's order.
        epochs: Passes over the data; `total_steps` may end the run earlier (and, where
            `epochs` is None, alone says how long it is).
        window_samples: Samples that are permuted together at most, but always a whole shard.
        group_size: Samples of a megabatch of one modality; None draws without regard to it.
        micro_batch_size: Samples of a micro-batch; a megabatch holds whole ones.
        lengths: Words of every sample, as `Manifest.lengths` gives them; read with `group_size`.
    """

    counts: tuple[int, ...]
    seed: int
    global_batch_size: int
    epochs: int | None = None
    total_steps: int | None = None
    window_samples: int = WINDOW_SAMPLES
    group_size: int | None = None
    micro_batch_size: int = 1
    lengths: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        if self.epochs is None and self.total_steps is None:
            raise ConfigError("an order needs epochs or total_steps to know where it ends")
        sizes = ("global_batch_size", "window_samples", "group_size", "micro_batch_size")
        for name in ("epochs", "total_steps", *sizes):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if not self.counts or min(self.counts) < 1:
            raise DataError("an order needs shards that each hold at least one sample")
        if self.num_samples < self.global_batch_size:
            raise DataError(
                f"{self.num_samples} samples are fewer than one global batch of "
                f"{self.global_batch_size}: use more data or a smaller batch"
            )
        if self.group_size is not None:
            self._check_grouping(self.group_size)

    def _check_grouping(self, size: int) -> None:
        """Checks that megabatches hold whole micro-batches and that all lengths are known."""
        if size % self.micro_batch_size:
            raise ConfigError(
                f"a group_size of {size} does not hold whole micro-batches of "
                f"{self.micro_batch_size}"
            )
        if self.lengths is None or tuple(map(len, self.lengths)) != self.counts:
            raise DataError(
                "an order with group_size needs the length of every sample: verify the data as "
                "conversations"
            )

    @cached_property
    def num_samples(self) -> int:
        """Samples of one pass over the data, before the tail is dropped."""
        return sum(self.counts)

    @property
    def steps_per_epoch(self) -> int:
        """Whole global batches in one pass."""
        return self.num_samples // self.global_batch_size

    @property
    def num_steps(self) -> int:
        """Steps of the whole run."""
        if self.epochs is None:
            assert self.total_steps is not None
            return self.total_steps
        steps = self.epochs * self.steps_per_epoch
        return steps if self.total_steps is None else min(steps, self.total_steps)

    def windows(self, epoch: int) -> tuple[tuple[int, ...], ...]:
        """Returns the shard numbers of every window of an epoch."""
        grouped: list[tuple[int, ...]] = []
        current: list[int] = []
        held = 0
        for shard in permutation(len(self.counts), "shards", self.seed, epoch).tolist():
            if current and held + self.counts[shard] > self.window_samples:
                grouped.append(tuple(current))
                current, held = [], 0
            current.append(shard)
            held += self.counts[shard]
        return (*grouped, tuple(current))

    def segments(self, from_step: int = 0, to_step: int | None = None) -> Segments:
        """Returns the segments that read, in turn, exactly the rows of some steps.

        Args:
            from_step: First step.
            to_step: One past the last step; None means the end of the run.
        """
        last = self.num_steps if to_step is None else to_step
        if not 0 <= from_step <= last <= self.num_steps:
            raise ConfigError(
                f"steps {from_step} to {last} do not lie within a run of {self.num_steps} steps"
            )
        return Segments(self, _table(self, from_step, last))

    def rows(self, from_step: int, to_step: int) -> tuple[Ints, Ints]:
        """Returns the shard number and the place in it of every row of some steps, in order."""
        shards: list[Ints] = [np.empty(0, np.int64)]
        places: list[Ints] = [np.empty(0, np.int64)]
        for segment in self.segments(from_step, to_step):
            slot, place = segment.positions()
            shards.append(np.asarray(segment.shards, np.int64)[slot])
            places.append(place)
        return np.concatenate(shards), np.concatenate(places)


class Segments(Sequence[Segment]):
    """Segments made when asked for; what is stored is five numbers each."""

    def __init__(self, order: Order, table: Ints) -> None:
        self._order = order
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, index: int) -> Segment: ...
    @overload
    def __getitem__(self, index: slice) -> Segments: ...
    def __getitem__(self, index: int | slice) -> Segment | Segments:
        if isinstance(index, slice):
            return Segments(self._order, self._table[index])
        epoch, window, start, stop, row = (int(value) for value in self._table[index])
        return self._segment((epoch, window, start, stop, row), self._order.windows(epoch))

    def __iter__(self) -> Iterator[Segment]:
        windows: tuple[tuple[int, ...], ...] = ()
        known = -1
        for epoch, window, start, stop, row in self._table.tolist():
            if epoch != known:
                windows, known = self._order.windows(epoch), epoch
            yield self._segment((epoch, window, start, stop, row), windows)

    def _segment(
        self, line: tuple[int, int, int, int, int], windows: tuple[tuple[int, ...], ...]
    ) -> Segment:
        """Fills a line of the table in."""
        order = self._order
        epoch, window, start, stop, row = line
        shards = windows[window]
        counts = tuple(order.counts[shard] for shard in shards)
        grouping = None
        if order.group_size is not None:
            assert order.lengths is not None
            before = row - start - epoch * order.steps_per_epoch * order.global_batch_size
            lengths = tuple(length for shard in shards for length in order.lengths[shard])
            lead = -before % order.group_size
            grouping = Grouping(order.group_size, order.micro_batch_size, lead, lengths)
        return Segment(order.seed, epoch, window, shards, counts, start, stop, row, grouping)


def _table(order: Order, from_step: int, to_step: int) -> Ints:
    """Lists (epoch, window, start, stop, first_row) for the rows of some steps."""
    batch, per_epoch = order.global_batch_size, order.steps_per_epoch
    found: list[tuple[int, int, int, int, int]] = []
    for epoch in range(from_step // per_epoch, -(-to_step // per_epoch)):
        base = epoch * per_epoch
        low = (max(from_step, base) - base) * batch
        high = (min(to_step, base + per_epoch) - base) * batch
        sizes = [sum(order.counts[s] for s in shards) for shards in order.windows(epoch)]
        edges = np.concatenate(([0], np.cumsum(sizes))).tolist()
        for window, (left, right) in enumerate(pairwise(edges)):
            first, end = max(left, low), min(right, high)
            if first < end:
                row = base * batch + first
                found.append((epoch, window, first - left, end - left, row))
    return np.array(found, np.int64).reshape(-1, 5)


def permutation(size: int, *name: object) -> Ints:
    """Permutes range(size) by a name, the same way for ever.

    The raw output of a bit generator never changes between numpy versions, whereas that of
    `Generator.permutation` may: hence the sort.
    """
    digest = blake2b("\0".join(map(str, name)).encode(), digest_size=16).digest()
    raw = np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(size)
    return np.argsort(raw, kind="stable").astype(np.int64)


def grouped(order: Ints, grouping: Grouping, *name: object) -> Ints:
    """Rearranges a window's permutation into megabatches of one modality and like length.

    Each modality is cut, in the order of the permutation, into megabatches, each of which is
    dealt to its micro-batches; the megabatches are then shuffled. What is left of both modalities
    stands at the window's ends: megabatches begin at whole multiples of their size, counted from
    the start of the epoch, whatever the size of the windows before.

    Args:
        order: (N,) permutation of the window's samples.
        grouping: Sizes and the N lengths.
        name: Names the shuffle of the megabatches.

    Returns:
        (N,) the same places in another order.

    Source: LLaVA's `get_modality_length_grouped_indices`, per window instead of per epoch.
    """
    size = grouping.size
    lengths = np.asarray(grouping.lengths, np.int64)
    whole: list[Ints] = []
    left: list[Ints] = []
    for own in (order[lengths[order] > 0], order[lengths[order] <= 0]):
        end = len(own) // size * size
        whole += np.split(own[:end], end // size) if end else []
        left.append(own[end:])
    shuffled = permutation(len(whole), "groups", *name).tolist()
    lead = min(grouping.lead, len(order))
    while sum(map(len, left)) < lead:
        left.append(whole[shuffled.pop()])
    rest = np.concatenate(left)
    middle = [_dealt(whole[number], lengths, grouping.micro) for number in shuffled]
    return np.concatenate([rest[:lead], *middle, rest[lead:]])


def _dealt(group: Ints, lengths: Ints, micro: int) -> Ints:
    """Deals a megabatch, longest first, each sample to the micro-batch with the fewest words."""
    words = np.abs(lengths[group])
    batches: list[list[int]] = [[] for _ in range(len(group) // micro)]
    loads = [0] * len(batches)
    for place in np.argsort(-words, kind="stable").tolist():
        target = min(
            (b for b in range(len(batches)) if len(batches[b]) < micro), key=loads.__getitem__
        )
        batches[target].append(int(group[place]))
        loads[target] += int(words[place])
    return np.array(batches, np.int64).reshape(-1)
