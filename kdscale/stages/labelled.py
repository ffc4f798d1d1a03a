"""Labelled images in every format that people have them in, as the shards that stages read.

Class folders, `.cls` members, WordNet ids and Parquet columns say in words what a stage reads as an
integer `label` beside each image. Such a set is written once, bytes of the images as they are.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from itertools import count, islice
from typing import Any, cast

import fsspec  # pyright: ignore[reportMissingTypeStubs]

from kdscale.core.storage import Storage
from kdscale.core.types import NoShards
from kdscale.data.evalparquet import LABEL_COLUMNS
from kdscale.data.evalsets import EvalItem, find_eval_shards, read_items
from kdscale.data.labels import Labels
from kdscale.data.raw import RawSample, expand, read_tar
from kdscale.eval.classes import class_set

SAMPLES_PER_SHARD = 500
_LOOKED_AT = 16


def is_folder_of_pictures(urls: str) -> bool:
    """Tells whether a place is a folder without tars and Parquet files."""
    if any(sign in urls for sign in "*?[{"):
        return False
    fs, root = _opened(urls)
    if not fs.isdir(root):
        return False
    names = fs.ls(root, detail=False)
    return not any(str(name).endswith((".tar", ".parquet")) for name in names)


def files_of(urls: str) -> list[str]:
    """Lists the files of shards or of class folders.

    Raises:
        NoShards: There is none.
    """
    if not is_folder_of_pictures(urls):
        return expand(urls)
    fs, root = _opened(urls)
    held = [str(fs.unstrip_protocol(str(path))) for path in sorted(fs.find(root))]
    if not held:
        raise NoShards(f"nothing is in {urls}")
    return held


def is_labelled_in_words(path: str) -> bool:
    """Tells whether a shard has labels of another kind than an integer `label` in its metadata.

    Args:
        path: A tar, of which the first samples tell, or a Parquet file, whose columns do.
    """
    fs, plain = _opened(path)
    if path.endswith(".tar"):
        first = list(islice(read_tar(plain, fs), _LOOKED_AT))
        return not any(_has_number(sample) for sample in first) and any(map(_has_word, first))
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with fs.open(plain, "rb") as file:
            names = pq.read_schema(file).names
    except (pa.ArrowException, OSError):
        return False  # whoever verifies it says what is wrong
    return "json" not in names and any(name in names for name in LABEL_COLUMNS)


def write_labelled(urls: str, name: str, storage: Storage, parts: tuple[str, ...]) -> None:
    """Writes a set's images with their integer labels as tars: the same bytes whenever written.

    Args:
        urls: As of `kdscale.data.evalsets.find_eval_shards`.
        name: Of the set, for messages.
        storage: Receives the tars.
        parts: Folder of the storage.

    Raises:
        UnknownLabel: A label is none of ImageNet's classes; names the sample.
        DataError: As `find_eval_shards` and `read_items`.
    """
    labels = Labels(class_set("imagenet"), "own", name)
    shards = find_eval_shards(urls, labels)
    items = enumerate(item for shard in shards for item in read_items(shard, labels))
    for number in count():
        some = list(islice(items, SAMPLES_PER_SHARD))
        if not some:
            return
        storage.write(_tar(some), *parts, f"{number:05d}.tar")


def _tar(items: Iterable[tuple[int, EvalItem]]) -> bytes:
    """Packs numbered images; one that is not there leaves its label alone."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, item in items:
            for suffix, data in _members(item):
                member = tarfile.TarInfo(f"{number:08d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def _members(item: EvalItem) -> Iterator[tuple[str, bytes]]:
    """Yields what a tar holds of an image."""
    if item.image:
        yield "jpg", item.image
    yield "json", json.dumps({"label": item.label, "source": item.key}).encode()


def _meta(sample: RawSample) -> dict[str, Any]:
    """Reads metadata; empty where they cannot be read."""
    try:
        return sample.meta
    except ValueError:
        return {}


def _has_number(sample: RawSample) -> bool:
    """Tells whether a stage can read a sample's label as it is."""
    return isinstance(_meta(sample).get("label"), int)


def _has_word(sample: RawSample) -> bool:
    """Tells whether a sample has a label of another kind."""
    return sample.cls is not None or bool({"label", "cls", "wnid"} & _meta(sample).keys())


def _opened(urls: str) -> tuple[Any, str]:
    """Returns a place's file system and its path there."""
    return cast("tuple[Any, str]", fsspec.core.url_to_fs(urls))  # pyright: ignore
