"""What the data tasks of the stream do: read a segment, deal a batch, finish a block.

Arrow tables in, Arrow tables or arrays out; nothing here knows of Ray.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import cv2
import fsspec
import numpy as np
import pyarrow as pa

from kdscale.core.types import DataError, ShardChanged
from kdscale.data.order import Segment
from kdscale.data.samples import BadImage, Crop, render, view_of
from kdscale.data.shards import ShardEntry, changed, read_good

Tokenizer = Callable[[list[str]], Any]

_READ_ROWS = 1024


def read_segment(segment: Segment, entries: tuple[ShardEntry, ...]) -> Iterator[pa.Table]:
    """Reads the compressed samples of a segment, in order.

    The whole segment is held in memory before the first row leaves: its rows lie anywhere in
    its shards, and a shard is trusted only once it has been read to the end.

    Yields:
        Tables with columns row, epoch, shard, key, caption, jpg.
    """
    slots, places = segment.positions()
    found: list[tuple[str, str, bytes] | None] = [None] * segment.num_rows
    for slot, entry in enumerate(entries):
        rows = np.flatnonzero(slots == slot)
        if not len(rows):
            continue
        used = entry.used_places()
        target = np.full(entry.num_samples, -1, np.int64)
        target[places[rows] if used is None else used[places[rows]]] = rows
        fs, path = fsspec.core.url_to_fs(entry.path)
        # Not strict: the reader itself complains of too many or too few, by name.
        for row, sample in zip(_endless(target.tolist()), read_good(path, fs, entry), strict=False):
            if row >= 0:
                found[row] = (sample.key, sample.caption, sample.jpg or b"")
    shard_of = np.asarray(segment.shards, np.int32)[slots]
    for start in range(0, segment.num_rows, _READ_ROWS):
        stop = min(start + _READ_ROWS, segment.num_rows)
        keys, captions, images = zip(*(row for row in found[start:stop] if row), strict=True)
        found[start:stop] = [None] * (stop - start)
        yield pa.table(
            {
                "row": np.arange(start, stop, dtype=np.int64) + segment.first_row,
                "epoch": np.full(stop - start, segment.epoch, np.int64),
                "shard": shard_of[start:stop],
                "key": pa.array(keys, pa.string()),
                "caption": pa.array(captions, pa.string()),
                "jpg": pa.array(images, pa.large_binary()),
            }
        )


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
    """

    crop: Crop
    views: int | None
    sizes: tuple[int, ...]
    tokenizers: dict[str, bytes]
    paths: tuple[str, ...]


def finish(table: pa.Table, plan: Plan) -> dict[str, Any]:
    """Decodes, crops and tokenises one block.

    Returns:
        Columns `row`, `epoch`, `key`, `image_{px}` and `tokens_{name}`.

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
        images = {px: np.empty((len(keys), px, px, 3), np.uint8) for px in plan.sizes}
        for i, data in enumerate(table.column("jpg").to_pylist()):
            view = view_of(int(columns["epoch"][i]), plan.views)
            try:
                crops = render(data, keys[i], view, plan.crop, plan.sizes)
            except BadImage as error:
                what = f"a bad image under {keys[i]!r} ({error})"
                raise ShardChanged(changed(plan.paths[shards[i]], what)) from error
            for px, pixels in crops.items():
                images[px][i] = pixels
        columns |= {f"image_{px}": pixels for px, pixels in images.items()}
    captions = table.column("caption").to_pylist()
    for name, payload in plan.tokenizers.items():
        tokens = np.asarray(_tokenizer(payload)(captions), np.int64)
        if tokens.ndim != 2 or len(tokens) != len(captions):
            raise DataError(f"tokenizer {name!r} made {tokens.shape} of {len(captions)} captions")
        columns[f"tokens_{name}"] = tokens
    return columns


@lru_cache(maxsize=8)
def _tokenizer(payload: bytes) -> Tokenizer:
    """Makes a tokenizer once per process."""
    return pickle.loads(payload)()
