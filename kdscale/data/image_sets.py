"""Images wherever they lie: folders, WebDataset tars, Parquet; each content counts once.

A survey reads every byte once and decodes nothing. Which images are taken then depends on their
contents alone, not on their order, their names or how they are cut into files.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import fsspec

from kdscale.core.types import BadManifest, DataError, NoShards
from kdscale.data.pictures import list_files
from kdscale.data.raw import expand, read_tar

FILES_PER_SHARD = 512
PARQUET_ROWS = 64
_BINARY_NAMES = ("jpg", "jpeg", "png", "webp", "img", "picture")
Progress = Callable[[str, int, int | None], None]


class NoImages(DataError):
    """Files in which there is no image."""


class TooFewImages(DataError):
    """Fewer distinct images than a measure needs."""


@dataclass(frozen=True)
class ImageShard:
    """One file that holds images, or some files of a folder.

    Attributes:
        path: The tar or Parquet file, or the folder.
        files: Of a folder: paths within it.
        digests: SHA-256 of each image in reading order; empty where there is none to read.
    """

    path: str
    files: tuple[str, ...] = ()
    digests: tuple[str, ...] = ()


@dataclass(frozen=True)
class ImageSet:
    """What a survey found.

    Attributes:
        shards: All of them, in order.
        faults: (cause, number) of what gave no bytes of an image.
    """

    shards: tuple[ImageShard, ...]
    faults: tuple[tuple[str, int], ...] = ()

    @cached_property
    def _places(self) -> dict[str, tuple[int, int]]:
        """Where each content lies first: {digest: (shard, index)}."""
        places: dict[str, tuple[int, int]] = {}
        for number, shard in enumerate(self.shards):
            for index, digest in enumerate(shard.digests):
                if digest:
                    places.setdefault(digest, (number, index))
        return places

    @property
    def num_images(self) -> int:
        """Distinct images."""
        return len(self._places)

    @property
    def num_duplicates(self) -> int:
        """Images that repeat the content of an earlier one."""
        return sum(bool(d) for shard in self.shards for d in shard.digests) - self.num_images

    @cached_property
    def hash(self) -> str:
        """Names the set of contents, whatever their order and place."""
        return set_hash(self._places)

    def chosen(self, n: int | None = None) -> list[list[int]]:
        """Chooses images: all distinct ones, or the `n` whose hashes are smallest.

        A hash is as good as a random draw, and the same images are drawn from any arrangement.

        Returns:
            For each shard the indexes of its images that were chosen, ascending.
        """
        digests = self._places if n is None else heapq.nsmallest(n, self._places)
        found: list[list[int]] = [[] for _ in self.shards]
        for digest in digests:
            number, index = self._places[digest]
            found[number].append(index)
        return [sorted(indexes) for indexes in found]

    def to_json(self) -> str:
        """Writes the survey down."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ImageSet:
        """Reads a survey.

        Raises:
            BadManifest: It is none.
        """
        try:
            value = json.loads(text)
            shards = tuple(
                ImageShard(s["path"], tuple(s["files"]), tuple(s["digests"]))
                for s in value["shards"]
            )
            return cls(shards, tuple((str(cause), int(num)) for cause, num in value["faults"]))
        except (ValueError, KeyError, TypeError) as error:
            raise BadManifest(f"no survey of images: {error!r}") from error


def set_hash(digests: Iterable[str]) -> str:
    """Names a set of distinct images by the SHA-256 of each, whatever their order."""
    return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()


def survey(where: str, progress: Progress = lambda *_: None) -> ImageSet:
    """Finds images and hashes them.

    Args:
        where: A folder of image files (and folders below it), a folder, glob or brace pattern of
            tars or Parquet files, or one such file; local or remote.
        progress: Told (file, number done, number in all).

    Raises:
        NoShards: Nothing is there.
        NoImages: What is there holds no image.
        DataError: A shard cannot be read as what its name says.
    """
    faults: Counter[str] = Counter()
    shards: list[ImageShard] = []
    found = _shards(where)
    for done, shard in enumerate(found):
        progress(os.path.basename(shard.path), done, len(found))
        digests: list[str] = []
        for data, cause in _contents(shard):
            digests.append(hashlib.sha256(data).hexdigest() if data else "")
            if not data:
                faults[cause] += 1
        shards.append(ImageShard(shard.path, shard.files, tuple(digests)))
    images = ImageSet(tuple(shards), tuple(sorted(faults.items())))
    if not images.num_images:
        causes = ", ".join(f"{cause} {number}" for cause, number in images.faults)
        raise NoImages(
            f"{where}: {len(found)} shard(s) and no image ({causes or 'empty'}); give a folder of "
            "image files, tars, or Parquet with a column of encoded images"
        )
    return images


