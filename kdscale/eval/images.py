"""Images of questions where they lie: read when they are shown, never all at once.

A benchmark's questions fit in memory, its images need not. A question names the place of its image
and the hash of its bytes; whoever shows it reads the image there and checks the hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kdscale.core.types import DataError

ROWS_AT_ONCE = 32
BUFFER_BYTES = 1 << 20  # read a column in parts, not whole row groups at once


@dataclass(frozen=True, kw_only=True)
class StoredImage:
    """An image in a benchmark's files; two are equal where their bytes are.

    Attributes:
        sha256: Hash of its bytes, in hexadecimal.
        file: A Parquet file, or the image's own.
        column: Column of the Parquet file, None for a file of its own.
        row: Row of the Parquet file, from 0.
    """

    sha256: str
    file: str = field(compare=False)
    column: str | None = field(default=None, compare=False)
    row: int = field(default=0, compare=False)


def encoded(value: Any) -> Any:
    """Returns an image's bytes from a column's value: bytes, a struct with them, a list of one."""
    value = value[0] if isinstance(value, list) and value else value
    return value.get("bytes") if isinstance(value, Mapping) else value


def sha256_of(data: bytes) -> str:
    """Returns the hash of an image's bytes in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def read_images(images: Iterable[StoredImage]) -> dict[StoredImage, bytes]:
    """Reads images, each file and each row group once.

    Args:
        images: Of any files, in any order.

    Returns:
        The bytes of each.

    Raises:
        DataError: A file cannot be read, or holds another image than before.
    """
    by_file: dict[tuple[str, str | None], list[StoredImage]] = {}
    for image in dict.fromkeys(images):
        by_file.setdefault((image.file, image.column), []).append(image)
    found: dict[StoredImage, bytes] = {}
    for (file, column), wanted in by_file.items():
        try:
            if column is None:
                found |= {image: Path(image.file).read_bytes() for image in wanted}
            else:
                found |= _from_parquet(file, column, wanted)
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{file} cannot be read any more ({error}); whoever answers reads the benchmark's "
                "files, so keep them where every machine of the cluster sees them"
            ) from error
    for image, data in found.items():
        if sha256_of(data) != image.sha256:
            raise DataError(
                f"{image.file} has changed since its questions were read; ask again from the start"
            )
    return found


def _from_parquet(
    file: str, column: str, wanted: Sequence[StoredImage]
) -> dict[StoredImage, bytes]:
    """Reads rows of a Parquet file's column."""
    rows = {image.row: image for image in wanted}
    found: dict[StoredImage, bytes] = {}
    with pq.ParquetFile(file, buffer_size=BUFFER_BYTES) as table:
        first = 0
        for group in range(table.num_row_groups):
            after = first + table.metadata.row_group(group).num_rows
            here = sorted(row for row in rows if first <= row < after)
            batches = table.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=[column])
            for batch in batches if here else ():
                while here and here[0] < first + len(batch):
                    row = here.pop(0)
                    data = encoded(batch.column(0)[row - first].as_py())
                    found[rows[row]] = data if isinstance(data, bytes) else b""
                first += len(batch)
                if not here:
                    break
            first = after
    return found | {image: b"" for row, image in rows.items() if image not in found}
