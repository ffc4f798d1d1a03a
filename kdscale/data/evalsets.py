"""Evaluation image sets: tars, Parquet files or folders of pictures, in pieces to be read alone.

A piece is read by any process, in any order; together they are the set. Nothing is judged here
but what has no label, no caption or no image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

import fsspec

from kdscale.core.types import DataError, NoShards, TooManyBadSamples
from kdscale.data.captionsets import ANNOTATIONS, read_captions
from kdscale.data.evalparquet import read_rows
from kdscale.data.labels import Labels, UnknownLabel
from kdscale.data.raw import IMAGE_SUFFIXES, expand, read_tar

FILES_PER_SHARD = 1000
_READ_BYTES = 1 << 22


class EmptyEvalSet(DataError):
    """A place without a single image to evaluate."""


@dataclass(frozen=True)
class EvalFile:
    """A picture of a folder; an empty path is one that the annotations name and is not there."""

    key: str
    path: str
    label: int = -1
    captions: tuple[str, ...] = ()


@dataclass(frozen=True)
class EvalShard:
    """A piece of a set.

    Attributes:
        path: The tar or Parquet file; empty for `files`.
        files: Pictures, for `files` alone.
    """

    format: Literal["tar", "parquet", "files"]
    path: str = ""
    files: tuple[EvalFile, ...] = ()


@dataclass(frozen=True)
class EvalItem:
    """An encoded image and what is known of it.

    Attributes:
        image: Its bytes, None where there are none.
        label: Place in the list of classes, -1 for a set of captions.
    """

    key: str
    image: bytes | None
    label: int = -1
    captions: tuple[str, ...] = ()


def find_eval_shards(urls: str, labels: Labels | None, split: str = "test") -> list[EvalShard]:
    """Finds a set and divides it into pieces, in an order that listing does not change.

    Args:
        urls: Glob or brace pattern of tars or Parquet files, a folder of them, a folder of class
            folders (named by WordNet id, label number or class name), or for captions a file
            of annotations beside or above its images, or the folder with both.
        labels: What labels mean; None for a set of captions.
        split: Of the annotations.

    Raises:
        NoShards: Nothing is there.
        EmptyEvalSet: There is, but no image.
        UnknownLabel: A folder that stands for no class.
        DataError: Tars and Parquet files together, or annotations that cannot be read.
    """
    fs, root = fsspec.core.url_to_fs(urls)
    is_folder = not any(sign in urls for sign in "*?[{") and fs.isdir(root)
    if labels is None and not is_folder and root.endswith(ANNOTATIONS):
        return _captioned(fs, root.rpartition("/")[0], root, split)
    held = _names(fs, root) if is_folder else []
    if is_folder and not any(name.endswith((".tar", ".parquet")) for name in held):
        if labels is not None:
            return _class_folders(fs, root, labels)
        return _captioned(fs, root, _annotations(root, held), split)
    paths = expand(urls)
    formats = {PurePosixPath(path).suffix[1:] for path in paths}
    if len(formats) > 1:
        raise DataError(f"{urls} holds tars and Parquet files; point at one of the two")
    return [EvalShard("tar" if path.endswith(".tar") else "parquet", path) for path in paths]


def _names(fs: Any, folder: str) -> list[str]:
    """Lists the base names in a folder, without hidden ones."""
    found = [str(path).rstrip("/").rpartition("/")[2] for path in fs.ls(folder, detail=False)]
    return sorted(name for name in found if not name.startswith("."))


def _pictures(fs: Any, root: str) -> list[str]:
    """Lists the pictures below a folder, relative to it, sorted."""
    start = len(root.rstrip("/")) + 1
    found = (str(path)[start:] for path in fs.find(root))
    return sorted(path for path in found if _is_picture(path))


def _is_picture(path: str) -> bool:
    """Tells a picture by its name; hidden files are none."""
    hidden = any(part.startswith(".") for part in path.split("/"))
    return not hidden and PurePosixPath(path).suffix.lower().lstrip(".") in IMAGE_SUFFIXES


def _class_folders(fs: Any, root: str, labels: Labels) -> list[EvalShard]:
    """Divides class folders into pieces; a folder's name is the label."""
    pictures = _pictures(fs, root)
    loose = [path for path in pictures if "/" not in path]
    if loose:
        raise UnknownLabel(
            f"{labels.name}: {len(loose)} pictures lie in {root} itself, first {loose[0]}; sort "
            "them into folders named by their class's WordNet id or label"
        )
    if not pictures:
        raise EmptyEvalSet(
            f"{labels.name}: no tar, Parquet file or picture below {root}; found "
            f"{', '.join(_names(fs, root)[:6]) or 'nothing'}"
        )
    folders = sorted({path.partition("/")[0] for path in pictures})
    label_of = {folder: labels.of(folder, f"folder {root}/{folder}") for folder in folders}
    base = fs.unstrip_protocol(root).rstrip("/")
    return _divided(
        EvalFile(path, f"{base}/{path}", label_of[path.partition("/")[0]]) for path in pictures
    )


def _divided(files: Iterable[EvalFile]) -> list[EvalShard]:
    """Makes pieces of pictures."""
    every = tuple(files)
    starts = range(0, len(every), FILES_PER_SHARD)
    return [EvalShard("files", files=every[start : start + FILES_PER_SHARD]) for start in starts]


