"""Features of the frozen tower kept beside the shards: one safetensors file per shard.

A file holds the features of the shard's usable images in their order, and a checksum of each.
Readers take single rows, wherever the file lies: a shard's features may be larger than memory.
Shapes: N images of a shard, P visual tokens, D features.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from kdscale.core.types import CacheCorrupt, CacheMismatch, CacheMissing, DataError
from kdscale.data.shards import ShardEntry
from kdscale.data.sidecars import SUMMARY

Features = np.ndarray[Any, np.dtype[np.float16]]
_CHECKSUM_BYTES = 8


@dataclass(frozen=True)
class FeatureRef:
    """Which features to read, and what their files must say of themselves.

    Attributes:
        root: Directory of the files, a path or fsspec URL. Beside them lies `cache.json`, with
            their tower and shape.
        tower: Content key of the tower, its preprocessing and the layer.
        shape: (P, D) of one image.
    """

    root: str
    tower: str
    shape: tuple[int, int]

    def path(self, entry: ShardEntry) -> str:
        """Returns where a shard's features lie."""
        return f"{self.root}/{file_name(entry)}"

    @property
    def remedy(self) -> str:
        """What to do about a bad file."""
        return _remedy(self.root)

    @property
    def row_bytes(self) -> int:
        """Size of one image's features."""
        return 2 * self.shape[0] * self.shape[1]

    def metadata(self, entry: ShardEntry) -> dict[str, str]:
        """Returns what the file must say."""
        return {
            "tower": self.tower,
            "shard_sha256": entry.sha256,
            "samples": _samples(entry),
        }


def find_features(root: str, tower: str) -> FeatureRef:
    """Finds finished features and checks whose they are.

    Args:
        root: Directory of the files, a path or fsspec URL.
        tower: What `FeatureRef.tower` has to be.

    Raises:
        CacheMissing: The features were never finished.
        CacheMismatch: They are of another tower, or of images prepared in another way.
        CacheCorrupt: `cache.json` is damaged.
    """
    fs, path = fsspec.core.url_to_fs(f"{root}/{SUMMARY}")
    try:
        summary = json.loads(fs.cat_file(path))
        name, found, (tokens, width) = (summary[key] for key in ("name", "tower", "shape"))
    except FileNotFoundError as error:
        raise CacheMissing(
            f"{root} holds no finished features: its {SUMMARY} is missing. Remove "
            f"{_marker(root)} and run again: only missing files are computed."
        ) from error
    except (KeyError, TypeError, ValueError) as error:
        raise CacheCorrupt(f"{path} is damaged ({error}). {_remedy(root)}") from error
    if found != tower:
        raise CacheMismatch(
            f"{root} holds features of {name!r} ({found}), wanted are those of {tower}: another "
            "tower, precision, image mode or choice of tokens"
        )
    return FeatureRef(root, tower, (int(tokens), int(width)))


def _remedy(root: str) -> str:
    """Says what to do about a bad file."""
    return f"Remove it and {_marker(root)}, and run again: only missing files are computed."


def _marker(root: str) -> str:
    """Names the file that says the features are whole."""
    return f"{root.rpartition('/')[0]}/DONE"


def file_name(entry: ShardEntry) -> str:
    """Names a shard's file by its content, so that a moved shard keeps it."""
    return f"{entry.sha256[:24]}.safetensors"


def _samples(entry: ShardEntry) -> str:
    """Names a shard's usable samples and which of them have images."""
    signs = "".join("-+"[length > 0] for length in entry.lengths or ())
    return hashlib.blake2b(f"{entry.keys_digest} {signs}".encode(), digest_size=16).hexdigest()


def num_images(entry: ShardEntry, before: int | None = None) -> int:
    """Counts the images among a shard's usable samples, or among the first of them."""
    if entry.lengths is None:
        return entry.num_samples if before is None else before
    return sum(length > 0 for length in entry.lengths[:before])


