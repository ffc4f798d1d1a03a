"""The contact sheet: images with their captions, in columns of equal width.

Lengths are pixels of the sheet unless they say otherwise.
"""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kdscale.core.types import DataError
from kdscale.data.raw import RawSample
from kdscale.data.samples import BadImage, decode

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
INK, MUTED, PAPER, EMPTY = "#1b1f24", "#59636e", (250, 250, 248), (232, 233, 230)
DPI = 150
COLUMN, MAX_COLUMNS = 272, 7
GAP, MARGIN, HEAD = 26, 44, 122
LINE_CHARACTERS, MAX_LINES = 32, 4
LINE, TEXT_GAP, CARD_GAP = 21, 9, 22
TALLEST, WIDEST = 1.6, 2.2
RADIUS = 7


@dataclass(frozen=True)
class Card:
    """A sample as it appears on the sheet.

    Attributes:
        image: (H, COLUMN, 3).
        lines: Its caption, wrapped.
        note: What the file is.
    """

    image: Pixels
    lines: tuple[str, ...]
    note: str

    @property
    def height(self) -> int:
        """Height with text and the gap below."""
        return self.image.shape[0] + TEXT_GAP + LINE * (len(self.lines) + 1) + CARD_GAP


def contact_sheet(samples: Sequence[RawSample], title: str, subtitle: str) -> bytes:
    """Draws samples as a PNG.

    Args:
        samples: At least one; an image that cannot be decoded leaves a grey field with the cause.
        title: Large, above.
        subtitle: Small, below the title.

    Raises:
        DataError: There are no samples.
    """
    if not samples:
        raise DataError("there is no sample to draw: the shards are empty")
    cards = [make_card(sample) for sample in samples]
    places, width, bottom = arrange([card.height for card in cards])
    height = HEAD + bottom + MARGIN - CARD_GAP
    canvas = np.full((height, width, 3), PAPER, np.uint8)
    for card, (left, top) in zip(cards, places, strict=True):
        canvas[top : top + card.image.shape[0], left : left + COLUMN] = card.image
    figure: Any = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    FigureCanvasAgg(figure)
    figure.figimage(canvas, 0, 0, origin="upper")

    def write(left: float, top: float, text: str, size: float, **options: Any) -> None:
        """Writes a text whose left upper corner is given in pixels."""
        where = (left / width, 1 - top / height)
        figure.text(*where, text, fontsize=size, va="top", parse_math=False, **options)

    write(MARGIN, MARGIN * 0.75, title, 15, color=INK, weight="bold")
    write(MARGIN, MARGIN * 0.75 + 42, subtitle, 9, color=MUTED)
    for card, (left, top) in zip(cards, places, strict=True):
        top += card.image.shape[0] + TEXT_GAP
        for index, line in enumerate(card.lines):
            write(left, top + LINE * index, line, 7.6, color=INK)
        write(left, top + LINE * len(card.lines) + 2, card.note, 6.2, color=MUTED)
    return _png(figure)


def arrange(heights: Sequence[int]) -> tuple[list[tuple[int, int]], int, int]:
    """Deals cards to columns that end at nearly the same height.

    Returns:
        (left, top) of every card, the sheet's width, and the height of the tallest column.
    """
    num_columns = min(MAX_COLUMNS, max(3, round(len(heights) ** 0.5)))
    loads, columns = [0] * num_columns, [0] * len(heights)
    for index in sorted(range(len(heights)), key=lambda index: -heights[index]):
        columns[index] = loads.index(min(loads))
        loads[columns[index]] += heights[index]
    ends = [0] * num_columns
    places: list[tuple[int, int]] = []
    for column, height in zip(columns, heights, strict=True):
        places.append((MARGIN + column * (COLUMN + GAP), HEAD + ends[column]))
        ends[column] += height
    return places, 2 * MARGIN + num_columns * (COLUMN + GAP) - GAP, max(ends)


def make_card(sample: RawSample) -> Card:
    """Shrinks a sample's image to the width of a column and wraps its caption."""
    data = sample.jpg or b""
    try:
        caption = sample.caption or "(no caption)"
    except UnicodeDecodeError:
        caption = "(the caption is not UTF-8)"
    lines = textwrap.wrap(caption, LINE_CHARACTERS, max_lines=MAX_LINES, placeholder=" …")
    try:
        image = decode(data)
        note = f"{image.shape[1]} × {image.shape[0]}   {len(data) / 1e3:,.0f} kB"
    except BadImage as error:
        image = np.full((3, 4, 3), EMPTY, np.uint8)
        note = error.cause if data else "no image"
    return Card(_fitted(image), tuple(lines), note)


def _fitted(image: Pixels) -> Pixels:
    """Scales an image to the column's width with round corners; panoramas and towers are cut."""
    height, width = image.shape[:2]
    if height > TALLEST * width:
        cut = round((height - TALLEST * width) / 2)
        image = image[cut : height - cut]
    elif width > WIDEST * height:
        cut = round((width - WIDEST * height) / 2)
        image = image[:, cut : width - cut]
    size = COLUMN, max(2 * RADIUS, round(COLUMN * image.shape[0] / image.shape[1]))
    how = cv2.INTER_AREA if image.shape[1] > COLUMN else cv2.INTER_CUBIC
    small = cv2.resize(np.ascontiguousarray(image), size, interpolation=how)
    mask = _corners(size[1])[..., None]
    return (small * mask + np.array(PAPER) * (1 - mask)).round().astype(np.uint8)


def _corners(height: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Draws (height, COLUMN) of ones, falling to zero in the corners."""
    x, y = np.arange(COLUMN) + 0.5, np.arange(height) + 0.5
    beyond_x = np.maximum(RADIUS - np.minimum(x, COLUMN - x), 0)
    beyond_y = np.maximum(RADIUS - np.minimum(y, height - y), 0)
    return np.clip(RADIUS + 0.5 - np.hypot(beyond_x[None], beyond_y[:, None]), 0, 1)


def _png(figure: Any) -> bytes:
    """Renders the sheet; a script that the font lacks shows as boxes, not as warnings."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
