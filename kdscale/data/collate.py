"""Micro-batches for training and prompts for generation, padded to rectangles.

Shapes: B samples, T tokens, N images, H W pixels, P visual tokens, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kdscale.core.types import DataError
from kdscale.data.instruct import IGNORE, Encoded

if TYPE_CHECKING:
    import torch

Pixels = np.ndarray[Any, Any]


def collate(
    samples: Sequence[Encoded],
    pixels: Sequence[Pixels | None],
    *,
    pad_id: int,
    image_token_id: int,
    num_image_tokens: int,
    pixel_shape: tuple[int, ...],
) -> dict[str, torch.Tensor]:
    """Pads the samples of one micro-batch on the right.

    What is attended follows from lengths, not from ids: an EOS that is also the padding stays
    attended and labelled. Where no sample has an image, a zero image comes along whose tokens
    follow the first sample, neither attended nor learnt, so that tower and projector run in every
    micro-batch of every rank.

    Args:
        samples: The B samples.
        pixels: Their images, None for text-only ones: (H, W, 3) uint8, or cached features
            (P, D) float16. The image of a sample that was cut before its image token is left out.
        pixel_shape: Shape of one image, as in `pixels`.

    Returns:
        `input_ids`, `attention_mask`, `labels`: (B, T) int64; `pixel_values`: (N, *pixel_shape)
        in the order of the image tokens.

    Raises:
        DataError: There is no sample, or images and image tokens do not match.
    """
    import torch

    columns = _columns(samples, pixels, pad_id, image_token_id, num_image_tokens, pixel_shape)
    return {name: torch.from_numpy(column) for name, column in columns.items()}


def _columns(
    samples: Sequence[Encoded],
    pixels: Sequence[Pixels | None],
    pad_id: int,
    image_token_id: int,
    num_image_tokens: int,
    pixel_shape: tuple[int, ...],
) -> dict[str, np.ndarray[Any, Any]]:
    """Builds what `collate` returns, as arrays."""
    if not samples or len(samples) != len(pixels):
        raise DataError(f"{len(samples)} samples with {len(pixels)} images make no micro-batch")
    images: list[Pixels] = []
    for place, (sample, image) in enumerate(zip(samples, pixels, strict=True)):
        count = int((sample.input_ids == image_token_id).sum())
        _check(place, count, image, num_image_tokens, pixel_shape)
        if count and image is not None:
            images.append(image)
    ids, labels = [list(column) for column in zip(*samples, strict=True)]
    attended = [len(row) for row in ids]
    if not images:
        images = [np.zeros(pixel_shape, np.uint8 if len(pixel_shape) == 3 else np.float16)]
        ids[0] = np.append(ids[0], np.full(num_image_tokens, image_token_id, np.int64))
    length = max(map(len, ids))
    return {
        "input_ids": _padded(ids, length, pad_id),
        "attention_mask": _padded([np.ones(count, np.int64) for count in attended], length, 0),
        "labels": _padded(labels, length, IGNORE),
        "pixel_values": np.stack(images),
    }


def left_padded(prompts: Sequence[np.ndarray[Any, Any]], *, pad_id: int) -> dict[str, torch.Tensor]:
    """Pads prompts on the left, so that all of them end where generation begins.

    Args:
        prompts: (T,) ids each, images expanded (`kdscale.data.instruct.encode_prompt`).

    Returns:
        `input_ids`, `attention_mask`: (B, T) int64.

    Raises:
        DataError: There is no prompt.
    """
    import torch

    if not prompts:
        raise DataError("no prompts to generate from")
    length = max(map(len, prompts))
    columns = {
        "input_ids": _padded(prompts, length, pad_id, left=True),
        "attention_mask": _padded([np.ones_like(row) for row in prompts], length, 0, left=True),
    }
    return {name: torch.from_numpy(column) for name, column in columns.items()}


def _check(
    place: int, count: int, image: Pixels | None, expected: int, shape: tuple[int, ...]
) -> None:
    """Refuses a sample whose image tokens or pixels are not those of one image."""
    if count not in (0, expected) or (count and image is None):
        found = "no image" if image is None else "an image"
        raise DataError(f"sample {place} has {count} image tokens and {found}; want {expected}")
    if image is not None and image.shape != tuple(shape):
        raise DataError(f"sample {place}: its image has shape {image.shape}, not {tuple(shape)}")


def _padded(
    rows: Sequence[np.ndarray[Any, Any]], length: int, value: int, left: bool = False
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Fills rows up to a length."""
    padded_BT = np.full((len(rows), length), value, np.int64)
    for padded_T, row in zip(padded_BT, rows, strict=True):
        padded_T[slice(length - len(row), length) if left else slice(len(row))] = row
    return padded_BT
