"""One sample: decode the image, choose its crop, render it; and the batch that training sees.

Everything here is a pure function of bytes and numbers. Pixels stay uint8 RGB.
Shapes: B samples of one worker's share, H W pixels, T tokens.
"""

from __future__ import annotations

import io
import math
import struct
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from kdscale.core.types import DataError
from kdscale.data.order import permutation

if TYPE_CHECKING:
    import torch

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

MAX_PIXELS = 64_000_000
AREA_FROM = 3.0
BLUR_FROM = 1.2  # below, the blur is narrower than a pixel and changes nothing
_BLUR = 0.45
_TRIES = 10
DIVISORS = (4, 2)


class BadImage(DataError):
    """Image bytes that give no picture.

    Attributes:
        cause: `truncated_jpeg`, `bomb`, `undecodable`, or `too_long` for a JPEG.
    """

    def __init__(self, cause: str, detail: str = "") -> None:
        super().__init__(cause, detail)
        self.cause = cause

    def __str__(self) -> str:
        return ": ".join(part for part in self.args if part)


@dataclass(frozen=True)
class Crop:
    """How crops are drawn: RandomResizedCrop's ranges, and the seed of all draws."""

    seed: int = 0
    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class Batch:
    """One worker's share of one optimizer step.

    Attributes:
        step: Optimizer step, counted from the start of the whole run.
        rows: (B,) int64, the samples' places in the run: `step * G + rank * B + i`.
        images: {px: (B, px, px, 3) uint8}; views of shared memory, not to be written to.
        tokens: {tokenizer: (B, T) int64}, likewise.
        teacher_image: (B, D) float16 unit embeddings from the teacher cache, None without one.
        teacher_text: The same of the captions.
    """

    step: int
    epoch: int
    rows: np.ndarray[Any, np.dtype[np.int64]]
    keys: list[str]
    images: dict[int, torch.Tensor]
    tokens: dict[str, torch.Tensor]
    teacher_image: torch.Tensor | None = None
    teacher_text: torch.Tensor | None = None