def _annotations(root: str, names: Sequence[str]) -> str:
    """Finds the one file of captions in a folder."""
    found = [name for name in names if name.endswith(ANNOTATIONS)]
    if len(found) != 1:
        what = f"several: {', '.join(found)}" if found else "none"
        raise NoShards(
            f"{root} should hold tars, Parquet files, or one file of captions "
            f"({', '.join(ANNOTATIONS)}), and holds {what}; name the file itself"
        )
    return f"{root}/{found[0]}"


def _captioned(fs: Any, root: str, annotations: str, split: str) -> list[EvalShard]:
    """Joins a file of captions with the pictures below a folder, by path, else by base name."""
    rows = read_captions(fs.unstrip_protocol(annotations), split)
    pictures = _pictures(fs, root)
    if not rows or not pictures:
        raise EmptyEvalSet(f"{annotations} lists {len(rows)} images; {len(pictures)} are below it")
    by_name: dict[str, str] = {}
    for path in pictures:
        name = path.rpartition("/")[2]
        by_name[name] = "" if name in by_name else path
    known = set(pictures)
    base = fs.unstrip_protocol(root).rstrip("/")

    def place(image: str) -> str:
        """Returns where an image is, nothing where it is missing."""
        path = image if image in known else by_name.get(image.rpartition("/")[2], "")
        return path and f"{base}/{path}"

    return _divided(EvalFile(image, place(image), captions=texts) for image, texts in rows)


def read_items(shard: EvalShard, labels: Labels | None, split: str = "test") -> Iterator[EvalItem]:
    """Reads a piece, in its own order.

    Args:
        shard: From `find_eval_shards`.
        labels: As there.
        split: Of a Parquet file with a column of that name.

    Raises:
        UnknownLabel: A sample without one of the labels.
        DataError: A tar that ends early, or Parquet without the columns.
    """
    if shard.format == "files":
        for file in shard.files:
            yield EvalItem(file.key, _bytes_of(file.path), file.label, file.captions)
    elif shard.format == "parquet":
        for key, image, label, captions in read_rows(shard.path, labels is not None, split):
            place = -1 if labels is None else labels.of(label, f"row {key} of {shard.path}")
            yield EvalItem(key, image, place, captions)
    else:
        yield from _tar_items(shard.path, labels)


def num_items(shard: EvalShard, labels: Labels | None, split: str = "test") -> int:
    """Counts a piece's images, readable or not; arguments and errors as of `read_items`."""
    if shard.format == "files":
        return len(shard.files)
    return sum(1 for _ in read_items(shard, labels, split))


def _bytes_of(path: str) -> bytes | None:
    """Reads a picture; None where it is not there."""
    if not path:
        return None
    fs, plain = fsspec.core.url_to_fs(path)
    try:
        return fs.cat_file(plain)
    except OSError:
        return None


def _tar_items(path: str, labels: Labels | None) -> Iterator[EvalItem]:
    """Reads a tar of `.jpg` with `.cls` or `.json`, or with one caption a line in `.txt`."""
    fs, plain = fsspec.core.url_to_fs(path)
    for sample in read_tar(plain, fs):
        where = f"{sample.key!r} of {path}"
        if sample.cut:
            raise DataError(f"{path} ends inside {sample.key!r}; fetch it again")
        try:
            meta = sample.meta
            text = (sample.cls or b"").decode().strip()
            captions = [line.strip() for line in (sample.txt or b"").decode().splitlines()]
        except ValueError as error:
            raise DataError(f"{where} cannot be read: {error}") from error
        if labels is None:
            listed = meta.get("captions", ())
            captions += [line for line in listed if isinstance(line, str)]
            kept = tuple(dict.fromkeys(filter(None, captions)))
            yield EvalItem(sample.key, sample.jpg, captions=kept)
            continue
        label = text or meta.get("label", meta.get("cls", meta.get("wnid")))
        yield EvalItem(sample.key, sample.jpg, labels.of(label, where))


def check_readable(causes: dict[str, int], total: int, allowed: float, name: str) -> None:
    """Refuses a set of which too much cannot be read.

    Args:
        causes: Unreadable images by cause.
        total: All images, readable or not.
        allowed: Largest share in [0, 1].
        name: Of the set.

    Raises:
        EmptyEvalSet: There was no image at all.
        TooManyBadSamples: More than that share, or every image.
    """
    if total == 0:
        raise EmptyEvalSet(f"{name}: its files hold no image; check the split and the pattern")
    bad = sum(causes.values())
    if bad > allowed * total or bad == total:
        listed = ", ".join(f"{count} {cause}" for cause, count in sorted(causes.items()))
        raise TooManyBadSamples(
            f"{name}: {bad} of {total} images cannot be read ({listed}), {allowed:.2%} are "
            "allowed; fetch them again, or raise max_bad_fraction: they are left out of the score"
        )


def content_digest(shards: Sequence[EvalShard]) -> str:
    """Hashes everything that a set holds: bytes, labels and captions, in order.

    It reads every byte once and decodes nothing. Paths do not enter, except those of pictures
    relative to their set.
    """
    total = hashlib.blake2b(digest_size=16)
    for shard in shards:
        files = shard.files or (EvalFile("", shard.path),)
        for file in files:
            total.update(repr((shard.format, file.key, file.label, file.captions)).encode())
            if not file.path:
                continue
            fs, plain = fsspec.core.url_to_fs(file.path)
            with fs.open(plain, "rb") as opened:
                one = hashlib.blake2b(digest_size=16)
                while part := opened.read(_READ_BYTES):
                    one.update(part)
                total.update(one.digest())
    return total.hexdigest()
