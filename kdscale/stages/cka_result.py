"""What a comparison of two models says, and the files that say it."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdscale.analysis.heat_map import heat_map
from kdscale.analysis.layer_cka import LayerCKAResult, sums_bytes
from kdscale.core.types import ConfigError
from kdscale.data.image_sets import ImageSet, TooFewImages

LEAST_IMAGES = 4
MOST_BYTES = 16 * 2**30
RESULT, ARRAYS, PICTURE = "cka.json", "cka.npz", "cka.png"


@dataclass(frozen=True, kw_only=True)
class CkaOutcome:
    """The similarity of two models on one set of images.

    Attributes:
        names: The models'.
        layers: Names of the layers of each; the last is the final one.
        result: The matrices.
        num_duplicates: Images that were left out because another has the same bytes.
        faults: Images that were left out because they give no picture, by cause.
    """

    names: tuple[str, str]
    tap: str
    layers: tuple[list[str], list[str]]
    result: LayerCKAResult
    num_duplicates: int
    faults: dict[str, int]

    @property
    def biased(self) -> float:
        """Linear CKA of the final layers."""
        return float(self.result.biased[-1, -1])

    @property
    def debiased(self) -> float:
        """Debiased CKA of the final layers."""
        return float(self.result.debiased[-1, -1])

    def metrics(self) -> dict[str, float]:
        """Returns what a tracker logs; what is undefined is absent."""
        found = {"cka_biased": self.biased, "cka_debiased": self.debiased}
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def notes(self) -> list[str]:
        """Explains, in sentences, what is undefined."""
        found: list[str] = []
        sides = (self.result.constant_x, self.result.constant_y)
        for name, layers, constant in zip(self.names, self.layers, sides, strict=True):
            if constant:
                where = ", ".join(layers[place] for place in constant)
                found.append(
                    f"{name} gives all images the same vector in {where}: CKA divides by its "
                    "variance, which is zero, so it is undefined (NaN) there"
                )
        undefined = bool(np.isnan(self.result.debiased).any())
        if undefined and not found:
            found.append(
                "a layer's own debiased estimate is not positive on so few images, so that the "
                "debiased CKA is undefined (NaN): use more images"
            )
        return found

    def document(self) -> dict[str, Any]:
        """Returns everything as JSON; NaN becomes null."""
        result = self.result
        return {
            "a": self.names[0],
            "b": self.names[1],
            "tap": self.tap,
            "n": result.n,
            "p": result.p[-1],
            "q": result.q[-1],
            "biased": _number(self.biased),
            "debiased": _number(self.debiased),
            "layers": {
                "a": dict(zip(self.layers[0], result.p, strict=True)),
                "b": dict(zip(self.layers[1], result.q, strict=True)),
                "biased": [[_number(value) for value in row] for row in result.biased],
                "debiased": [[_number(value) for value in row] for row in result.debiased],
            },
            "duplicates": self.num_duplicates,
            "unreadable": self.faults,
            "notes": self.notes(),
        }


def documents(outcome: CkaOutcome) -> dict[str, bytes]:
    """Makes the files of a comparison: {name: content}.

    The JSON says all; the arrays are there for programs; the picture only where there are several
    layers.
    """
    arrays = io.BytesIO()
    np.savez(
        arrays,
        biased=outcome.result.biased,
        debiased=outcome.result.debiased,
        layers_a=np.array(outcome.layers[0]),
        layers_b=np.array(outcome.layers[1]),
    )
    text = json.dumps(outcome.document(), indent=2, allow_nan=False)
    found = {RESULT: text.encode(), ARRAYS: arrays.getvalue()}
    if outcome.result.biased.size > 1:
        n = outcome.result.n
        panels = {
            f"debiased, {outcome.tap}, n = {n:,}": outcome.result.debiased,
            f"biased, {outcome.tap}, n = {n:,}": outcome.result.biased,
        }
        (a, b), (rows, columns) = outcome.names, outcome.layers
        found[PICTURE] = heat_map(panels, (a, rows), (b, columns))
    return found


def check_enough(num_images: int, images: ImageSet, faults: Mapping[str, int]) -> None:
    """Checks that there are enough distinct images for an unbiased estimate.

    Raises:
        TooFewImages: There are fewer than four.
    """
    if num_images < LEAST_IMAGES:
        causes = ", ".join(f"{cause} {count}" for cause, count in faults.items() if count)
        raise TooFewImages(
            f"{num_images} distinct images are left in {images.shards[0].path} and its like "
            f"({images.num_duplicates} duplicates; unreadable: {causes or 'none'}); the debiased "
            f"estimate needs {LEAST_IMAGES}, and a stable one some hundreds"
        )


def check_memory(widths_a: Sequence[int], widths_b: Sequence[int]) -> None:
    """Checks that the sums of all pairs of layers fit into memory.

    Raises:
        ConfigError: They take more than `MOST_BYTES`.
    """
    needed = sums_bytes(widths_a, widths_b)
    if needed > MOST_BYTES:
        raise ConfigError(
            f"{len(widths_a)} x {len(widths_b)} layers need {needed / 2**30:.1f} GiB of sums, at "
            f"most {MOST_BYTES / 2**30:.0f} are allowed; choose fewer blocks, e.g. layers=6"
        )


def _number(value: float) -> float | None:
    """A number as JSON has it."""
    return float(value) if math.isfinite(value) else None
