"""Teacher embeddings kept beside the shards: one Parquet file per shard and view, one for text.

A file is written whole or not at all, says in its metadata what it belongs to, carries a
digest, and holds the shard's usable samples in their order, key by key. Reading checks all of
it, so that a training step never sees an embedding of another image, crop or teacher.
Shape suffixes: S usable samples of a shard, V captions per sample, D embedding.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kdscale.core.types import CacheCorrupt, CacheMismatch, CacheMissing
from kdscale.data.samples import Crop
from kdscale.data.shards import ShardEntry

Values = np.ndarray[Any, np.dtype[Any]]
TEXT, EVAL = "text", "eval"
SUMMARY = "cache.json"
_METADATA = b"kdscale"
_UNREADABLE = (pa.ArrowException, AttributeError, KeyError, OSError, TypeError, ValueError)


@dataclass(frozen=True)
class CacheRef:
    """Which cache to read, and what its files must say of themselves.

    Attributes:
        root: Directory of the sidecars, a path or fsspec URL. Beside them lies `cache.json`, with
            the teacher's logit scale, bias and width.
        teacher: Content key of the teacher (weights, preprocessing and precision).
        crop: How its crops were drawn.
        views: Crops per sample; 0 for the evaluation crop alone.
        captions: Captions per sample.
    """

    root: str
    teacher: str
    crop: Crop
    views: int
    captions: int = 1

    @property
    def marker(self) -> str:
        """The file that says the cache is whole; without it the embed stage runs again."""
        return f"{self.root.rpartition('/')[0]}/DONE"

    @property
    def remedy(self) -> str:
        """What to do about a bad file."""
        return f"Remove it and {self.marker}, and run again: only missing files are computed."

    def parts(self) -> list[str]:
        """Names what every shard has: one file per view, and the text."""
        if self.views == 0:
            return [EVAL]
        return [view_name(view) for view in range(self.views)] + [TEXT]

    def path(self, part: str, entry: ShardEntry) -> str:
        """Returns where a shard's file of one part lies."""
        return "/".join((self.root, part, sidecar_name(entry)))

    def metadata(self, part: str, entry: ShardEntry) -> dict[str, Any]:
        """Returns what the file must say."""
        return {
            "teacher": self.teacher,
            "crop": json.loads(json.dumps(asdict(self.crop))),
            "part": part,
            "shard_sha256": entry.sha256,
            "keys_digest": entry.keys_digest,
            "num_samples": entry.num_samples,
            "captions": self.captions if part == TEXT else 0,
        }


def view_name(view: int) -> str:
    """Names the directory of a view."""
    return f"view-{view:03d}"


def sidecar_name(entry: ShardEntry) -> str:
    """Names a shard's files by its content, so that a moved shard keeps them."""
    return f"{entry.sha256[:24]}.parquet"


def read_summary(ref: CacheRef) -> dict[str, Any]:
    """Reads what a cache says of itself as a whole.

    Raises:
        CacheMissing: The embed stage never finished.
        CacheMismatch: It was made by another teacher.
        CacheCorrupt: It is damaged.
    """
    path = f"{ref.root}/{SUMMARY}"
    data = _read(path, "the summary", ref)
    try:
        summary = json.loads(data)
        teacher, _ = summary["teacher"], float(summary["logit_scale"])
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, error, ref) from error
    if teacher != ref.teacher:
        raise CacheMismatch(f"{path} was made for another teacher: {teacher}, not {ref.teacher}")
    return summary


def encode_sidecar(keys: Sequence[str], values: Values, metadata: dict[str, Any]) -> bytes:
    """Encodes one file.

    Args:
        keys: The usable samples' keys, in the shard's order.
        values: (S, D) float16 of a view, (S, V, D) of the text, or (S, D) float32 of `eval`.
        metadata: See `CacheRef.metadata`.
    """
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    column = pa.FixedSizeListArray.from_arrays(flat, int(np.prod(values.shape[1:])))
    table = pa.table({"key": pa.array(keys, pa.string()), "embedding": column})
    described = metadata | {"shape": list(values.shape[1:]), "digest": _digest(keys, values)}
    table = table.replace_schema_metadata({_METADATA: json.dumps(described).encode()})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="none", use_dictionary=False)  # vectors are noise
    return buffer.getvalue()


