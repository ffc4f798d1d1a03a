"""The sample sheet: benchmark images with their true class and what students made of them."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import cv2
import fsspec  # pyright: ignore[reportMissingTypeStubs]
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kdscale.core.config import ZeroShotSpec
from kdscale.core.storage import Storage
from kdscale.core.types import DataError
from kdscale.data.raw import RawSample
from kdscale.data.samples import decode
from kdscale.data.shards import Manifest, ShardEntry, read_good
from kdscale.stages.inputs import find_source
from kdscale.sweep.figures import BAD, GOOD, INK, WIDTH_IN, short
from kdscale.sweep.outcomes import Predictions, TrialRow, class_names
from kdscale.sweep.report import Report

NUM_IMAGES = 24
AMONG_FIRST = 4096  # a sheet must not read through a whole large benchmark
MAX_MODELS = 4
IMAGE_PX = 112
COLUMNS = 6
LINE_IN = 0.17
GAP_IN = 0.2


@dataclass(frozen=True)
class Sample:
    """One benchmark image of the sheet.

    Attributes:
        image: (H, W, 3) uint8, square.
        truth: Name of its class.
        answers: (name of the answered class, whether it is right), one per model.
    """

    image: np.ndarray
    truth: str
    answers: tuple[tuple[str, bool], ...]


def sheet_figure(report: Report, sweep: str, storage: Storage) -> Figure | None:
    """Draws images of the benchmark, drawn at random, with the answers of finished students.

    Shows all students of a small sweep, else the best one and its control.

    Args:
        report: Whose predictions are shown.
        sweep: Which of its sweeps.
        storage: Where drawn data and manifests are kept.

    Returns:
        None where no student has predictions.

    Raises:
        DataError: If the images are not those that the predictions are of.
    """
    rows = _models(report, sweep)
    if not rows:
        return None
    answers = [_predictions(report, row) for row in rows]
    outcome = report.outcomes[str(rows[0].key)]
    spec = cast(ZeroShotSpec, outcome.stage.training.zero_shot)
    manifest = find_source(spec.data, storage, labelled=True).manifest()
    names = class_names(spec)
    samples = [
        Sample(
            image,
            names[answers[0].labels[index]],
            tuple((names[a.answers[index]], a.answers[index] == a.labels[index]) for a in answers),
        )
        for index, image in _images(manifest, answers[0].keys)
    ]
    titles = [
        f"{row.name}{' (control)' if row.is_baseline else ''}: "
        f"{row.score.top1:.1f} % of {row.score.n:,} right"
        for row in rows
        if row.score is not None
    ]
    return draw_sheet(samples, titles)


def _models(report: Report, sweep: str) -> list[TrialRow]:
    """Picks the students of the sheet, all with predictions on the same images, best first."""
    rows = [row for row in report.of(sweep) if row.score is not None]
    rows.sort(key=lambda row: (row.is_baseline, -(row.score.top1 if row.score else 0.0)))
    same = [
        row for row in rows if _predictions(report, row).keys == _predictions(report, rows[0]).keys
    ]
    if len(same) <= MAX_MODELS:
        return same
    controls = same[0].difference.controls if same[0].difference else ()
    return (same[:1] + [row for row in same[1:] if row.name in controls])[:MAX_MODELS]


def _predictions(report: Report, row: TrialRow) -> Predictions:
    """Returns the predictions that a row's score was computed from."""
    found = report.outcomes[str(row.key)].predictions
    assert found is not None
    return found


def _images(manifest: Manifest, keys: Sequence[str]) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (place, image) of some images, always the same ones.

    Raises:
        DataError: If the data set does not hold the keys in this order.
    """
    if manifest.num_samples != len(keys):
        raise DataError(
            f"the predictions are of {len(keys)} images, the benchmark now has "
            f"{manifest.num_samples}: it has changed since"
        )
    limit = min(len(keys), AMONG_FIRST)
    wanted = set(random.Random(0).sample(range(limit), min(NUM_IMAGES, limit)))
    for index, sample in enumerate(chain.from_iterable(map(_stream, manifest.shards))):
        if index in wanted:
            if sample.key != keys[index]:
                raise DataError(
                    f"image {index} is {sample.key!r}, the predictions are of {keys[index]!r}: "
                    "the benchmark has changed since"
                )
            yield index, _square(decode(sample.jpg or b""))
            wanted.remove(index)
        if not wanted:
            return


def _stream(entry: ShardEntry) -> Iterator[RawSample]:
    """Streams a shard's usable samples, undecoded."""
    fs, path = cast(Any, fsspec).core.url_to_fs(entry.path)
    return read_good(path, fs, entry)


def _square(rgb: np.ndarray) -> np.ndarray:
    """Crops the centre and shrinks it where it is large."""
    side = min(rgb.shape[:2])
    top, left = (rgb.shape[0] - side) // 2, (rgb.shape[1] - side) // 2
    crop = rgb[top : top + side, left : left + side]
    if side <= IMAGE_PX:
        return crop
    return cv2.resize(crop, (IMAGE_PX, IMAGE_PX), interpolation=cv2.INTER_AREA)


def draw_sheet(samples: Sequence[Sample], models: Sequence[str]) -> Figure:
    """Draws images with the true class above and every model's answer below.

    Args:
        samples: What to show, at least one.
        models: What each answer's model is called, in the order of the answers.
    """
    cell = WIDTH_IN / COLUMNS
    side = cell - GAP_IN
    row = side + LINE_IN * (len(models) + 1.9)
    head = LINE_IN * (len(models) + 0.8)
    height = head + row * math.ceil(len(samples) / COLUMNS)
    figure: Any = Figure(figsize=(WIDTH_IN, height), facecolor="white")
    FigureCanvasAgg(figure)
    for index, name in enumerate(models):
        top = 1 - LINE_IN * (index + 0.2) / height
        text = f"{_letter(index)}   {name}"
        figure.text(0.01, top, text, color=INK, fontsize=9, va="top", parse_math=False)
    for index, sample in enumerate(samples):
        left = (index % COLUMNS) * cell + GAP_IN / 2
        top = head + (index // COLUMNS) * row + LINE_IN * 1.3
        place = (left / WIDTH_IN, 1 - (top + side) / height, side / WIDTH_IN, side / height)
        _draw_sample(figure.add_axes(place), sample, LINE_IN / side)
    return figure


def _draw_sample(axes: Any, sample: Sample, line: float) -> None:
    """Draws one image; `line` is the height of a line of text as a part of the image's side."""
    axes.imshow(sample.image, interpolation="none")
    axes.set_axis_off()
    options = {"transform": axes.transAxes, "ha": "center", "fontsize": 8, "parse_math": False}
    axes.text(0.5, 1.03, short(sample.truth, 22), va="bottom", weight="bold", color=INK, **options)
    for index, (answer, right) in enumerate(sample.answers):
        text = f"{_letter(index)} {'✓' if right else '✗'} {short(answer, 20)}"
        colour = GOOD if right else BAD
        axes.text(0.5, -0.04 - line * index, text, va="top", color=colour, **options)


def _letter(index: int) -> str:
    """Names a model of the sheet."""
    return chr(ord("A") + index)
