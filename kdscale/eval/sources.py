"""A benchmark's questions, from a folder or the Hugging Face hub, checked before any is asked.

Every image is looked at, a few at a time, and none is kept: questions say where theirs is.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from kdscale.core.types import BadBenchmark, ConfigError, MissingBenchmark, unknown_name
from kdscale.eval.benchmarks import Benchmark, find_benchmark
from kdscale.eval.images import BUFFER_BYTES, ROWS_AT_ONCE, StoredImage, sha256_of
from kdscale.eval.prompts import Mode
from kdscale.eval.questions import Question
from kdscale.eval.rows import Asked, BadRow, Row, checked_image
from kdscale.eval.scores import check_items

MAX_PROBLEMS_SHOWN = 10
_PART = re.compile(r"-\d{5}-of-(\d{5})")
_COMMIT = re.compile(r"[0-9a-f]{40}")
Place = Callable[..., StoredImage]  # where a row's image is, its hash still to come


def questions(
    benchmark: str,
    directory: str | Path | None = None,
    limit: int | None = None,
    mode: Mode = "paper",
    revision: str | None = None,
) -> list[Question]:
    """Reads what a benchmark asks.

    Args:
        benchmark: A key of `kdscale.eval.benchmarks.BENCHMARKS`.
        directory: Holds the data set's own files: in a folder named after the benchmark, or itself;
            there in the hub repository's layout, or all Parquet files in one folder. None for the
            hub, or its cache where `HF_HUB_OFFLINE` is set.
        limit: About how many questions, in the file's order; what is scored together (a pair, a
            question's rotations) stays together. None for all.
        mode: `paper` asks as the reference scripts do, oddities included; `corrected` prints all
            of MMMU's options and sets MMVP's swapped golds right.
        revision: Commit, tag or branch on the hub; None for that of the table.

    Returns:
        The questions in the order of the file. `item_id` is the row's number there, from 0. Their
        images stay in the files (`kdscale.eval.images.StoredImage`).

    Raises:
        UnknownName: No such benchmark or mode.
        ConfigError: The limit is below 1.
        MissingBenchmark: The files are not there, or the hub cannot be reached.
        BadBenchmark: Files or rows are malformed; all of them are named.
        BadItem: A row's gold or kind is none that `kdscale.eval.score` knows; better known now
            than after all have been answered.
    """
    spec = find_benchmark(benchmark)
    _check_options(limit, mode)
    place = None if directory is None else Path(directory).expanduser().absolute()
    root = _download(spec, revision) if place is None else _folder(spec, place)
    chosen = _chosen(spec, root, mode, limit)
    check_items(spec.name, (question.item("") for question in chosen))
    return chosen


def _chosen(spec: Benchmark, root: Path, mode: Mode, limit: int | None) -> list[Question]:
    """Reads the first questions of a benchmark; all of it where groups have to be found."""
    is_grouped = spec.group_size is not None or spec.has_rotations
    found, problems = _read(spec, root, mode, None if is_grouped else limit)
    if problems := problems or _incomplete_groups(spec, found):
        raise BadBenchmark(_report(spec, problems))
    if not found:
        raise BadBenchmark(f"{spec.name}: no question in {root}")
    return _first(found, limit) if is_grouped and limit is not None else found


def _check_options(limit: int | None, mode: str) -> None:
    """Refuses what is no mode or no limit."""
    if mode not in get_args(Mode):
        raise unknown_name("mode", mode, get_args(Mode))
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}; ask at least one question, or None for all")


def hub_commit(benchmark: str, revision: str | None = None) -> str | None:
    """Fetches a benchmark from the hub, and returns the commit that a revision stands for now.

    Args:
        benchmark: A key of `kdscale.eval.benchmarks.BENCHMARKS`.
        revision: Commit, tag or branch; None for that of the table.

    Returns:
        40 hexadecimal digits; what was given where the hub's client does not tell.

    Raises:
        UnknownName, MissingBenchmark: As `questions`.
    """
    return commit_of(_download(find_benchmark(benchmark), revision)) or revision


def commit_of(path: str | Path) -> str | None:
    """Returns the commit whose files the hub's cache keeps at a path, None elsewhere."""
    place = Path(path)
    inside = place.parent.name == "snapshots" and _COMMIT.fullmatch(place.name)
    return place.name if inside else None