def read_sidecar(ref: CacheRef, part: str, entry: ShardEntry) -> tuple[list[str], Values]:
    """Reads one file and checks that it is the one that is meant.

    Returns:
        The keys, and the values as `encode_sidecar` was given them.

    Raises:
        CacheMissing: There is no such file.
        CacheMismatch: It belongs to another teacher, crop, shard or part.
        CacheCorrupt: It is damaged.
    """
    path = ref.path(part, entry)
    data = _read(path, part, ref)
    try:
        found, keys, values = _decode(data)
    except _UNREADABLE as error:
        raise _damaged(path, error, ref) from error
    _check(path, found, ref.metadata(part, entry), ref.remedy)
    if len(keys) != entry.num_samples:
        raise CacheCorrupt(f"{path} holds {len(keys)} samples instead of {entry.num_samples}")
    if not np.isfinite(values).all():
        raise CacheCorrupt(f"{path} holds embeddings that are not finite numbers")
    return keys, values


def _decode(data: bytes) -> tuple[dict[str, Any], list[str], Values]:
    """Takes a file apart: what it says of itself, keys, values; raises any of `_UNREADABLE`."""
    table = pq.read_table(io.BytesIO(data))
    found = json.loads((table.schema.metadata or {})[_METADATA])
    keys = table.column("key").to_pylist()
    flat = table.column("embedding").combine_chunks().flatten().to_numpy(zero_copy_only=False)
    values = flat.reshape(len(keys), *found["shape"])
    if found["digest"] != _digest(keys, values):
        raise ValueError("its contents do not fit their digest")
    return found, keys, values


def _damaged(path: str, error: Exception, ref: CacheRef) -> CacheCorrupt:
    """Words the error for a file that cannot be read as what it should be."""
    return CacheCorrupt(f"{path} is damaged ({str(error).partition(chr(10))[0]}). {ref.remedy}")


def _digest(keys: Sequence[str], values: Values) -> str:
    """Hashes what a file holds."""
    digest = hashlib.blake2b("\0".join(keys).encode("utf-8", "surrogatepass"), digest_size=16)
    digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()


def _read(path: str, part: str, ref: CacheRef) -> bytes:
    """Reads a file whole."""
    fs, inner = fsspec.core.url_to_fs(path)
    try:
        return fs.cat_file(inner)
    except FileNotFoundError as error:
        raise CacheMissing(
            f"the teacher cache has no {path}: {part} of this shard was never embedded, or was "
            f"removed (the cache should have {ref.views} views). Remove {ref.marker} and run the "
            "sweep again to fill it in."
        ) from error


def _check(path: str, found: dict[str, Any], expected: dict[str, Any], remedy: str) -> None:
    """Compares metadata field by field."""
    words = {
        "teacher": "another teacher",
        "crop": "other crops",
        "part": "another view",
        "shard_sha256": "another version of the shard",
        "keys_digest": "other samples",
        "captions": "another number of captions",
    }
    for name, value in expected.items():
        if found.get(name) != value:
            raise CacheMismatch(
                f"{path} was made for {words.get(name, 'something else')}: its {name} is "
                f"{found.get(name)!r} and should be {value!r}. {remedy}"
            )


def check_keys(path: str, found: Sequence[str], expected: Sequence[str]) -> None:
    """Raises CacheMismatch where a file's samples are not the shard's."""
    for place, (one, other) in enumerate(zip(found, expected, strict=True)):
        if one != other:
            raise CacheMismatch(
                f"{path} has sample {one!r} at place {place} where the shard has {other!r}"
            )
