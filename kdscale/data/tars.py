"""Writing one WebDataset tar of images on disk: a function of its job, for any process."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2

from kdscale.core.types import StorageError
from kdscale.data.pictures import store
from kdscale.data.samples import BadImage

CONTENT_VERSION = 1


@dataclass(frozen=True)
class Rejection:
    """A row that gave no sample, and why."""

    row: int
    key: str
    image: str
    cause: str


@dataclass(frozen=True, slots=True)
class Item:
    """A sample to be: a caption, and an image that was there when the job was planned.

    A conversation may have neither; it is part of `meta`.

    Attributes:
        row: Place in the captions file, which is the sample's key.
        image: Path within the folder of images.
        num_bytes: Size of that file.
        changed_ns: When it last changed.
        meta: Goes into the sample's `.json`.
    """

    row: int
    image: str
    num_bytes: int
    changed_ns: int
    caption: str
    meta: Mapping[str, Any]

    @property
    def key(self) -> str:
        """Names the sample's files."""
        return key_of(self.row)


def key_of(row: int) -> str:
    """Returns the key of a row: its number in nine digits."""
    return f"{row:09d}"


@dataclass(frozen=True)
class ShardStats:
    """What a finished shard holds.

    Attributes:
        plan: Digest of the job that wrote it.
        num_samples: Zero where every row was rejected; there is no tar then.
        num_kept: Samples whose image kept its bytes.
    """

    plan: str
    num_samples: int
    num_kept: int
    num_bytes: int
    rejected: tuple[Rejection, ...]


@dataclass(frozen=True)
class ShardJob:
    """All that decides the content of one shard.

    Attributes:
        px: Longest that an image's shorter side may be.
        quality: JPEG quality.
        check_urls: A `.json` beside an image, as img2dataset writes, must name the row's URL.
        conversations: Items are conversations; their images may be GIFs.
    """

    number: int
    out: str
    images: str
    px: int
    quality: int
    check_urls: bool
    items: tuple[Item, ...]
    conversations: bool = False

    @property
    def tar(self) -> Path:
        """Where the shard goes."""
        return tar_path(self.out, self.number)

    @property
    def stats(self) -> Path:
        """Where its statistics go."""
        return stats_path(self.out, self.number)

    @cached_property
    def digest(self) -> str:
        """Hash of what decides the shard's bytes."""
        rows = [
            (item.row, item.image, item.num_bytes, item.changed_ns, item.caption, item.meta)
            for item in self.items
        ]
        also = ["conversations"] if self.conversations else []
        text = json.dumps([CONTENT_VERSION, self.px, self.quality, self.check_urls, rows, *also])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def finished(self) -> ShardStats | None:
        """Returns the statistics of the shard where it is already there, written by this job."""
        try:
            value = json.loads(self.stats.read_bytes())
            rejected = tuple(Rejection(**row) for row in value.pop("rejected"))
            stats = ShardStats(rejected=rejected, **value)
            size = self.tar.stat().st_size if stats.num_samples else 0
        except (OSError, AttributeError, KeyError, TypeError, ValueError):
            return None
        return stats if (stats.plan, stats.num_bytes) == (self.digest, size) else None


def tar_path(out: str, number: int) -> Path:
    """Returns the place of a shard."""
    return Path(out, f"{number:05d}.tar")


def stats_path(out: str, number: int) -> Path:
    """Returns the place of a shard's statistics."""
    return Path(out, f"{number:05d}_stats.json")


def write_shard(job: ShardJob) -> ShardStats:
    """Writes a shard under a temporary name, renames it, then writes its statistics.

    Raises:
        StorageError: The folder cannot be written to.
    """
    cv2.setNumThreads(1)
    temporary = job.tar.with_name(f".{job.tar.name}.{os.getpid()}.tmp")
    rejected: list[Rejection] = []
    num_kept = 0
    try:
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            for item in job.items:
                try:
                    members, kept = _members(item, job)
                except BadImage as error:
                    rejected.append(Rejection(item.row, item.key, item.image, error.cause))
                    continue
                num_kept += kept
                for suffix, data in members.items():
                    _add(tar, f"{item.key}.{suffix}", data)
        num_samples = len(job.items) - len(rejected)
        size = temporary.stat().st_size if num_samples else 0
        if num_samples:
            os.replace(temporary, job.tar)
        else:
            job.tar.unlink(missing_ok=True)
        stats = ShardStats(job.digest, num_samples, num_kept, size, tuple(rejected))
        write_whole(job.stats, json.dumps(asdict(stats)))
    except OSError as error:
        raise StorageError(f"cannot write {job.tar}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return stats


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that a reader sees all of it or nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _members(item: Item, job: ShardJob) -> tuple[dict[str, bytes], bool]:
    """Makes a sample's files; says whether the image kept its bytes."""
    record = {**item.meta, "key": item.key, "source": item.image}
    if not item.image:
        return {"json": json.dumps(record).encode()}, False
    path = os.path.join(job.images, item.image)
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise BadImage("missing_image", str(error)) from error
    if job.check_urls and _names_another(path, item):
        raise BadImage("another_url")
    image = store(data, job.px, job.quality, gif=job.conversations)
    record |= {
        "width": image.size[0],
        "height": image.size[1],
        "original_width": image.original_size[0],
        "original_height": image.original_size[1],
    }
    text = {"txt": item.caption.encode()} if item.caption else {}
    return {"jpg": image.jpg, **text, "json": json.dumps(record).encode()}, image.kept


def _names_another(path: str, item: Item) -> bool:
    """Says whether the metadata that a downloader left beside an image are of another URL."""
    try:
        found = json.loads(Path(path).with_suffix(".json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("url", item.meta["url"]) != item.meta["url"]


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Adds a file whose metadata depend on neither time nor user."""
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode, entry.mtime = len(data), 0o644, 0
    tar.addfile(entry, io.BytesIO(data))
