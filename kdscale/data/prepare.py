"""From a captions file and a folder of images to WebDataset tars, as CC12M is distributed.

`00000.tar`, `00001.tar`, ... hold `{row:09d}.jpg`, `.txt` and `.json`. Beside each lies a
`00000_stats.json`, written after it, with a digest of all that decides its content: a rerun skips
the shards whose digest is the same. `prepare.json` says what the folder was made of, and
`rejected.jsonl` names every row that gave no sample.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from stat import S_ISREG
from typing import Any, Literal

from pydantic import Field

from kdscale.core.config import Spec
from kdscale.core.types import EmptyShard, FolderTaken, StorageError, TooManyBadSamples
from kdscale.data.captions import Captions, Row
from kdscale.data.pictures import Finder, finder
from kdscale.data.tars import (
    Item,
    Rejection,
    ShardJob,
    ShardStats,
    key_of,
    stats_path,
    tar_path,
    write_shard,
    write_whole,
)

RECORD, REJECTED = "prepare.json", "rejected.jsonl"
REPORT_EVERY = 10_000
CAPTION_PX, CONVERSATION_PX = 256, 512  # 512 keeps COCO's files as they are
_LEFTOVER = re.compile(r"\..+\.\d+\.tmp")
_SHARD = re.compile(r"(\d{5,})\.tar")
Progress = Callable[[str, int, int | None], None]


class Preparation(Spec):
    """What to make shards of, and how.

    Attributes:
        source: Captions file.
        images: Folder that the image paths start from.
        out: Folder for the shards.
        format: One of `kdscale.data.captions.FORMATS`.
        px: Longest that an image's shorter side may be, in pixels; None is 256, and 512 for
            conversations, which ask about details.
        quality: JPEG quality of what has to be encoded anew.
        seed: Decides the order of conversations in the shards.
        max_bad_fraction: Share of rejected rows above which it ends with an error.
        workers: Processes, None for one per core; 1 works in this one.
    """

    source: str
    images: str
    out: str
    format: Literal["auto", "table", "cc12m", "llava", "conversations"] = "auto"
    px: int | None = Field(default=None, gt=0)
    quality: int = Field(default=90, ge=1, le=100)
    samples_per_shard: int = Field(default=5000, gt=0)
    seed: int = 0
    max_bad_fraction: float = Field(default=0.05, ge=0, le=1)
    workers: int | None = Field(default=None, gt=0)

    @property
    def largest_px(self) -> int:
        """`px`, or what stands for None."""
        return self.px or (CONVERSATION_PX if self.format == "conversations" else CAPTION_PX)


@dataclass(frozen=True)
class Prepared:
    """What came out.

    Attributes:
        num_rows: Lines of the captions file.
        num_kept: Samples whose image kept its bytes.
        num_reused: Shards that an earlier run had finished.
        causes: Rejected rows by cause.
    """

    format: str
    num_rows: int
    num_samples: int
    num_kept: int
    num_shards: int
    num_reused: int
    num_bytes: int
    causes: dict[str, int]


def prepare(options: Preparation, progress: Progress = lambda *_: None) -> Prepared:
    """Writes the shards that are not there yet, the list of rejected rows, and the record.

    Args:
        options: What to make of what.
        progress: Told (what is done, rows so far, rows in all or None).

    Raises:
        DataError: The captions file or the folder of images cannot be read at all.
        FolderTaken: The output folder holds something else.
        TooManyBadSamples: More rows were rejected than allowed; `rejected.jsonl` names them all.
        EmptyShard: No row gave a sample.
    """
    captions = Captions(options.source, options.format, options.seed)
    find = finder(captions, options.images)
    record = _describe(options, captions)
    _claim(options.out, record)
    rejected, num_items = _scan(captions, partial(_resolve, find, options.images), progress)
    num_rows = num_items + len(rejected)
    _finish_list(options, rejected, num_rows)
    jobs = _jobs(options, captions.kind, partial(_resolve, find, options.images), captions)
    written, num_reused = _write(jobs, options, num_items, progress)
    _drop_stale(options.out, written)
    rejected += [row for stats in written.values() for row in stats.rejected]
    outcome = Prepared(
        format=captions.kind,
        num_rows=num_rows,
        num_samples=sum(stats.num_samples for stats in written.values()),
        num_kept=sum(stats.num_kept for stats in written.values()),
        num_shards=sum(stats.num_samples > 0 for stats in written.values()),
        num_reused=num_reused,
        num_bytes=sum(stats.num_bytes for stats in written.values()),
        causes=_count(rejected),
    )
    _save(options.out, record | {"finished": True, "outcome": asdict(outcome)})
    _finish_list(options, rejected, num_rows)
    return outcome


def _describe(options: Preparation, captions: Captions) -> dict[str, Any]:
    """Describes what decides the shards' content."""
    with open(options.source, "rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "version": 1,
        "source": {"path": os.path.abspath(options.source), "sha256": checksum},
        "options": {
            "format": captions.kind,
            "images": os.path.abspath(options.images),
            "px": options.largest_px,
            "quality": options.quality,
            "samples_per_shard": options.samples_per_shard,
        }
        | ({"seed": options.seed} if captions.kind == "conversations" else {}),
        "finished": False,
    }