def _read(
    spec: Benchmark, root: Path, mode: Mode, limit: int | None
) -> tuple[list[Question], list[str]]:
    """Takes the rows apart, collecting what is wrong with them."""
    found: list[Question] = []
    problems: list[str] = []
    for number, (row, place) in enumerate(_rows(spec, root)):
        try:
            asked = spec.read(row, mode)
        except BadRow as error:
            problems.append(f"item {number}: {error}")
        else:
            if asked is not None:
                found.append(_question(spec, str(number), asked, place))
        if limit is not None and len(found) + len(problems) >= limit:
            break
    return found, problems


def _question(spec: Benchmark, item_id: str, asked: Asked, place: Place) -> Question:
    """Adds what the benchmark says of all its questions, and lets go of the image."""
    suffix = spec.open_suffix if asked.is_open else spec.suffix
    image = asked.image
    if isinstance(image, bytes):
        image = place(sha256=sha256_of(image))
    return Question(
        benchmark=spec.name,
        item_id=item_id,
        prompt=asked.body if suffix is None else f"{asked.body}\n{suffix}",
        image=image,
        image_sha256="" if image is None else image.sha256,
        gold=asked.gold,
        options=asked.options,
        question_type=asked.question_type,
        category=asked.category,
        group=asked.group,
        max_new_tokens=spec.max_new_tokens,
    )


def _incomplete_groups(spec: Benchmark, found: list[Question]) -> list[str]:
    """Names the first item of each group that has not as many rows as all should."""
    size = spec.group_size
    sizes = Counter(question.group for question in found)
    firsts = {question.group: question.item_id for question in reversed(found)}
    return [
        f"item {firsts[group]}: its group {group!r} has {number} rows instead of {size}"
        for group, number in sizes.items()
        if size is not None and number != size
    ]


def _first(found: list[Question], limit: int) -> list[Question]:
    """Keeps whole groups, in the order of their first rows, until there are enough questions."""
    sizes = Counter(question.group for question in found)
    kept: set[str] = set()
    total = 0
    for group, size in sizes.items():
        if total >= limit:
            break
        kept.add(group)
        total += size
    return [question for question in found if question.group in kept]


def _report(spec: Benchmark, problems: list[str]) -> str:
    """Lists the problems, most of them at least."""
    shown = "; ".join(problems[:MAX_PROBLEMS_SHOWN])
    more = len(problems) - MAX_PROBLEMS_SHOWN
    rest = f"; and {more} more" if more > 0 else ""
    return f"{spec.name}: {len(problems)} rows cannot be asked: {shown}{rest}"


def _download(spec: Benchmark, revision: str | None) -> Path:
    """Fetches the benchmark's files, or finds them in the hub's cache."""
    from huggingface_hub import constants, snapshot_download

    revision = revision or spec.revision
    patterns = [spec.files] if spec.images is None else [spec.files, spec.images]
    try:
        root = snapshot_download(
            spec.hub_id, repo_type="dataset", revision=revision, allow_patterns=patterns
        )
    except Exception as error:  # whatever the hub's client and its transport raise
        place = f"data set {spec.hub_id} at {revision}"
        cause = (
            "is not in the hub's cache, and HF_HUB_OFFLINE is set"
            if constants.HF_HUB_OFFLINE
            else f"cannot be fetched from the hub ({type(error).__name__}: {_first_line(error)})"
        )
        raise MissingBenchmark(
            f"{spec.name}: {place} {cause}; give a directory that holds {' and '.join(patterns)}"
        ) from error
    return Path(root)


def _first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return next(iter(str(error).strip().splitlines()), "no message")


def _folder(spec: Benchmark, directory: Path) -> Path:
    """Finds a benchmark's folder in a folder of benchmarks."""
    if not directory.is_dir():
        raise MissingBenchmark(f"{spec.name}: there is no directory {directory}")
    own = directory / spec.name
    return own if own.is_dir() else directory


