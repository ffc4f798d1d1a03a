"""What the data tasks of the stream do: read a segment, deal a batch, finish a block.

Arrow tables in, Arrow tables or arrays out; nothing here knows of Ray.
"""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import cv2
import fsspec
import numpy as np
import pyarrow as pa

from kdscale.core.types import DataError, ShardChanged
from kdscale.data.order import Segment
from kdscale.data.raw import RawSample
from kdscale.data.samples import BadImage, Crop, caption_of, render, view_of
from kdscale.data.shards import ShardEntry, changed, read_good
from kdscale.data.sidecars import TEXT, CacheRef, check_keys, read_sidecar, view_name

Tokenizer = Callable[[list[str]], Any]
Found = list[tuple[str, str, bytes | None] | None]

EMBEDDINGS = ("teacher_image", "teacher_text")
_READ_ROWS = 1024
_MOST_SPARE = 2
_UNSHARED = 3  # references to an array of a list while a loop looks at it: list, loop, call


@dataclass(frozen=True)
class Reading:
    """What is read of a sample.

    Attributes:
        views: Distinct crops per sample, None for a new one each epoch.
        captions: Captions that the epochs take in turn.
        cache: Teacher embeddings to read beside the shards.
        conversations: Whether a sample's text is its conversation, as JSON, and no caption.
    """

    views: int | None = None
    captions: int = 1
    cache: CacheRef | None = None
    conversations: bool = False

    def text(self, sample: RawSample, epoch: int) -> str:
        """Returns what an epoch shows of a sample's text."""
        if self.conversations:
            return json.dumps(sample.meta["conversations"])
        return sample.captions(self.captions)[caption_of(epoch, self.captions)]


def read_segment(
    segment: Segment, entries: tuple[ShardEntry, ...], reading: Reading = Reading()
) -> Iterator[pa.Table]:
    """Reads the compressed samples of a segment, in order.

    The whole segment is held in memory before the first row leaves: its rows lie anywhere in
    its shards, and a shard is trusted only once it has been read to the end.

    Yields:
        Tables with columns row, epoch, shard, place (among the shard's usable samples), key,
        caption, jpg (null where a conversation has none) and, with a cache, teacher_image and
        teacher_text.
    """
    slots, places = segment.positions()
    found: Found = [None] * segment.num_rows
    cached: dict[str, np.ndarray[Any, Any]] = {}
    place_of = np.empty(segment.num_rows, np.int32)
    for slot, entry in enumerate(entries):
        rows = np.flatnonzero(slots == slot)
        if not len(rows):
            continue
        used = entry.used_places()
        own = places[rows] if used is None else used[places[rows]]
        place_of[rows] = own
        keys = _read_shard(segment, entry, rows, own, reading, found)
        for name, values in _read_cache(segment, entry, keys, reading).items():
            whole = cached.setdefault(name, np.empty((len(slots), values.shape[1]), np.float16))
            whole[rows] = values[own]
    shard_of = np.asarray(segment.shards, np.int32)[slots]
    for start in range(0, segment.num_rows, _READ_ROWS):
        stop = min(start + _READ_ROWS, segment.num_rows)
        columns = {
            "row": np.arange(start, stop, dtype=np.int64) + segment.first_row,
            "epoch": np.full(stop - start, segment.epoch, np.int64),
            "shard": shard_of[start:stop],
            "place": place_of[start:stop],
            **_taken(found, start, stop),
        }
        yield pa.table(columns | {k: _lists(v[start:stop]) for k, v in cached.items()})


def _taken(found: Found, start: int, stop: int) -> dict[str, pa.Array]:
    """Takes rows out of what was read, so that their bytes are not held twice."""
    keys, captions, images = zip(*(row for row in found[start:stop] if row), strict=True)
    found[start:stop] = [None] * (stop - start)
    return {
        "key": pa.array(keys, pa.string()),
        "caption": pa.array(captions, pa.string()),
        "jpg": _binaries(images),
    }


def _read_shard(
    segment: Segment,
    entry: ShardEntry,
    rows: np.ndarray[Any, Any],
    places: np.ndarray[Any, Any],
    reading: Reading,
    found: Found,
) -> list[str]:
    """Puts a shard's samples where the segment wants them and returns all its keys."""
    target = np.full(entry.num_samples, -1, np.int64)
    target[places] = rows
    keys: list[str] = []
    fs, path = fsspec.core.url_to_fs(entry.path)
    # Not strict: the reader itself complains of too many or too few, by name.
    for row, sample in zip(_endless(target.tolist()), read_good(path, fs, entry), strict=False):
        keys.append(sample.key)
        if row >= 0:
            found[row] = (sample.key, reading.text(sample, segment.epoch), sample.jpg or None)
    return keys