def write_features(
    path: Path, ref: FeatureRef, entry: ShardEntry, batches: Iterable[Features]
) -> None:
    """Writes a shard's features to a local file, whole or not at all.

    Args:
        path: Where to; `ref.path` says where readers look for it.
        ref: What they are of.
        entry: Their shard.
        batches: (n, P, D) float16 each, in the order of the shard's images.

    Raises:
        DataError: The batches do not make up the shard's images.
    """
    count, done = num_images(entry), 0
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    checksums: list[int] = []
    try:
        with open(temporary, "wb") as file:
            file.write(_header(ref, entry, count))
            for batch in batches:
                if batch.dtype != np.float16 or batch.shape[1:] != ref.shape:
                    raise DataError(
                        f"features are float16 of {ref.shape} per image, got {batch.dtype} of "
                        f"{batch.shape[1:]}"
                    )
                for row in np.ascontiguousarray(batch):
                    checksums.append(zlib.crc32(row.data))
                    file.write(row.data)
                done += len(batch)
            if done != count:
                raise DataError(f"{entry.path} has {count} images, {done} were given features")
            file.write(np.array(checksums, "<i8").tobytes())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _header(ref: FeatureRef, entry: ShardEntry, count: int) -> bytes:
    """Begins a safetensors file."""
    end = count * ref.row_bytes
    sums = {"dtype": "I64", "shape": [count], "data_offsets": [end, end + _CHECKSUM_BYTES * count]}
    described = {
        "__metadata__": ref.metadata(entry),
        "features": {"dtype": "F16", "shape": [count, *ref.shape], "data_offsets": [0, end]},
        "crc32": sums,
    }
    text = json.dumps(described).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def read_feature(ref: FeatureRef, entry: ShardEntry, place: int) -> bytes:
    """Reads one image's features: P * D float16 numbers.

    Args:
        ref: Which features.
        entry: The shard of the image.
        place: The sample's place among the shard's usable samples.

    Raises:
        CacheMissing: The shard has no features.
        CacheMismatch: They are of another tower or of other samples.
        CacheCorrupt: The file is damaged.
    """
    start, checksums = _opened(ref, entry)
    index = num_images(entry, place)
    fs, path = fsspec.core.url_to_fs(ref.path(entry))
    first = start + index * ref.row_bytes
    data = fs.cat_file(path, first, first + ref.row_bytes)
    if zlib.crc32(data) != checksums[index]:
        raise CacheCorrupt(
            f"{path} is damaged: image {index} does not fit its checksum. {ref.remedy}"
        )
    return data


@lru_cache(maxsize=64)
def _opened(ref: FeatureRef, entry: ShardEntry) -> tuple[int, Any]:
    """Checks a file's header: (where the features begin, the checksum of every image)."""
    fs, path = fsspec.core.url_to_fs(ref.path(entry))
    try:
        size = int(fs.size(path))
        (length,) = struct.unpack("<Q", fs.cat_file(path, 0, 8))
        found = json.loads(fs.cat_file(path, 8, 8 + min(length, size)))
    except FileNotFoundError as error:
        raise CacheMissing(
            f"the feature cache has no {path}: the features of {entry.path} were never computed, "
            f"or were removed. {ref.remedy}"
        ) from error
    except (ValueError, struct.error) as error:
        raise CacheCorrupt(f"{path} is not a safetensors file: {error}. {ref.remedy}") from error
    count, start = num_images(entry), 8 + length
    if found.get("__metadata__") != ref.metadata(entry):
        raise CacheMismatch(
            f"{path} holds features of {found.get('__metadata__')}, wanted are those of "
            f"{ref.metadata(entry)}. {ref.remedy}"
        )
    end = start + count * ref.row_bytes
    if size != end + _CHECKSUM_BYTES * count or found["features"]["shape"] != [count, *ref.shape]:
        raise CacheCorrupt(
            f"{path} has {size} bytes, which is not {count} times {ref.shape}. {ref.remedy}"
        )
    return start, np.frombuffer(fs.cat_file(path, end, size), "<i8")
