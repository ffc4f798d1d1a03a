"""Reading shards: WebDataset tars and Parquet files as streams of raw samples.

Works on anything that fsspec opens. What is read here is not judged: see `kdscale.data.shards`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any

import fsspec

from kdscale.core.types import DataError, NoShards, refuse_secret

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
_MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)")
_BRACES = re.compile(r"\{([^{}]*)\}")
_BLOCK = 512
_READ_BYTES = 1 << 22


@dataclass(slots=True)
class RawSample:
    """What a shard holds under one key, before anything is judged.

    Attributes:
        index: Place among all samples of the shard, good or bad.
        cut: The shard ends inside this sample.
        cls: A label's text, as evaluation sets carry it.
    """

    index: int
    key: str
    jpg: bytes | None = None
    txt: bytes | None = None
    json: bytes | None = None
    cut: bool = False
    cls: bytes | None = None

    @property
    def caption(self) -> str:
        """The caption, without surrounding blanks."""
        return (self.txt or b"").decode("utf-8").strip()

    def captions(self, count: int) -> list[str]:
        """Returns the caption, then those that the metadata's `captions` list, over and over.

        Args:
            count: How many to return.
        """
        listed = self.meta.get("captions") if count > 1 else None
        extra = listed if isinstance(listed, list) else []
        known = [self.caption]
        known += [text.strip() for text in extra if isinstance(text, str) and text.strip()]
        return [known[place % len(known)] for place in range(count)]

    @property
    def meta(self) -> dict[str, Any]:
        """The metadata; empty where the shard has none.

        Raises:
            ValueError: Not a JSON object, or nested too deeply to be read.
        """
        try:
            value = json.loads(self.json) if self.json else {}
        except RecursionError as error:
            raise ValueError("metadata is nested too deeply") from error
        if not isinstance(value, dict):
            raise ValueError(f"metadata is a {type(value).__name__}, not an object")
        return value


def expand(urls: str) -> list[str]:
    """Lists the shards that a brace pattern, glob, directory or single URL names.

    Ranges keep their order and zero padding; globs and directories are sorted.

    Raises:
        NoShards: Nothing matches, or a part of the pattern does not.
        SecretInUrl: The URL holds a password, which manifests would keep.
    """
    refuse_secret("the pattern of the shards", urls)
    found: list[str] = []
    missing: list[str] = []
    listed: dict[str, set[str]] = {}
    for pattern in _braces(urls):
        fs, path = fsspec.core.url_to_fs(pattern)
        if any(sign in path for sign in "*?["):
            hits = sorted(str(hit) for hit in fs.glob(path))
        elif PurePosixPath(path).suffix in (".tar", ".parquet"):
            hits = [path] if path in _listing(fs, path.rpartition("/")[0], listed) else []
        else:
            names = _listing(fs, path.rstrip("/"), listed)
            hits = sorted(name for name in names if name.endswith((".tar", ".parquet")))
        if not hits:
            missing.append(path)
        found += hits if _is_local(fs) else [fs.unstrip_protocol(hit) for hit in hits]
    if missing or not found:
        seen = f"; {len(found)} others exist" if found else ""
        raise NoShards(
            f"no shards for {urls!r}: looked at {', '.join(missing[:3])}"
            f"{' and more' if len(missing) > 3 else ''} and found nothing{seen}"
        )
    return found


def _braces(pattern: str) -> list[str]:
    """Expands {00..07} and {a,b}, leftmost outermost."""
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    low, dots, high = match[1].partition("..")
    if dots and low.isdigit() and high.isdigit():
        width = len(low) if low.startswith("0") else 0
        options = [f"{number:0{width}d}" for number in range(int(low), int(high) + 1)]
    else:
        options = match[1].split(",")
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [rest for option in options for rest in _braces(head + option + tail)]


def _is_local(fs: Any) -> bool:
    """Says whether a file system is this machine's disk."""
    return "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


def _listing(fs: Any, folder: str, listed: dict[str, set[str]]) -> set[str]:
    """Lists a folder once; thousands of existence checks are slow on an object store."""
    if folder not in listed:
        try:
            listed[folder] = {str(name) for name in fs.ls(folder, detail=False)}
        except (FileNotFoundError, NotADirectoryError):
            listed[folder] = set()
    return listed[folder]


