"""Files of captions of Flickr30k and COCO: which texts belong to which image."""

from __future__ import annotations

import json
import re
from pathlib import PurePosixPath
from typing import Any

import fsspec

from kdscale.core.types import DataError
from kdscale.data.evalparquet import texts_of
from kdscale.data.raw import IMAGE_SUFFIXES

Captioned = tuple[str, tuple[str, ...]]

ANNOTATIONS = (".json", ".tsv", ".token")
_NUMBERED = re.compile(r"#\d+$")


def read_captions(path: str, split: str) -> list[Captioned]:
    """Reads (image, captions) in the file's order.

    Args:
        path: One of
            `.json` with `images`, each with `filename`, `split` and `sentences` (Karpathy's);
            `.json` with a list of {image, caption: text or list};
            `.tsv` or `.token` with an image and a caption a line, under a heading or none; an
            image may carry the number of its caption (`1000092795.jpg#0`).
        split: Images of another are passed over, where the file says.

    Raises:
        DataError: Not such a file, an image without a caption, or no image of that split.
    """
    with fsspec.open(path, "rb") as file:
        data: bytes = file.read()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        text = data.decode("utf-8-sig")
        found = _json(json.loads(text), path, split) if path.endswith(".json") else _lines(text)
    except DataError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is no file of captions: {type(error).__name__}: {error}; expected Karpathy's "
            "JSON, a list of {image, caption}, or lines of image, tab, caption"
        ) from error
    bare = [image for image, texts in found if not texts]
    if bare:
        raise DataError(f"{path}: {len(bare)} images have no caption, first {bare[0]!r}")
    return found


def _json(document: Any, path: str, split: str) -> list[Captioned]:
    """Reads either kind of JSON."""
    if isinstance(document, list):
        return [(str(row["image"]), texts_of(row["caption"])) for row in document]
    rows = [row for row in document["images"] if row.get("split", split) == split]
    if not rows:
        splits = sorted({str(row.get("split")) for row in document["images"]})
        raise DataError(f"{path} has no image of split {split!r}; it has {', '.join(splits)}")
    return [
        (
            str(PurePosixPath(row.get("filepath", ""), row["filename"])),
            texts_of(row["sentences"]),
        )
        for row in rows
    ]


def _lines(text: str) -> list[Captioned]:
    """Reads lines of image, tab, caption; an image's lines may lie apart."""
    found: dict[str, list[str]] = {}
    for number, line in enumerate(text.splitlines()):
        if not line.strip():
            continue
        image, tab, caption = line.partition("\t")
        image = _NUMBERED.sub("", image.strip())
        is_image = PurePosixPath(image).suffix.lower().lstrip(".") in IMAGE_SUFFIXES
        if not is_image and number == 0:
            continue  # a heading
        if not tab or not is_image:
            raise ValueError(f"line {number + 1} is not an image, a tab and a caption: {line!r}")
        found.setdefault(image, []).extend(filter(None, [caption.strip()]))
    return [(image, tuple(texts)) for image, texts in found.items()]
