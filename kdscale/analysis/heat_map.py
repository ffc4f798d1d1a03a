"""A picture of the similarities between all layers of two models."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

CELL_IN, LEAST_IN, MARGIN_IN = 0.24, 2.4, 1.6
DPI = 150


def heat_map(
    panels: Mapping[str, npt.NDArray[np.float64]],
    rows: tuple[str, Sequence[str]],
    columns: tuple[str, Sequence[str]],
) -> bytes:
    """Draws matrices of similarities side by side, on one scale from 0 to 1.

    Args:
        panels: {title: (L, M) matrix}; values outside of the scale take the colour of its end,
            and NaN is grey.
        rows: The first model's name and its L layers, drawn from the bottom up.
        columns: The second model's name and its M layers.

    Returns:
        A PNG; the same bytes for the same arguments.
    """
    height = max(LEAST_IN, CELL_IN * len(rows[1]))
    width = max(LEAST_IN, CELL_IN * len(columns[1]))
    size = (len(panels) * (width + MARGIN_IN) + 0.8, height + MARGIN_IN)
    figure: Any = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    all_axes: Any = figure.subplots(1, len(panels), squeeze=False)[0]
    colours = matplotlib.colormaps["viridis"].with_extremes(bad="#c8c8c8")
    drawn: Any = None
    for axes, (title, matrix) in zip(all_axes, panels.items(), strict=True):
        drawn = axes.imshow(matrix, cmap=colours, vmin=0, vmax=1, origin="lower", aspect="auto")
        axes.set_title(title, fontsize=9)
        axes.set_xticks(range(len(columns[1])), columns[1], rotation=90, fontsize=6)
        axes.set_yticks(range(len(rows[1])), rows[1], fontsize=6)
        axes.set_xlabel(columns[0], fontsize=8)
        axes.set_ylabel(rows[0], fontsize=8)
    figure.colorbar(drawn, ax=list(all_axes), label="CKA")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()