def decode(
    data: bytes, divisor: int = 1, *, gif: bool = False
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Decodes an image to (H, W, 3) uint8 RGB; orientation tags are not applied.

    JPEG goes through libjpeg-turbo, other formats and CMYK through Pillow. The size in the
    header is checked before any pixel is allocated.

    Args:
        divisor: Divides both sides (rounding up) of an RGB or grey JPEG, 1, 2 or 4; others are
            decoded at their full size.
        gif: Take the first picture of a GIF; shards hold none.

    Raises:
        BadImage: Truncated, larger than `MAX_PIXELS`, or not an image.
    """
    if data[:2] != b"\xff\xd8":
        return _decode_other(data, ("GIF",) if gif else ())
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return _decode_other(data)
    _check_size(int(height), int(width))
    if colorspace in ("CMYK", "YCCK"):
        return _decode_other(data)
    least = [-(-int(side) // divisor) for side in (height, width)]
    options: dict[str, Any] = {"min_height": least[0], "min_width": least[1]}
    options = {} if divisor == 1 else options
    try:
        return simplejpeg.decode_jpeg(data, **options)
    except ValueError as error:
        reason = str(error)
    if "Premature end of JPEG file" in reason:
        raise BadImage("truncated_jpeg", reason)
    if "extraneous bytes" in reason:
        # Padding between markers, which every other decoder passes over.
        return simplejpeg.decode_jpeg(data, strict=False, **options)
    raise BadImage("undecodable", reason)


def _check_size(height: int, width: int) -> None:
    """Refuses sizes that no honest photograph of a web data set has."""
    if height * width > MAX_PIXELS:
        raise BadImage("bomb", f"{width} x {height} pixels, more than {MAX_PIXELS:,}")
    if height * width == 0:
        raise BadImage("undecodable", "no pixels")


def _decode_other(data: bytes, also: tuple[str, ...] = ()) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Decodes with Pillow, which reads the header first and the pixels on demand.

    Of 16 bits a channel the upper eight are taken, as Pillow itself does for colour.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP", *also, "MPO"))
            _check_size(picture.height, picture.width)
            if picture.mode.startswith("I"):  # `convert` would cut 16 bits of grey off at 255
                grey = (np.asarray(picture) >> 8).astype(np.uint8)
                return np.repeat(grey[..., None], 3, axis=2)
            return np.asarray(picture.convert("RGB"))
    except Image.DecompressionBombError as error:
        raise BadImage("bomb", str(error)) from error
    except BadImage:
        raise
    except Exception as error:
        cut = data[:2] == b"\xff\xd8" and "truncated" in str(error).lower()
        raise BadImage("truncated_jpeg" if cut else "undecodable", str(error)) from error


def crop_box(key: str, view: int, crop: Crop, height: int, width: int) -> tuple[int, int, int, int]:
    """Draws the box of one view of one image: (top, left, height, width) in pixels.

    The rule is torchvision's RandomResizedCrop: up to ten draws of area and log aspect ratio,
    then the largest central box whose ratio is allowed. The draws are a hash of
    (crop.seed, key, view), so they depend on no library's generator and on no call order.
    """
    log_low, log_high = math.log(crop.ratio[0]), math.log(crop.ratio[1])
    draws = _uniforms(f"{crop.seed}\0{view}\0{key}")
    for _ in range(_TRIES):
        u_area, u_ratio, u_top, u_left = next(draws)
        area = height * width * (crop.scale[0] + u_area * (crop.scale[1] - crop.scale[0]))
        ratio = math.exp(log_low + u_ratio * (log_high - log_low))
        box_w, box_h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_w <= width and 0 < box_h <= height:
            top = int(u_top * (height - box_h + 1))
            return top, int(u_left * (width - box_w + 1)), box_h, box_w
    box_h, box_w = height, width
    if width / height < crop.ratio[0]:
        box_h = min(height, round(width / crop.ratio[0]))
    elif width / height > crop.ratio[1]:
        box_w = min(width, round(height * crop.ratio[1]))
    return (height - box_h) // 2, (width - box_w) // 2, box_h, box_w


def _uniforms(text: str) -> Iterator[tuple[float, float, float, float]]:
    """Gives endless groups of four numbers in [0, 1) from a hash in counter mode."""
    name = text.encode("utf-8", "surrogatepass")
    block = 0
    while True:
        digest = blake2b(name, digest_size=64, salt=struct.pack("<Q", block)).digest()
        words = struct.unpack("<16I", digest)
        for start in range(0, 16, 4):
            a, b, c, d = (word / 2**32 for word in words[start : start + 4])
            yield a, b, c, d
        block += 1


def resize(image: np.ndarray[Any, Any], px: int, out: Pixels | None = None) -> Pixels:
    """Resizes (H, W, 3) uint8 to a square of side px, into `out` where that is given.

    Stands in for antialiased bicubic at a quarter of its time: each axis that shrinks is blurred
    as much as it shrinks, then plain cubic takes over; far below, the mean of the covered area
    does. On photographs this lies 38 to 44 dB from Pillow's bicubic at any ratio.
    """
    ratios = image.shape[1] / px, image.shape[0] / px
    if max(ratios) > AREA_FROM:
        return cv2.resize(image, (px, px), out, interpolation=cv2.INTER_AREA)  # pyright: ignore
    if max(ratios) > BLUR_FROM:
        taps = [1 if ratio <= 1 else 3 if ratio < 2 else 5 for ratio in ratios]
        sigmas = [_BLUR * math.sqrt(max(ratio**2 - 1, 1e-6)) for ratio in ratios]
        image = cv2.GaussianBlur(image, taps, sigmaX=sigmas[0], sigmaY=sigmas[1])
    return cv2.resize(image, (px, px), out, interpolation=cv2.INTER_CUBIC)  # pyright: ignore


def render(
    data: bytes,
    key: str,
    view: int,
    crop: Crop,
    sizes: tuple[int, ...],
    out: Mapping[int, Pixels] | None = None,
) -> dict[int, Pixels]:
    """Decodes an image and renders one crop of it at every size: {px: (px, px, 3) uint8}.

    Args:
        data: The encoded image.
        key: The sample's key, which with `view` and `crop` draws the box.
        view: Which of the sample's crops.
        crop: How boxes are drawn.
        sizes: Sides in pixels.
        out: Where to write each size, new memory where None.

    Raises:
        BadImage: As `decode`.
    """
    picture = Picture(data)
    box = crop_box(key, view, crop, picture.height, picture.width)
    return {px: picture.cut(box, px, out[px] if out else None) for px in sizes}


class Picture:
    """An encoded image, decoded as far as the crops that are cut from it need.

    Args:
        data: Its bytes.

    Raises:
        BadImage: As `decode`.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._decoded: dict[int, np.ndarray[Any, Any]] = {}
        self.height, self.width = self._size()

    def _size(self) -> tuple[int, int]:
        """Reads the size of a JPEG from its header, of others from their pixels."""
        if self._data[:2] == b"\xff\xd8":
            with suppress(ValueError):
                height, width, *_ = simplejpeg.decode_jpeg_header(self._data)
                return int(height), int(width)
        self._decoded[1] = _decode_other(self._data)
        return self._decoded[1].shape[:2]

    def cut(self, box: tuple[int, int, int, int], px: int, out: Pixels | None = None) -> Pixels:
        """Returns a crop as (px, px, 3) uint8.

        A JPEG whose crop is at least twice as large as the picture wanted is decoded at a half or
        a quarter of its size, where libjpeg is fast. Each size is treated alone, so that what a
        student sees does not depend on its teacher's size.

        Args:
            box: Top, left, height and width in pixels of the whole image.
            px: Side of the picture wanted.
            out: Where it is to be written, new memory where None.

        Raises:
            BadImage: As `decode`.
        """
        top, left, height, width = box
        divisor = next((d for d in DIVISORS if min(height, width) >= d * px), 1)
        if divisor not in self._decoded:
            self._decoded[divisor] = decode(self._data, divisor)
        image = self._decoded[divisor]
        by = 1 if image.shape[:2] == (self.height, self.width) else divisor
        # Rounded to its pixels: the crop moves by at most half a pixel of the picture wanted.
        first, last = round(top / by), round((top + height) / by)
        start, stop = round(left / by), round((left + width) / by)
        return resize(image[first:last, start:stop], px, out)


def view_of(epoch: int, views: int | None, seed: int = 0) -> int:
    """Says which view of a sample an epoch shows.

    A new one each time where `views` is None; else each of them once before any comes again, in
    an order that the run's seed draws.
    """
    if views is None:
        return epoch
    turn, place = divmod(epoch, views)
    return int(permutation(views, "views", seed, turn)[place])


def caption_of(epoch: int, captions: int) -> int:
    """Says which of a sample's captions an epoch shows."""
    return epoch % captions
