"""Rows of evaluation sets in Parquet: an image with a label or captions, as hubs publish them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import fsspec

from kdscale.core.types import DataError

Row = tuple[str, bytes | None, object, tuple[str, ...]]

IMAGE_COLUMNS = ("image", "jpg", "webp", "png")
LABEL_COLUMNS = ("label", "cls", "wnid")
CAPTION_COLUMNS = ("captions", "caption", "sentences", "raw", "txt", "answer")
KEY_COLUMNS = ("key", "__key__", "filename", "image_id")


def read_rows(path: str, labelled: bool, split: str) -> Iterator[Row]:
    """Streams (key, image, label, captions) of a Parquet file.

    Args:
        path: The file.
        labelled: Whether labels are wanted; else captions.
        split: Rows of another split are passed over, where a column `split` says so.

    Raises:
        DataError: Not such a file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    fs, plain = fsspec.core.url_to_fs(path)
    try:
        with fs.open(plain, "rb") as file:
            table = pq.ParquetFile(file)
            names = table.schema_arrow.names
            image = _column(path, names, IMAGE_COLUMNS, "encoded images")
            sought = (LABEL_COLUMNS, "labels") if labelled else (CAPTION_COLUMNS, "captions")
            value = _column(path, names, *sought)
            key = next((name for name in KEY_COLUMNS if name in names), None)
            wanted = [n for n in (image, value, key, "split") if n is not None and n in names]
            number = 0
            for chunk in table.iter_batches(batch_size=128, columns=wanted):
                for cells in chunk.to_pylist():
                    number += 1
                    if cells.get("split", split) != split:
                        continue
                    name = str(number - 1) if key is None else str(cells[key])
                    found = cells[value]
                    texts = () if labelled else texts_of(found)
                    yield name, _image(cells[image], path, image), found, texts
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}; fetch it again") from error


def _column(path: str, names: list[str], known: tuple[str, ...], what: str) -> str:
    """Chooses a column."""
    found = next((name for name in known if name in names), None)
    if found is None:
        raise DataError(
            f"{path} has no column of {what} ({', '.join(known)}); it has {', '.join(names)}"
        )
    return found


def _image(cell: Any, path: str, column: str) -> bytes | None:
    """Takes the bytes of an image cell: bytes alone, or a struct with them."""
    found = cell.get("bytes") if isinstance(cell, dict) else cell
    if found is None or isinstance(found, bytes):
        return found
    raise DataError(f"column {column} of {path} holds {type(found).__name__}, not encoded images")


def texts_of(cell: Any) -> tuple[str, ...]:
    """Turns a cell of captions into texts: one, several, or records with `raw` or `caption`."""
    parts = cell if isinstance(cell, list | tuple) else [cell]
    texts = [p.get("raw", p.get("caption")) if isinstance(p, dict) else p for p in parts]
    return tuple(text.strip() for text in texts if isinstance(text, str) and text.strip())
