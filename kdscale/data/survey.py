"""What shards hold, at a glance: sizes, captions and a few samples, without decoding images.

Nothing is judged here: `kdscale.data.shards` verifies.
"""

from __future__ import annotations

import io
import random
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import fsspec
import numpy as np
from PIL import Image

from kdscale.data.order import permutation
from kdscale.data.raw import RawSample, expand, read_shard

MAX_SHARDS = 16
MAX_SAMPLES = 16_000
MEGAPIXELS = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
FORMATS = ("JPEG", "PNG", "WEBP", "MPO")


@dataclass
class Survey:
    """Numbers of the samples that were looked at.

    Attributes:
        num_shards: All that the pattern names.
        num_bytes: Size of all of them.
        looked_shards: Those that were looked into.
        whole: Every sample of every shard was looked at.
        num_samples: Samples that were looked at.
        sizes: (width, height) of every image.
        image_bytes: Size of every image file.
        characters: Length of every caption.
        words: Number of words of every caption.
        formats: Images by format.
        faults: Samples with something amiss that can be seen without decoding.
        picked: Samples drawn at random among them.
    """

    num_shards: int
    num_bytes: int
    looked_shards: int = 0
    whole: bool = True
    num_samples: int = 0
    sizes: list[tuple[int, int]] = field(default_factory=list)
    image_bytes: list[int] = field(default_factory=list)
    characters: list[int] = field(default_factory=list)
    words: list[int] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    picked: list[RawSample] = field(default_factory=list)

    def add(self, sample: RawSample) -> None:
        """Counts a sample."""
        self.num_samples += 1
        if sample.jpg:
            self.image_bytes.append(len(sample.jpg))
            self._add_image(sample.jpg)
        else:
            self.faults["missing_image"] += 1
        try:
            caption = sample.caption
        except UnicodeDecodeError:
            self.faults["non_utf8_caption"] += 1
            return
        if caption:
            self.characters.append(len(caption))
            self.words.append(len(caption.split()))
        else:
            self.faults["missing_caption" if sample.txt is None else "empty_caption"] += 1

    def _add_image(self, data: bytes) -> None:
        """Counts an image by what its header says."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                picture = Image.open(io.BytesIO(data), formats=FORMATS)
        except Exception:  # damaged files make Pillow raise almost anything
            self.faults["unreadable_image"] += 1
            return
        # A JPEG with a preview is an MPO to Pillow and a JPEG to everybody else.
        kind = "JPEG" if data[:2] == b"\xff\xd8" else str(picture.format)
        self.formats[kind] += 1
        self.sizes.append(picture.size)

    def megapixels(self) -> list[tuple[float, int]]:
        """Counts images by size: (lower edge in megapixels, number), for every edge."""
        areas = [width * height / 1e6 for width, height in self.sizes]
        counts = np.histogram(areas, (*MEGAPIXELS, np.inf))[0]
        return list(zip(MEGAPIXELS, counts.tolist(), strict=True))

    def document(self) -> dict[str, Any]:
        """Returns the numbers as JSON."""
        images = sum(self.formats.values())
        return {
            "shards": self.num_shards,
            "bytes": self.num_bytes,
            "looked_at": {"shards": self.looked_shards, "samples": self.num_samples},
            "whole": self.whole,
            "width": quantiles([width for width, _ in self.sizes]),
            "height": quantiles([height for _, height in self.sizes]),
            "megapixels": [{"from": edge, "images": count} for edge, count in self.megapixels()],
            "image_bytes": quantiles(self.image_bytes),
            "formats": dict(self.formats.most_common()),
            "non_jpeg": 1 - self.formats["JPEG"] / images if images else None,
            "caption_characters": quantiles(self.characters),
            "caption_words": quantiles(self.words),
            "faults": dict(self.faults.most_common()),
        }


def quantiles(values: list[int]) -> dict[str, float] | None:
    """Returns minimum, median, 95th percentile, maximum and mean; None of nothing."""
    if not values:
        return None
    low, median, high, top = np.percentile(values, (0, 50, 95, 100)).tolist()
    return {"min": low, "median": median, "p95": high, "max": top, "mean": float(np.mean(values))}


def survey(
    urls: str,
    *,
    num_picked: int = 48,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Survey:
    """Looks into shards: all of a small set, else the beginnings of some drawn at random.

    Args:
        urls: A pattern of shards.
        num_picked: Samples to keep, drawn at random among those looked at.
        seed: Decides which shards and samples are drawn.
        progress: Told (shards looked into, shards to look into).

    Raises:
        NoShards: The pattern matches nothing.
        DataError: A shard is no shard at all.
    """
    places = [fsspec.core.url_to_fs(path) for path in expand(urls)]
    found = Survey(len(places), sum(int(fs.size(path)) for fs, path in places))
    chosen = np.sort(permutation(len(places), "survey", seed)[:MAX_SHARDS]).tolist()
    limit = MAX_SAMPLES // len(chosen)
    draw = random.Random(seed)
    for number, (fs, path) in enumerate(places[index] for index in chosen):
        progress(number, len(chosen))
        samples = read_shard(path, fs)
        for sample in islice(samples, limit):
            found.add(sample)
            place = draw.randrange(found.num_samples)
            if len(found.picked) < num_picked:
                found.picked.append(sample)
            elif place < num_picked:
                found.picked[place] = sample
        found.looked_shards += 1
        found.whole = found.whole and next(samples, None) is None
    found.whole = found.whole and found.looked_shards == found.num_shards
    progress(len(chosen), len(chosen))
    return found