def read_tar(path: str, fs: Any, hasher: Any = None) -> Iterator[RawSample]:
    """Streams the samples of a WebDataset tar; nothing is ever extracted to disk.

    Neighbouring members that share everything up to the first dot of their base name make one
    sample. A tar that ends too early gives what came before, then a sample marked `cut`.

    Args:
        hasher: Is fed every byte of the file, where given.
    """
    sample: RawSample | None = None
    index = 0
    with fs.open(path, "rb", **_opening(fs)) as file:
        for name, data in _members(file, hasher):
            match = _MEMBER.fullmatch(name) if name else None
            if match is None:
                if data is None:
                    if sample is not None and sample.jpg and (sample.txt or sample.json):
                        yield sample
                        index, sample = index + 1, None
                    sample = sample or RawSample(index, "")
                    sample.cut = True
                continue
            slot = _slot(match[2].lower())
            if sample is not None and (
                sample.key != match[1] or (slot and getattr(sample, slot) is not None)
            ):
                yield sample
                index, sample = index + 1, None
            sample = sample or RawSample(index, match[1])
            if data is None:
                sample.cut = True
            elif slot:
                setattr(sample, slot, data)
    if sample is not None:
        yield sample


def _slot(suffix: str) -> str | None:
    """Says which part of a sample a suffix holds."""
    return (
        "jpg" if suffix in IMAGE_SUFFIXES else suffix if suffix in ("txt", "json", "cls") else None
    )


def _opening(fs: Any) -> dict[str, Any]:
    """Chooses read-ahead for remote files, which are read once from front to back."""
    return {} if _is_local(fs) else {"block_size": 8 << 20, "cache_type": "readahead"}


def _members(file: IO[bytes], hasher: Any) -> Iterator[tuple[str, bytes | None]]:
    """Yields (name, contents) of a tar's regular files; contents are None at a premature end.

    Headers are parsed here because `tarfile` costs a fifth of the time of decoding the images,
    and takes a file that ends between two members for a whole one.
    """
    name_override = ""
    while True:
        header = _take(file, _BLOCK, hasher)
        if len(header) == _BLOCK and not any(header):
            while hasher is not None and _take(file, _READ_BYTES, hasher):
                pass
            return
        size = _size(header) if len(header) == _BLOCK else -1
        if size < 0:
            yield "", None
            return
        kind = header[156:157]
        name = name_override or _name(header)
        data = _take(file, size, hasher)
        padding = -size % _BLOCK
        if len(data) < size or len(_take(file, padding, hasher)) < padding:
            yield name if kind in (b"0", b"\0") else "", None
            return
        if kind == b"L":
            name_override = _text(data)
        elif kind == b"x":
            name_override = _pax_path(data) or name_override
        else:
            name_override = ""
            if kind in (b"0", b"\0"):
                yield name, data