def _claim(out: str, record: dict[str, Any]) -> None:
    """Takes the output folder, or refuses one that was made of something else."""
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = os.listdir(folder)
    except OSError as error:
        raise StorageError(f"cannot write to {out}: {error}") from error
    if RECORD in names:
        _compare(folder, record)
    elif foreign := sorted(name for name in names if name.endswith((".tar", ".parquet"))):
        raise FolderTaken(
            f"{out} already holds {foreign[0]} and no {RECORD} that says what it was made of: "
            "choose another --out"
        )
    for name in filter(_LEFTOVER.fullmatch, names):
        (folder / name).unlink(missing_ok=True)
    _save(out, record)


def _compare(folder: Path, record: dict[str, Any]) -> None:
    """Refuses a folder that was made of another source or with other options."""
    try:
        found = json.loads((folder / RECORD).read_bytes())
        before = found["options"] | {"source sha256": found["source"]["sha256"]}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise FolderTaken(
            f"{folder / RECORD} cannot be read ({error!r}): choose another --out"
        ) from error
    now = record["options"] | {"source sha256": record["source"]["sha256"]}
    others = [
        f"{name} {before.get(name)!r}, now {now[name]!r}"
        for name in now
        if before.get(name) != now[name]
    ]
    if others:
        raise FolderTaken(
            f"{folder} was prepared with {'; '.join(others)}: choose another --out, or delete "
            "the folder to make it anew"
        )


def _save(out: str, record: dict[str, Any]) -> None:
    """Writes the record of a folder."""
    write_whole(Path(out, RECORD), json.dumps(record, indent=2) + "\n")


def _resolve(find: Finder, folder: str, row: Row) -> Item | Rejection:
    """Finds a row's image; its size and time of change decide whether it is the same later."""
    image, cause = row.image, row.cause
    if cause is None and not image:
        return Item(row.number, "", 0, 0, row.caption, row.meta)
    if cause is None:
        image, cause = find(row)
    if cause is None:
        try:
            info = os.stat(os.path.join(folder, image))
        except (OSError, ValueError):
            info = None
        if info is not None and S_ISREG(info.st_mode):
            size, changed = info.st_size, info.st_mtime_ns
            return Item(row.number, image, size, changed, row.caption, row.meta)
    return Rejection(row.number, key_of(row.number), image or row.image, cause or "missing_image")


Resolve = Callable[[Row], Item | Rejection]


def _scan(captions: Captions, resolve: Resolve, progress: Progress) -> tuple[list[Rejection], int]:
    """Looks every row up without opening an image: (rejected rows, number of the others)."""
    rejected: list[Rejection] = []
    num_items = 0
    for count, row in enumerate(captions):
        found = resolve(row)
        if isinstance(found, Rejection):
            rejected.append(found)
        else:
            num_items += 1
        if count % REPORT_EVERY == 0:
            progress("looking images up", count, None)
    return rejected, num_items


