"""Captions files: tables, CC12M's list of links, and the jsons of LLaVA and Bunny.

Every line, good or bad, gives one numbered row; what makes a row unusable is named, not skipped.
Bytes that are not UTF-8 survive as lone surrogates, so that only the row which holds them is lost.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

from kdscale.core.types import ConfigError, DataError, unknown_name
from kdscale.data.faults import conversation_fault, mentions_image, num_words
from kdscale.data.order import permutation
from kdscale.data.templates import rounds

FORMATS = ("auto", "table", "cc12m", "llava", "conversations")
IMAGE_COLUMNS = ("image", "filename", "file", "filepath", "path", "image_path")
CAPTION_COLUMNS = ("caption", "text", "title")
SUFFIXES = (".tsv", ".csv", ".json", ".jsonl")
_QUOTED = re.compile(r'"((?:[^"]|"")*)"', re.DOTALL)
Record = dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a captions file.

    Attributes:
        number: Place among the lines, good or bad, without the header.
        image: Path of the image, or its URL in CC12M's list; empty where a conversation has none.
        meta: What the sample's `.json` keeps.
        cause: What makes the line unusable, None where nothing does.
    """

    number: int
    image: str = ""
    caption: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)
    cause: str | None = None


class Captions:
    """A captions file, to be read as often as one likes.

    Args:
        path: A `.tsv`, `.csv`, `.json` or `.jsonl` file.
        kind: One of `FORMATS`; `auto` looks at the beginning of the file. `llava` takes LLaVA's
            jsons as image-text pairs, `conversations` takes them whole.
        seed: Decides the order of conversations; other rows keep the file's.

    Raises:
        DataError: There is no such file, or it is of no known format.
    """

    def __init__(self, path: str, kind: str = "auto", seed: int = 0) -> None:
        if kind not in FORMATS:
            raise unknown_name("format", kind, FORMATS)
        self.path = Path(path)
        if not self.path.is_file():
            raise DataError(f"there is no captions file {path}")
        self.seed = seed
        self.kind = self._detect() if kind == "auto" else kind

    def __iter__(self) -> Iterator[Row]:
        """Yields every line.

        Raises:
            DataError: The file as a whole is not what its format says.
        """
        if self.kind == "cc12m":
            return self._links()
        if self.kind == "conversations":
            return self._conversations()
        return self._first_answers() if self.kind == "llava" else self._table()

    def _detect(self) -> str:
        """Names the format by the file's suffix and its first lines."""
        if self.path.suffix in (".json", ".jsonl"):
            first = next(iter(self._records()), None)
            return "llava" if first and "conversations" in first else "table"
        if self.path.suffix == ".tsv":
            first_line = next(_lines(self.path), "")
            url, tab, _ = first_line.partition("\t")
            if tab and (url.startswith(("http://", "https://")) or _is_link_header(first_line)):
                return "cc12m"
        return "table"

    def _links(self) -> Iterator[Row]:
        """Reads CC12M's own list: URL, tab, caption, without a header."""
        lines = _lines(self.path)
        first = [line for line in islice(lines, 1) if not _is_link_header(line)]
        for number, line in enumerate(chain(first, lines)):
            url, tab, caption = line.partition("\t")
            cause = caption_fault(caption) if tab else "bad_row"
            yield Row(number, url.strip(), caption.strip(), {"url": url.strip()}, cause)

    def _conversations(self) -> Iterator[Row]:
        """Reads whole conversations in an order drawn once, so that every shard holds all kinds."""
        for number in permutation(len(self._list), "conversations", self.seed).tolist():
            yield _conversation(number, self._list[number])

    def _first_answers(self) -> Iterator[Row]:
        """Reads image-text pairs written as conversations; the first answer is the caption."""
        for number, record in enumerate(self._records()):
            if record is None:
                yield Row(number, cause="bad_row")
                continue
            caption = _first_answer(record.get("conversations"))
            meta = {name: record[name] for name in ("id", "conversations") if name in record}
            yield _judged(number, record.get("image"), caption, meta)

    def _table(self) -> Iterator[Row]:
        """Reads a table with one column for the images and one for the captions."""
        columns: tuple[str, str] | None = None
        for number, record in enumerate(self._records()):
            if record is None:
                yield Row(number, cause="bad_row")
                continue
            columns = columns or self._columns(record)
            meta = {name: cell for name, cell in record.items() if name not in columns}
            label = meta.get("label")
            if isinstance(label, str) and label.isdecimal():
                meta["label"] = int(label)
            yield _judged(number, record.get(columns[0]), record.get(columns[1]), meta)

    def _columns(self, record: dict[str, Any]) -> tuple[str, str]:
        """Finds the names of the image's and the caption's column."""
        known = {name.strip().lower(): name for name in reversed(record)}
        found = [
            next((known[name] for name in names if name in known), None)
            for names in (IMAGE_COLUMNS, CAPTION_COLUMNS)
        ]
        if found[0] is None or found[1] is None:
            raise DataError(
                f"{self.path} has the columns {', '.join(map(repr, record))}; it needs one of "
                f"{', '.join(IMAGE_COLUMNS)} and one of {', '.join(CAPTION_COLUMNS)}"
            )
        return found[0], found[1]

    def _records(self) -> Iterator[Record]:
        """Reads lines as {column: cell}; None stands for a line that cannot be read."""
        suffix = self.path.suffix
        if suffix == ".json":
            yield from self._list
        elif suffix == ".jsonl":
            yield from map(_record, self._full_lines())
        elif suffix in (".tsv", ".csv"):
            cells = self._csv() if suffix == ".csv" else map(_split, self._full_lines())
            header = next(cells, [])
            for row in cells:
                yield dict(zip(header, row, strict=True)) if len(row) == len(header) else None
        else:
            raise ConfigError(
                f"{self.path} is none of {', '.join(SUFFIXES)}: say what it is with --format, or "
                "rename it"
            )

    def _full_lines(self) -> Iterator[str]:
        """Yields the lines that are not blank."""
        return filter(str.strip, _lines(self.path))

    def _csv(self) -> Iterator[list[str]]:
        """Reads the cells of a CSV file, whose quoted cells may span lines."""
        with open(self.path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file)
            try:
                yield from (row for row in reader if row)
            except csv.Error as error:
                raise DataError(
                    f"{self.path}, before line {reader.line_num}: {error}; is a quote left open?"
                ) from error

    @cached_property
    def _list(self) -> list[Record]:
        """The objects of a JSON file, read once; those of other files as well, where needed."""
        if self.path.suffix != ".json":
            return list(self._records())
        text = self.path.read_bytes().decode("utf-8-sig", "surrogateescape")
        try:
            value = json.loads(text)
        except ValueError as error:
            raise DataError(f"{self.path} is not JSON: {error}") from error
        if not isinstance(value, list):
            raise DataError(f"{self.path} holds one {type(value).__name__}, not a list of objects")
        return [item if isinstance(item, dict) else None for item in value]