def read_images(shard: ImageShard, wanted: list[int]) -> Iterator[tuple[int, bytes]]:
    """Streams the wanted images of a surveyed shard: (index, encoded image).

    Args:
        shard: From a survey.
        wanted: Indexes, ascending.

    Raises:
        DataError: An image has other bytes than when it was surveyed.
    """
    left = iter(wanted)
    index = next(left, None)
    for place, (data, _) in enumerate(_contents(shard)):
        if index is None:
            return
        if place == index:
            if hashlib.sha256(data).hexdigest() != shard.digests[index]:
                break
            yield index, data
            index = next(left, None)
    if index is not None:
        raise DataError(f"{shard.path} changed while it was read; start again")


def _shards(where: str) -> list[ImageShard]:
    """Lists files of images, and the images of a folder in groups."""
    folder = Path(where).expanduser()
    if not folder.is_dir() or any(p.suffix in (".tar", ".parquet") for p in folder.iterdir()):
        return [ImageShard(path) for path in expand(where)]
    root = str(folder.resolve())
    files = [file for file in list_files(root, "") if not os.path.basename(file).startswith(".")]
    if not files:
        raise NoShards(f"no images, tars or Parquet files in {root}")
    starts = range(0, len(files), FILES_PER_SHARD)
    return [ImageShard(root, tuple(files[i : i + FILES_PER_SHARD])) for i in starts]


def _contents(shard: ImageShard) -> Iterator[tuple[bytes, str]]:
    """Yields a shard's images: (bytes, what it means if there are none)."""
    if shard.files:
        for file in shard.files:
            try:
                yield Path(shard.path, file).read_bytes(), "empty_file"
            except OSError:
                yield b"", "unreadable_file"
        return
    fs, path = fsspec.core.url_to_fs(shard.path)
    if path.endswith(".parquet"):
        yield from _parquet(path, fs)
    elif path.endswith(".tar"):
        for sample in read_tar(path, fs):
            yield (b"", "truncated_tar") if sample.cut else (sample.jpg or b"", "no_image")
    else:
        raise DataError(f"{path} is neither a folder nor a .tar or .parquet file")


def _parquet(path: str, fs: Any) -> Iterator[tuple[bytes, str]]:
    """Yields the images of a Parquet file, row by row, of all columns that hold images.

    Those are structs with a field `bytes` (as Hugging Face's data sets have them), lists of such,
    and binary columns with a picture's name.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with fs.open(path, "rb") as file:
            table = pq.ParquetFile(file)
            columns = [f.name for f in table.schema_arrow if _holds_images(f.name, f.type)]
            if not columns:
                names = ", ".join(table.schema_arrow.names)
                raise NoImages(f"{path} has no column of encoded images; it has {names}")
            for rows in table.iter_batches(batch_size=PARQUET_ROWS, columns=columns):
                for row in rows.to_pylist():
                    found = [data for name in columns for data in _cells(row[name])]
                    yield from ((data, "no_image") for data in found or [b""])
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}; fetch it again") from error


def _holds_images(name: str, kind: Any) -> bool:
    """Tells whether a column's type, and for plain bytes its name, is that of images."""
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind):
        return _holds_images(name, kind.value_type)
    kind = getattr(kind, "storage_type", kind)
    if types.is_struct(kind):
        return any(field.name == "bytes" for field in kind)
    named = name.lower() in _BINARY_NAMES or "image" in name.lower()
    return named and (types.is_binary(kind) or types.is_large_binary(kind))


def _cells(cell: Any) -> list[bytes]:
    """Returns the images of one cell, none where it is empty."""
    if isinstance(cell, list):
        return [data for item in cell for data in _cells(item)]
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    return [data] if data else []
