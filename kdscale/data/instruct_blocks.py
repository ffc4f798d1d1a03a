"""What the data tasks of a conversation stream do: finish one micro-batch, and read it again.

Arrow tables in, Arrow tables out; nothing here knows of Ray or torch. A finished block is one
micro-batch: ids and labels of uneven length, and of every image the pixels that the tower sees, or
its cached features. Shapes: T tokens, H W pixels, P visual tokens, D features.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
from PIL import Image

from kdscale.core.types import ShardChanged
from kdscale.data.blocks import made
from kdscale.data.features import FeatureRef, read_feature
from kdscale.data.instruct import Encoded, encode, rounds
from kdscale.data.samples import MAX_PIXELS, BadImage, decode
from kdscale.data.shards import ShardEntry, changed

Pixels = np.ndarray[Any, Any]
Render = Callable[[Pixels], Pixels]


@dataclass(frozen=True)
class MicroBatch:
    """The samples of one forward pass.

    Attributes:
        rows: (m,) int64, the samples' places in the run.
        encoded: Their ids and labels.
        pixels: (px, px, 3) uint8 or (P, D) float16 each, None for samples without an image;
            views of shared memory, not to be written to.
    """

    rows: np.ndarray[Any, np.dtype[np.int64]]
    keys: list[str]
    encoded: list[Encoded]
    pixels: list[Pixels | None]


@dataclass(frozen=True)
class InstructPlan:
    """What `finish_instruct` needs to know.

    Attributes:
        tokenizer: Pickled function that makes the tokenizer.
        render: Pickled function that makes the function from an image to the tower's pixels.
        pad_colour: Fills images up to squares before they are rendered; None leaves them.
        image_tokens: Id of `<image>`, and how often it stands for one image.
        entries: The shards, to name one in an error and to find its features.
        features: Read in place of the images.
    """

    template: str
    tokenizer: bytes
    render: bytes
    pad_colour: tuple[int, int, int] | None
    image_tokens: tuple[int, int]
    max_length: int
    entries: tuple[ShardEntry, ...]
    features: FeatureRef | None = None


def finish_instruct(table: pa.Table, plan: InstructPlan) -> pa.Table:
    """Tokenises the conversations of one micro-batch and renders or looks up its images.

    Returns:
        Columns `row`, `epoch`, `key`, `input_ids` and `labels` (lists of int32) and `pixels`
        (the array's bytes, null without an image).

    Raises:
        ShardChanged: An image that the manifest vouches for cannot be decoded.
        DataError: A conversation does not fit the template.
        CacheMissing, CacheMismatch, CacheCorrupt: The cached features are not those.
    """
    cv2.setNumThreads(1)
    images = table.column("jpg")
    encoded = _encoded(table, plan)
    pixels = [
        _pixels(table, row, plan) if images[row].is_valid else None for row in range(len(images))
    ]
    lists = pa.list_(pa.int32())
    return pa.table(
        {
            "row": table.column("row"),
            "epoch": table.column("epoch"),
            "key": table.column("key"),
            "input_ids": pa.array([sample.input_ids for sample in encoded], lists),
            "labels": pa.array([sample.labels for sample in encoded], lists),
            "pixels": pa.array(pixels, pa.large_binary()),
        }
    )


def _encoded(table: pa.Table, plan: InstructPlan) -> list[Encoded]:
    """Turns the conversations of a micro-batch into ids and labels."""
    tokenizer = made(plan.tokenizer)
    image_token_id, num_image_tokens = plan.image_tokens
    texts, images = table.column("caption").to_pylist(), table.column("jpg")
    return [
        encode(
            rounds(json.loads(text)),
            plan.template,
            image.is_valid,
            tokenizer,
            image_token_id=image_token_id,
            num_image_tokens=num_image_tokens,
            max_length=plan.max_length,
        )
        for text, image in zip(texts, images, strict=True)
    ]


def _pixels(table: pa.Table, row: int, plan: InstructPlan) -> bytes:
    """Returns what the model is given of a row's image."""
    entry = plan.entries[table.column("shard")[row].as_py()]
    if plan.features is not None:
        return read_feature(plan.features, entry, table.column("place")[row].as_py())
    data, key = (table.column(name)[row].as_py() for name in ("jpg", "key"))
    return rendered(data, made(plan.render), plan.pad_colour, (entry.path, key)).tobytes()


def rendered(
    data: bytes, render: Render, pad_colour: tuple[int, int, int] | None, place: tuple[str, str]
) -> Pixels:
    """Renders an image as the tower sees it; training and feature caches both do it here.

    Args:
        data: The encoded image.
        render: From (H, W, 3) uint8 to the tower's pixels.
        pad_colour: Fills the image up to a square before it is rendered; None leaves it.
        place: Its shard and its key, for the error.

    Returns:
        (px, px, 3) uint8.

    Raises:
        ShardChanged: It cannot be decoded, though the manifest vouches for it.
    """
    path, key = place
    try:
        image = decode(data)
    except BadImage as error:
        raise ShardChanged(changed(path, f"a bad image under {key!r} ({error})")) from error
    if pad_colour is not None:
        image = pad_to_square(image, pad_colour)
    return np.ascontiguousarray(render(image))


def pad_to_square(image: Pixels, colour: tuple[int, int, int]) -> Pixels:
    """Centres an image on a square of its longer side.

    Args:
        image: (H, W, 3) uint8. One so long that its square would be refused as an image is
            shrunk until it is not.
        colour: RGB of the margins; LLaVA takes int(255 * mean) of the tower.

    Returns:
        (S, S, 3) uint8, S = max(H, W).
    """
    height, width = image.shape[:2]
    side, limit = max(height, width), int(MAX_PIXELS**0.5)
    if side > limit:
        size = max(1, width * limit // side), max(1, height * limit // side)
        shrunk = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
        return pad_to_square(np.asarray(shrunk), colour)
    top, left = (side - height) // 2, (side - width) // 2
    margins = top, side - height - top, left, side - width - left
    return cv2.copyMakeBorder(image, *margins, cv2.BORDER_CONSTANT, value=colour)


def micro_batch(table: pa.Table, shape: tuple[int, ...]) -> MicroBatch:
    """Reads a finished block.

    Args:
        table: What `finish_instruct` made.
        shape: Of one image: (px, px, 3), or (P, D) of cached features.
    """
    kind = np.uint8 if len(shape) == 3 else np.float16
    ids, labels = (
        [np.asarray(cell.values, np.int64) for cell in table.column(name)]
        for name in ("input_ids", "labels")
    )
    return MicroBatch(
        table.column("row").to_numpy(),
        table.column("key").to_pylist(),
        [Encoded(*pair) for pair in zip(ids, labels, strict=True)],
        [
            np.frombuffer(cell.as_buffer(), kind).reshape(shape) if cell.is_valid else None
            for cell in table.column("pixels")
        ],
    )
