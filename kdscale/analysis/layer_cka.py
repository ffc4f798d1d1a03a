"""Linear CKA between all layers of two models, in one pass over the images.

Shapes: N images of one batch or block, P and Q the widths of one layer of each model, L and M
the numbers of their layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kdscale.analysis.cka_sums import (
    AnyArray,
    Array,
    Features,
    PairSums,
    as_matrix,
    check_size,
    hsic,
    hsic_ratio,
    reference_of,
    shifted_blocks,
)
from kdscale.core.types import DataError

VECTORS = 4  # of a layer's width, in the sums of one pair


@dataclass(frozen=True, kw_only=True)
class LayerCKAResult:
    """Similarity of every layer of one model to every layer of another on the same images.

    Attributes:
        biased: (L, M) linear CKA, in [0, 1] up to rounding; NaN where a layer is constant.
        debiased: (L, M) CKA of the unbiased HSIC estimates; NaN for fewer than four images or
            where a layer's own estimate is not positive.
        n: Number of images.
        p: Widths of the first model's layers.
        q: Widths of the second model's.
        constant_x: First model's layers that give all images the same vector.
        constant_y: The same of the second model.
    """

    biased: Array
    debiased: Array
    n: int
    p: tuple[int, ...]
    q: tuple[int, ...]
    constant_x: tuple[int, ...] = ()
    constant_y: tuple[int, ...] = ()


class LayerCKA:
    """Sums from which the CKA of every pair of layers follows, fed batch by batch.

    The numbers are those of one `LinearCKA` per pair of layers; a layer's own sums are kept once.
    Memory depends on the widths alone, not on the number of images: see `sums_bytes`. Feeding the
    same batches in the same order repeats the result, but for the last digits: NumPy rounds
    products of odd widths by where their factors lie in memory.

    Source: as `kdscale.analysis.cka.LinearCKA`; the matrix of layers as in Kornblith et al. 2019.
    """

    def __init__(self) -> None:
        self._n: int = 0
        self._references: tuple[list[Array], list[Array]] = ([], [])
        self._own_x: list[PairSums] = []
        self._own_y: list[PairSums] = []
        self._cross: list[list[PairSums]] = []

    def update(self, x: Sequence[Features], y: Sequence[Features]) -> LayerCKA:
        """Adds one batch of images.

        Args:
            x: The first model's layers, each (N, P) of any float dtype; N >= 1.
            y: The second model's, each (N, Q), for the same images in the same order. Passing
                the same object twice makes the CKA of a layer with itself exactly 1.

        Returns:
            This accumulator.

        Raises:
            DataError: No layer, a layer that is no matrix of finite floats, different numbers of
                rows, or other layers than earlier. The accumulator is then unchanged.
        """
        layers_x = [as_matrix(layer, f"layer {i} of x") for i, layer in enumerate(x)]
        layers_y = layers_x
        if y is not x:
            layers_y = [as_matrix(layer, f"layer {i} of y") for i, layer in enumerate(y)]
        self._check(layers_x, layers_y)
        if not self._n:
            self._start(layers_x, layers_y)
        blocks_x = zip(*map(shifted_blocks, layers_x, self._references[0]), strict=True)
        blocks_y = zip(*map(shifted_blocks, layers_y, self._references[1]), strict=True)
        for block_x in blocks_x:
            self._add_block(block_x, block_x if layers_y is layers_x else next(blocks_y))
        self._n += len(layers_x[0])
        return self

    def result(self) -> LayerCKAResult:
        """Computes both estimates of every pair from the images so far; more may follow.

        Returns:
            The matrices with the number of images and the widths.

        Raises:
            DataError: The features are so large that their fourth powers would overflow float64.
        """
        check_size(*self._own_x, *self._own_y)
        own_x = [self._hsic(sums, sums, sums) for sums in self._own_x]
        own_y = [self._hsic(sums, sums, sums) for sums in self._own_y]
        biased, debiased = (np.full((len(own_x), len(own_y)), math.nan) for _ in range(2))
        for i, row in enumerate(self._cross if self._n else []):
            for j, sums in enumerate(row):
                cross = self._hsic(sums, self._own_x[i], self._own_y[j])
                for matrix, xx, yy, xy in zip(
                    (biased, debiased), own_x[i], own_y[j], cross, strict=True
                ):
                    matrix[i, j] = hsic_ratio({"xx": xx, "yy": yy, "xy": xy})
        return LayerCKAResult(
            biased=biased,
            debiased=debiased,
            n=self._n,
            p=tuple(reference.size for reference in self._references[0]),
            q=tuple(reference.size for reference in self._references[1]),
            constant_x=_constant(own_x),
            constant_y=_constant(own_y),
        )

    def _check(self, layers_x: Sequence[AnyArray], layers_y: Sequence[AnyArray]) -> None:
        """Refuses batches whose layers do not fit each other or the earlier ones."""
        rows = {len(layer) for layer in (*layers_x, *layers_y)}
        if not layers_x or not layers_y or len(rows) > 1:
            raise DataError(
                f"{len(layers_x)} and {len(layers_y)} layers with {sorted(rows)} rows; give at "
                + "least one layer of each model, all for the same images"
            )
        widths = [[layer.shape[1] for layer in side] for side in (layers_x, layers_y)]
        wanted = [[reference.size for reference in side] for side in self._references]
        if self._n and widths != wanted:
            raise DataError(
                f"layers of widths {widths} cannot join sums over widths {wanted}; use one "
                + "accumulator per pair of models"
            )

    def _start(self, layers_x: Sequence[AnyArray], layers_y: Sequence[AnyArray]) -> None:
        """Fixes widths and reference vectors from the first batch."""
        references_x = [reference_of(layer) for layer in layers_x]
        references_y = [reference_of(layer) for layer in layers_y]
        self._references = references_x, references_y
        self._own_x = [PairSums(r.size, r.size) for r in references_x]
        self._own_y = [PairSums(r.size, r.size) for r in references_y]
        self._cross = [[PairSums(x.size, y.size) for y in references_y] for x in references_x]

    def _add_block(self, block_x: Sequence[Array], block_y: Sequence[Array]) -> None:
        """Adds one block of shifted features of all layers."""
        norms_x = [np.einsum("np,np->n", layer, layer) for layer in block_x]
        norms_y = norms_x
        if block_y is not block_x:
            norms_y = [np.einsum("nq,nq->n", layer, layer) for layer in block_y]
        for sums, layer, norms in zip(self._own_x, block_x, norms_x, strict=True):
            sums.add_block(layer, layer, norms, norms)
        for sums, layer, norms in zip(self._own_y, block_y, norms_y, strict=True):
            sums.add_block(layer, layer, norms, norms)
        for row, x, norms_of_x in zip(self._cross, block_x, norms_x, strict=True):
            for sums, y, norms_of_y in zip(row, block_y, norms_y, strict=True):
                sums.add_block(x, y, norms_of_x, norms_of_y)

    def _hsic(self, sums: PairSums, own_x: PairSums, own_y: PairSums) -> tuple[float, float]:
        """Computes one pair's HSIC up to a common factor: (biased, debiased)."""
        if not self._n:
            return math.nan, math.nan
        return hsic(self._n, sums, own_x.sum_x_P / self._n, own_y.sum_x_P / self._n)


def sums_bytes(widths_x: Sequence[int], widths_y: Sequence[int]) -> int:
    """Returns the memory that a `LayerCKA` takes, whatever the number of images.

    A ViT-T against SigLIP SO400M takes 13 MB for their final layers and 0.9 GB for all of them
    (13 x 192 against 28 x 1152); CLIP ViT-L against SigLIP SO400M takes 7 GB, most of it for the
    25 x 28 products of pairs.

    Args:
        widths_x: Widths of the first model's layers.
        widths_y: Widths of the second model's.

    Returns:
        Bytes.
    """
    own = sum(p * p + VECTORS * p for p in (*widths_x, *widths_y))
    cross = sum(p * q + 2 * (p + q) for p in widths_x for q in widths_y)
    return np.dtype(np.float64).itemsize * (own + cross)


def _constant(own: Sequence[tuple[float, float]]) -> tuple[int, ...]:
    """Lists the layers without any variance."""
    return tuple(i for i, (squared, _) in enumerate(own) if squared == 0.0)