def _files(spec: Benchmark, root: Path, pattern: str) -> list[Path]:
    """Finds the files of a pattern, all parts of them, in order of their names."""
    flat = [] if spec.images else ["*.parquet"]
    for candidate in [pattern, *flat]:
        files = sorted(root.glob(candidate))
        if files:
            break
    else:
        raise MissingBenchmark(f"{spec.name}: {root} holds no {' and no '.join([pattern, *flat])}")
    totals = {int(part[1]) for file in files if (part := _PART.search(file.name))}
    if totals and totals != {len(files)}:
        raise MissingBenchmark(
            f"{spec.name}: {root} holds {len(files)} of the {max(totals)} files {pattern}"
        )
    return files


def _rows(spec: Benchmark, root: Path) -> Iterator[tuple[Row, Place]]:
    """Yields the rows with their images, and where those are."""
    if spec.files.endswith(".csv"):
        yield from _csv_rows(spec, root)
        return
    images = None if spec.images is None else _named_images(spec, root, spec.images)
    for file in _files(spec, root, spec.files):
        rows = _parquet_rows(spec, file, spec.columns, spec.labels)
        for number, row in enumerate(rows):
            if images is not None:
                row["image"] = images.get(str(row["imageId"]))
            yield row, _place(spec, file, number)


def _place(spec: Benchmark, file: Path, row: int) -> Place:
    """Returns where a row of a Parquet file has its image."""
    return partial(StoredImage, file=str(file), column=spec.image_column, row=row)


def _named_images(spec: Benchmark, root: Path, pattern: str) -> dict[str, Any]:
    """Looks at a table of images: {id: where it is}, or what is no image as it was found."""
    images: dict[str, Any] = {}
    for file in _files(spec, root, pattern):
        for number, row in enumerate(_parquet_rows(spec, file, ("id", spec.image_column))):
            found = row[spec.image_column]
            try:
                digest = sha256_of(checked_image(found))
            except BadRow:  # which matters only where a question shows it
                images[str(row["id"])] = found
            else:
                images[str(row["id"])] = _place(spec, file, number)(sha256=digest)
    return images


def _parquet_rows(
    spec: Benchmark, file: Path, columns: tuple[str, ...], labels: tuple[str, ...] = ()
) -> Iterator[dict[str, Any]]:
    """Reads a Parquet file a few rows at a time."""
    try:
        with pq.ParquetFile(file, buffer_size=BUFFER_BYTES) as table:
            present = table.schema_arrow.names
            _check_columns(spec, file, columns, present)
            wanted = [*columns, *(name for name in labels if name in present)]
            for group in range(table.num_row_groups):  # one reader for all of them keeps them all
                for batch in table.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=wanted):
                    yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise BadBenchmark(f"{spec.name}: {file} cannot be read: {error}") from error


def _csv_rows(spec: Benchmark, root: Path) -> Iterator[tuple[Row, Place]]:
    """Reads MMVP's questions; line i asks about image i."""
    file, images = _files(spec, root, spec.files)[0], spec.images or ""
    folder = root / Path(images).parent
    try:
        lines = list(csv.reader(io.StringIO(file.read_text(encoding="utf-8-sig"), newline="")))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadBenchmark(f"{spec.name}: {file} cannot be read: {error}") from error
    # The original spells its first column "lndex".
    header = [name.strip().lower().replace("lndex", "index") for name in (lines or [[]])[0]]
    _check_columns(spec, file, spec.columns, header)
    for line in filter(None, lines[1:]):
        row: dict[str, Any] = dict.fromkeys(header) | dict(zip(header, line, strict=False))
        image = folder / f"{row['index']}.jpg"
        row["answer"] = row["correct answer"]
        row["image"] = image.read_bytes() if image.is_file() else None
        yield row, partial(StoredImage, file=str(image))


def _check_columns(
    spec: Benchmark, file: Path, columns: tuple[str, ...], present: list[str]
) -> None:
    """Raises where a file lacks a column."""
    absent = [name for name in columns if name not in present]
    if absent:
        raise BadBenchmark(
            f"{spec.name}: {file} lacks the columns {', '.join(absent)}; "
            f"it has {', '.join(present)}"
        )