def _take(file: IO[bytes], size: int, hasher: Any) -> bytes:
    """Reads up to size bytes, fewer only at the end of the file."""
    parts: list[bytes] = []
    while size > 0 and (part := file.read(min(size, _READ_BYTES))):
        parts.append(part)
        size -= len(part)
        if hasher is not None:
            hasher.update(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _size(header: bytes) -> int:
    """Reads a header's size field; -1 where the header is not one."""
    total = sum(header) - sum(header[148:156]) + 8 * 32
    raw = header[124:136]
    try:
        if int(_text(header[148:156]).strip() or "0", 8) != total:
            return -1
        return int.from_bytes(raw[1:], "big") if raw[0] & 128 else int(_text(raw).strip() or "0", 8)
    except ValueError:
        return -1


def _name(header: bytes) -> str:
    """Joins a header's name with its ustar prefix."""
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{_text(header[:100])}" if prefix else _text(header[:100])


def _text(field_bytes: bytes) -> str:
    """Decodes a NUL-terminated field."""
    return field_bytes.partition(b"\0")[0].decode("utf-8", "backslashreplace")


def _pax_path(data: bytes) -> str:
    """Finds the path record of a pax header."""
    match = re.search(rb"(?:^|\n)\d+ path=([^\n]*)\n", data)
    return match[1].decode("utf-8", "backslashreplace") if match else ""


def read_parquet(path: str, fs: Any) -> Iterator[RawSample]:
    """Streams the samples of a Parquet shard.

    Columns: `jpg` or `image` (bytes, or a struct with `bytes`), `txt` or `caption`, and where
    present `json` and `key`. Without keys, the hash of image and caption is the key.

    Raises:
        DataError: Not a whole Parquet file, no image column, or columns of other types.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with fs.open(path, "rb") as file:
            table = pq.ParquetFile(file)
            image, text, wanted = _columns(path, table.schema_arrow)
            index = 0
            for chunk in table.iter_batches(batch_size=256, columns=wanted):
                columns = {name: chunk.column(name) for name in wanted}
                for row in range(chunk.num_rows):
                    cells = {name: column[row].as_py() for name, column in columns.items()}
                    yield _parquet_sample(index, cells, image, text)
                    index += 1
    except (FileNotFoundError, IsADirectoryError):
        raise
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path} cannot be read as Parquet: {error}. Fetch or write it again, or leave it "
            "out of the pattern."
        ) from error


def _columns(path: str, schema: Any) -> tuple[str, str | None, list[str]]:
    """Chooses the columns to read and checks that they hold what their names say.

    Returns:
        The image's, the caption's where there is one, and all that are to be read.
    """
    names = schema.names
    image = next((name for name in ("jpg", "image") if name in names), None)
    if image is None:
        raise DataError(
            f"{path} has no column jpg or image; it has {', '.join(names)}. Rename the column of "
            "the encoded images."
        )
    text = next((name for name in ("txt", "caption") if name in names), None)
    for name in (image, text, "json"):
        if name in names and not _fits(schema.field(name).type, is_image=name == image):
            wanted = "encoded images as bytes, alone or in a struct" if name == image else "text"
            raise DataError(
                f"column {name} of {path} holds {schema.field(name).type}, not {wanted}. Write "
                "the shard again with that column converted, or leave it out of the pattern."
            )
    return image, text, [n for n in (image, text, "json", "key") if n is not None and n in names]


def _fits(kind: Any, *, is_image: bool) -> bool:
    """Tells whether a column's type can stand for a file: bytes, or text where it is no image."""
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    kind = getattr(kind, "storage_type", kind)
    if is_image and types.is_struct(kind):
        return any(field.name == "bytes" and _fits(field.type, is_image=True) for field in kind)
    tests = [types.is_binary, types.is_large_binary, types.is_binary_view, types.is_null]
    if not is_image:
        tests += [types.is_string, types.is_large_string, types.is_string_view]
    return any(test(kind) for test in tests)


def _parquet_sample(index: int, cells: dict[str, Any], image: str, text: str | None) -> RawSample:
    """Makes a sample of a Parquet row."""
    picture = cells[image]
    jpg = picture.get("bytes") if isinstance(picture, dict) else picture
    txt = _utf8(cells.get(text)) if text else None
    key = cells.get("key")
    if key is None:
        content = (jpg or b"") + b"\0" + (txt or b"")
        key = hashlib.blake2b(content, digest_size=12).hexdigest()
    return RawSample(index, str(key), jpg, txt, _utf8(cells.get("json")))


def _utf8(cell: Any) -> bytes | None:
    """Encodes a Parquet cell as the tar member that it stands for."""
    return cell.encode() if isinstance(cell, str) else cell


def read_shard(path: str, fs: Any, hasher: Any = None) -> Iterator[RawSample]:
    """Streams a shard of either format; `hasher` is fed the whole file first or alongside.

    Raises:
        DataError: Neither format, a directory, or a file that cannot be read as its name says.
    """
    if not path.endswith((".tar", ".parquet")):
        raise DataError(f"{path} is neither a .tar nor a .parquet shard")
    try:
        if path.endswith(".tar"):
            yield from read_tar(path, fs, hasher)
            return
        if hasher is not None:
            with fs.open(path, "rb", **_opening(fs)) as file:
                while _take(file, _READ_BYTES, hasher):
                    pass
        yield from read_parquet(path, fs)
    except IsADirectoryError as error:
        raise DataError(
            f"{path} is a directory, not a shard: rename it or leave it out of the pattern"
        ) from error
