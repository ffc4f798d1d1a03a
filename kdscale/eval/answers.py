"""Answers as they are kept: one Parquet file per block of questions, each written whole.

Blocks follow from the questions alone, never from who answers them, so that work that was cut off
goes on at the first block that is not there.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kdscale.core.storage import StageStore
from kdscale.core.types import CacheCorrupt, CacheMismatch, DataError, UnfinishedStage
from kdscale.eval.questions import Question

BLOCK = 64  # questions; a killed process loses one block, and batches never reach across two
SCHEMA = pa.schema(
    {
        "benchmark": pa.string(),
        "item_id": pa.string(),
        "image_sha256": pa.string(),
        "prompt": pa.string(),
        "prediction": pa.string(),
        "num_tokens": pa.int32(),
        "gold": pa.list_(pa.string()),
        "gold_is_list": pa.bool_(),
        "options": pa.list_(pa.string()),
        "question_type": pa.string(),
        "category": pa.string(),
        "group": pa.string(),
        "max_new_tokens": pa.int32(),
    }
)
ABOUT = b"kdscale"


@dataclass(frozen=True)
class Block:
    """Questions that are answered and written together.

    Attributes:
        number: Its place among the blocks of its benchmark.
        count: Blocks of the benchmark.
        questions: At most `BLOCK`.
    """

    number: int
    count: int
    questions: tuple[Question, ...]

    @property
    def file_name(self) -> str:
        """Name of its file below the stage's `output`."""
        return f"{self.number:05d}.parquet"

    @property
    def about(self) -> dict[str, Any]:
        """What its file says of itself."""
        digest = questions_digest(self.questions)
        return {"block": self.number, "blocks": self.count, "questions": digest}


def blocks_of(questions: Sequence[Question]) -> list[Block]:
    """Cuts a benchmark's questions into blocks.

    Raises:
        DataError: There are none, of several benchmarks, or two with one item id.
    """
    names = sorted({question.benchmark for question in questions})
    if len(names) != 1:
        raise DataError(f"expected questions of one benchmark, got {names or 'none at all'}")
    (twice, times), *_ = Counter(question.item_id for question in questions).most_common(1)
    if times > 1:
        raise DataError(f"{names[0]} has {times} questions with the item id {twice!r}")
    count = -(-len(questions) // BLOCK)
    parts = (tuple(questions[n * BLOCK : (n + 1) * BLOCK]) for n in range(count))
    return [Block(number, count, part) for number, part in enumerate(parts)]


def questions_digest(questions: Sequence[Question]) -> str:
    """Hashes all that decides answers and scores; images count by the hash that they carry."""
    digest = hashlib.blake2b(digest_size=8)
    for question in questions:
        fields = {k: v for k, v in vars(question).items() if k != "image"}
        digest.update(json.dumps(fields, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def missing(stage: StageStore, blocks: Sequence[Block]) -> list[Block]:
    """Returns the blocks that a stage has not answered yet.

    Raises:
        CacheMismatch: A block is there and holds other questions.
        CacheCorrupt: A file is damaged.
    """
    there = set(stage.storage.names(*stage.parts, "output"))
    left: list[Block] = []
    for block in blocks:
        if block.file_name not in there:
            left.append(block)
        elif _about(_opened(stage, block.file_name), stage, block.file_name) != block.about:
            url = stage.url("output", block.file_name)
            raise CacheMismatch(
                f"{url} answers other questions than {block.questions[0].benchmark} "
                f"{block.questions[0].item_id} to {block.questions[-1].item_id}; the questions "
                f"have changed: remove {stage.url()} and ask again"
            )
    return left


def write_block(
    stage: StageStore, block: Block, predictions: Sequence[str], num_tokens: Sequence[int]
) -> None:
    """Writes a block's answers so that a reader sees all of them or nothing.

    Args:
        stage: Whose output they are.
        block: The questions.
        predictions: The answers, in order.
        num_tokens: Their lengths.

    Raises:
        StorageError: The file could not be written.
    """
    rows = [
        _row(question) | {"prediction": text, "num_tokens": length}
        for question, text, length in zip(block.questions, predictions, num_tokens, strict=True)
    ]
    metadata = {ABOUT: json.dumps(block.about).encode()}
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA.with_metadata(metadata)), buffer)
    stage.storage.write(buffer.getvalue(), *stage.parts, "output", block.file_name)


def load_rows(stage: StageStore) -> list[dict[str, Any]]:
    """Reads all rows of a stage, in the order of the questions.

    Raises:
        UnfinishedStage: Blocks are missing.
        CacheCorrupt: A file is damaged, or an item stands there twice.
    """
    names = [n for n in stage.storage.names(*stage.parts, "output") if n.endswith(".parquet")]
    names = [name for name in names if not name.startswith(".")]
    rows: list[dict[str, Any]] = []
    counts: set[int] = set()
    for name in names:
        file = _opened(stage, name)
        counts.add(_about(file, stage, name)["blocks"])
        rows += file.read().to_pylist()
    if counts != {len(names)}:
        raise UnfinishedStage(
            f"{stage.url()} has {len(names)} blocks of answers of {max(counts, default='?')}; "
            "ask again, it goes on where it stopped"
        )
    twice = [key for key, times in Counter(row["item_id"] for row in rows).items() if times > 1]
    if twice:
        raise CacheCorrupt(f"{stage.url()} holds {rows[0]['benchmark']} {twice[0]} twice")
    return rows


def load_items(stage: StageStore) -> list[dict[str, Any]]:
    """Reads what `kdscale.eval.score` takes: `Question.item` of every question, in order.

    Raises:
        UnfinishedStage, CacheCorrupt: As `load_rows`.
    """
    return [_item(row) for row in load_rows(stage)]


def _row(question: Question) -> dict[str, Any]:
    """Returns what is kept of a question: everything but its image."""
    row = {name: value for name, value in asdict(question).items() if name != "image"}
    alone = isinstance(question.gold, str)
    gold = [question.gold] if alone else list(question.gold)
    return row | {"gold": gold, "gold_is_list": not alone, "options": list(question.options)}


def _item(row: dict[str, Any]) -> dict[str, Any]:
    """Turns a row back into a scorer's item."""
    fields = {name: row[name] for name in Question.__dataclass_fields__ if name in row}
    gold = tuple(row["gold"]) if row["gold_is_list"] else row["gold"][0]
    fields |= {"gold": gold, "options": tuple(row["options"]), "image": None}
    return Question(**fields).item(row["prediction"])


def _opened(stage: StageStore, name: str) -> pq.ParquetFile:
    """Opens a block's file."""
    data = stage.storage.read(*stage.parts, "output", name)
    try:
        return pq.ParquetFile(io.BytesIO(data))
    except pa.ArrowInvalid as error:
        raise _damaged(stage, name, error) from error


def _about(file: pq.ParquetFile, stage: StageStore, name: str) -> dict[str, Any]:
    """Returns what a block's file says of itself."""
    try:
        return json.loads((file.schema_arrow.metadata or {})[ABOUT])
    except (KeyError, ValueError) as error:
        raise _damaged(stage, name, error) from error


def _damaged(stage: StageStore, name: str, error: Exception) -> CacheCorrupt:
    """Words the error for a file that cannot be read."""
    return CacheCorrupt(
        f"{stage.url('output', name)} is damaged ({error}); remove it and {stage.url('DONE')}, "
        "then ask again: only this block is answered once more"
    )