def _read_cache(
    segment: Segment, entry: ShardEntry, keys: list[str], reading: Reading
) -> dict[str, np.ndarray[Any, Any]]:
    """Reads a shard's teacher embeddings: {column: (S, D) float16}; empty without a cache."""
    cache = reading.cache
    if cache is None:
        return {}
    view = view_name(view_of(segment.epoch, reading.views, segment.seed))
    found: dict[str, np.ndarray[Any, Any]] = {}
    for name, part in zip(EMBEDDINGS, (view, TEXT), strict=True):
        known, values = read_sidecar(cache, part, entry)
        check_keys(cache.path(part, entry), known, keys)
        found[name] = values
    found["teacher_text"] = found["teacher_text"][:, caption_of(segment.epoch, reading.captions)]
    return found


def _binaries(values: Sequence[bytes | None]) -> pa.LargeBinaryArray:
    """Copies encoded images into an Arrow column; Arrow itself grows its buffer by copying."""
    offsets = np.zeros(len(values) + 1, np.int64)
    np.cumsum([len(value or b"") for value in values], out=offsets[1:])
    data = pa.allocate_buffer(int(offsets[-1]))
    target = memoryview(data).cast("B")
    for start, stop, value in zip(offsets[:-1].tolist(), offsets[1:].tolist(), values, strict=True):
        target[start:stop] = value or b""
    there = np.packbits([value is not None for value in values], bitorder="little")
    buffers = [pa.py_buffer(there), pa.py_buffer(offsets), data]
    found: Any = pa.Array.from_buffers(pa.large_binary(), len(values), buffers)
    return found


def _lists(values: np.ndarray[Any, Any]) -> pa.FixedSizeListArray:
    """Wraps (B, D) numbers as an Arrow column."""
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def _endless(targets: list[int]) -> Iterator[int]:
    """Continues with -1, so that surplus samples reach the reader's own check."""
    yield from targets
    while True:
        yield -1


def deal(table: pa.Table, num_workers: int, rows: int) -> pa.Table:
    """Reorders one global batch so that dealing blocks in turn gives each worker its share."""
    size = table.num_rows
    order = np.arange(size).reshape(num_workers, size // (num_workers * rows), rows)
    return table.take(pa.array(order.transpose(1, 0, 2).ravel()))


@dataclass(frozen=True)
class Plan:
    """What `finish` needs to know.

    Attributes:
        tokenizers: {name: pickled function that makes the tokenizer}.
        paths: The shards' places, to name one in an error.
        seed: The run's, which chooses the order of the views.
    """

    crop: Crop
    views: int | None
    sizes: tuple[int, ...]
    tokenizers: dict[str, bytes]
    paths: tuple[str, ...]
    seed: int = 0


def finish(table: pa.Table, plan: Plan) -> dict[str, Any]:
    """Decodes, crops and tokenises one block.

    Returns:
        Columns `row`, `epoch`, `key`, `image_{px}`, `tokens_{name}` and the teacher's
        embeddings where the block has them.

    Raises:
        ShardChanged: An image that the manifest vouches for cannot be decoded.
    """
    cv2.setNumThreads(1)
    keys = table.column("key").to_pylist()
    columns: dict[str, Any] = {
        "row": table.column("row").to_numpy(),
        "epoch": table.column("epoch").to_numpy(),
        "key": np.array(keys),
    }
    if plan.sizes:
        shards = table.column("shard").to_pylist()
        images = {px: _pixels((len(keys), px, px, 3)) for px in plan.sizes}
        for i, data in enumerate(table.column("jpg").to_pylist()):
            view = view_of(int(columns["epoch"][i]), plan.views, plan.seed)
            try:
                own = {px: pixels[i] for px, pixels in images.items()}
                render(data, keys[i], view, plan.crop, plan.sizes, own)
            except BadImage as error:
                what = f"a bad image under {keys[i]!r} ({error})"
                raise ShardChanged(changed(plan.paths[shards[i]], what)) from error
        columns |= {f"image_{px}": pixels for px, pixels in images.items()}
    captions = table.column("caption").to_pylist()
    for name, payload in plan.tokenizers.items():
        tokens = np.asarray(made(payload)(captions), np.int64)
        if tokens.ndim != 2 or len(tokens) != len(captions):
            raise DataError(f"tokenizer {name!r} made {tokens.shape} of {len(captions)} captions")
        columns[f"tokens_{name}"] = tokens
    for name in EMBEDDINGS:
        if name in table.column_names:
            flat = table.column(name).combine_chunks().flatten()
            columns[name] = flat.to_numpy(zero_copy_only=False).reshape(len(keys), -1)
    return columns


def _pixels(shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Returns memory for a block's pixels: that of an earlier block which nobody holds any more.

    Fresh memory of this size comes from the kernel page by page, a tenth of the time of decoding.
    """
    spare = _spare(shape)
    for whole in spare:
        if sys.getrefcount(whole) == _UNSHARED:
            return whole[:]
    spare.append(np.empty(shape, np.uint8))
    del spare[:-_MOST_SPARE]
    return spare[-1][:]


@lru_cache(maxsize=4)
def _spare(shape: tuple[int, ...]) -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
    """Keeps this process's memory for blocks of one shape."""
    return []


@lru_cache(maxsize=8)
def made(payload: bytes) -> Any:
    """Calls a pickled function without arguments, once per process, for what is slow to make."""
    return pickle.loads(payload)()