def caption_fault(caption: str) -> str | None:
    """Names what makes a caption unusable, as verification would; None where nothing does."""
    try:
        return None if caption.encode().strip() else "empty_caption"
    except UnicodeEncodeError:
        return "non_utf8_caption"


def _judged(number: int, image: Any, caption: Any, meta: Mapping[str, Any]) -> Row:
    """Makes a row of an image's path and a caption that may be absent."""
    if not isinstance(image, str) or not image.strip():
        return Row(number, meta=meta, cause="missing_image")
    if not isinstance(caption, str):
        return Row(number, image.strip(), meta=meta, cause="missing_caption")
    return Row(number, image.strip(), caption.strip(), meta, caption_fault(caption))


def _conversation(number: int, record: Record) -> Row:
    """Makes a row of a conversation that may have no image."""
    if record is None:
        return Row(number, cause="bad_row")
    turns: Any = record.get("conversations")
    image: Any = record.get("image") or ""
    cause = conversation_fault(turns)
    if cause is not None:
        return Row(number, str(image), cause=cause)
    if not isinstance(image, str) or (not image.strip() and mentions_image(turns)):
        return Row(number, str(image), cause="missing_image")
    meta = {
        "id": str(record.get("id", number)),
        "conversations": [{name: turn[name] for name in ("from", "value")} for turn in turns],
        "n_words": num_words(turns),
        "modality": "image" if image.strip() else "text",
    }
    answers = [answer for _, answer in rounds(turns)]
    # A single answer about an image is a caption as well: such shards serve both.
    caption = answers[0].strip() if image.strip() and len(answers) == 1 else ""
    return Row(number, image.strip(), caption, meta)


def _first_answer(turns: Any) -> Any:
    """Returns what the model first says in a conversation, None where it says nothing."""
    for turn in turns if isinstance(turns, list) else []:
        if isinstance(turn, dict) and turn.get("from") == "gpt":
            return turn.get("value")
    return None


def _lines(path: Path) -> Iterator[str]:
    """Yields a file's lines; only a line feed ends one."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        for line in file:
            yield line.rstrip("\r\n")


def _is_link_header(line: str) -> bool:
    """Says whether a line names the columns of CC12M's list, which some tools put on top."""
    return line.strip().lower() == "url\tcaption"


def _split(line: str) -> list[str]:
    """Splits a line of a TSV file; quotes count only around a whole cell."""
    quoted = (_QUOTED.fullmatch(cell) for cell in line.split("\t"))
    return [
        found[1].replace('""', '"') if found else cell
        for found, cell in zip(quoted, line.split("\t"), strict=True)
    ]


def _record(line: str) -> Record:
    """Reads a line of JSON; None where it is no object."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