def _jobs(
    options: Preparation, kind: str, resolve: Resolve, rows: Iterable[Row]
) -> Iterator[ShardJob]:
    """Deals the usable rows to shards, in order."""
    items = (found for found in map(resolve, rows) if isinstance(found, Item))
    number = 0
    while lot := tuple(islice(items, options.samples_per_shard)):
        yield ShardJob(
            number=number,
            out=options.out,
            images=options.images,
            px=options.largest_px,
            quality=options.quality,
            check_urls=kind == "cc12m",
            items=lot,
            conversations=kind == "conversations",
        )
        number += 1


def _write(
    jobs: Iterator[ShardJob], options: Preparation, num_items: int, progress: Progress
) -> tuple[dict[int, ShardStats], int]:
    """Writes what is not there: (statistics of every shard, number of those found finished)."""
    written: dict[int, ShardStats] = {}
    num_done = num_reused = 0

    def add(job: ShardJob, stats: ShardStats) -> None:
        """Notes a shard that is written."""
        nonlocal num_done
        written[job.number] = stats
        num_done += len(job.items)
        progress("writing", num_done, num_items)

    def unfinished() -> Iterator[ShardJob]:
        """Yields the shards that no earlier run has finished."""
        nonlocal num_reused
        for job in jobs:
            stats = job.finished()
            if stats is None:
                yield job
            else:
                num_reused += 1
                add(job, stats)

    num_shards = -(-num_items // options.samples_per_shard)
    workers = min(options.workers or os.cpu_count() or 1, max(num_shards, 1))
    for job, stats in _run(unfinished(), workers):
        add(job, stats)
    return written, num_reused


def _run(jobs: Iterator[ShardJob], workers: int) -> Iterator[tuple[ShardJob, ShardStats]]:
    """Writes shards in several processes, with few jobs in memory at a time."""
    if workers == 1:
        for job in jobs:
            yield job, write_shard(job)
        return
    # Forked children would inherit the locks of OpenCV's threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _end_with_parent) as pool:
        waiting: dict[Future[ShardStats], ShardJob] = {}
        try:
            for job in jobs:
                waiting[pool.submit(write_shard, job)] = job
                if len(waiting) >= 2 * workers:
                    yield from _first(waiting)
            while waiting:
                yield from _first(waiting)
        except BrokenProcessPool as error:
            raise StorageError(
                "a process that was writing shards died, perhaps for want of memory: lower "
                "--workers and run this again; finished shards stay"
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _end_with_parent() -> None:
    """Makes a worker end when the process that started it is killed; it would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        """Ends this process when the parent has ended."""
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _first(
    waiting: dict[Future[ShardStats], ShardJob],
) -> Iterator[tuple[ShardJob, ShardStats]]:
    """Waits for some shards and takes them out."""
    for future in wait(waiting, return_when=FIRST_COMPLETED).done:
        yield waiting.pop(future), future.result()


def _drop_stale(out: str, written: dict[int, ShardStats]) -> None:
    """Removes shards of an earlier run that had more of them."""
    for name in os.listdir(out):
        match = _SHARD.fullmatch(name)
        number = int(match[1]) if match else -1
        if match and number not in written and stats_path(out, number).exists():
            tar_path(out, number).unlink()
            stats_path(out, number).unlink()


def _count(rejected: Sequence[Rejection]) -> dict[str, int]:
    """Counts rejected rows by cause, most frequent first."""
    return dict(Counter(row.cause for row in rejected).most_common())


def _finish_list(options: Preparation, rejected: list[Rejection], num_rows: int) -> None:
    """Writes the list of rejected rows, then judges their number."""
    path = Path(options.out, REJECTED)
    rejected.sort(key=lambda row: row.row)
    write_whole(path, "".join(json.dumps(asdict(row)) + "\n" for row in rejected))
    bad, allowed = len(rejected), options.max_bad_fraction
    if bad > allowed * num_rows:
        counts = ", ".join(f"{cause} {count}" for cause, count in _count(rejected).items())
        examples = "; ".join(f"row {r.row} {r.image!r} ({r.cause})" for r in rejected[:3])
        raise TooManyBadSamples(
            f"{bad} of {num_rows} rows gave no sample ({bad / num_rows:.1%}, allowed "
            f"{allowed:.1%}): {counts}; for example {examples}. All are listed in {path}. Repair "
            "the source or raise --max-bad-fraction."
        )
    if bad == num_rows:
        raise EmptyShard(f"no row of {options.source} gave a sample; see {path}")
