"""Linear CKA between the features that two models give to the same images, in one pass.

The features are never held together: each batch goes into sums whose size depends on the
widths alone, and the sums of several shards add up. All sums are taken in float64 over
features shifted by a fixed reference vector per model; without that shift, features whose
mean is large against their spread would lose every digit to cancellation.

Two estimates come out. The biased one is the usual linear CKA, which tends to 1 for unrelated
models when the images are few against the widths. The debiased one replaces HSIC by its
unbiased U-statistic and stays near 0 there.

Shapes: N images of one batch or block, P width of the first model, Q width of the second.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdscale.analysis.cka_sums import (
    PAIRS,
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

__all__ = ["CKAResult", "Features", "LinearCKA", "linear_cka"]


@dataclass(frozen=True, kw_only=True)
class CKAResult:
    """Similarity of two models' features on the same images.

    Attributes:
        biased: Linear CKA, in [0, 1] up to rounding; NaN where a model's features are constant.
        debiased: CKA of the unbiased HSIC estimates, at most about 1 and possibly below 0; NaN
            for fewer than four images or where a model's own estimate is not positive.
        n: Number of images.
        p: Width of the first model, 0 before any image.
        q: Width of the second model, 0 before any image.
    """

    biased: float
    debiased: float
    n: int
    p: int
    q: int


class LinearCKA:
    """Sums from which the linear CKA of two models follows, fed batch by batch.

    The first batch fixes the widths and the reference vectors. Feeding the same batches in
    the same order, and merging in the same order, repeats the result but for the last digits
    (of odd widths); any other order changes rounding only. The sums take 8 (P^2 + Q^2 + P Q)
    bytes and a few vectors.

    Source: Kornblith et al. 2019, "Similarity of Neural Network Representations Revisited"
    (biased); Song et al. 2012, "Feature Selection via Dependence Maximization", HSIC_1, put
    into the same ratio (debiased).
    """

    def __init__(self) -> None:
        self._n: int = 0
        self._reference_x_P: Array = np.zeros(0)
        self._reference_y_Q: Array = np.zeros(0)
        self._sums: dict[str, PairSums] = {}

    def update(self, x: Features, y: Features) -> LinearCKA:
        """Adds one batch of images.

        Args:
            x: (N, P) features of the first model, any float dtype, any device; N >= 1.
            y: (N, Q) features of the second model for the same images, in the same order.
                Passing the same object twice makes the CKA exactly 1.

        Returns:
            This accumulator.

        Raises:
            DataError: Not a two-dimensional float array, an empty batch, different numbers of
                rows, a width other than the earlier ones, or a value that is not finite.
                The accumulator is then unchanged.
        """
        x_NP = as_matrix(x, "x")
        y_NQ = x_NP if y is x else as_matrix(y, "y")
        if len(x_NP) != len(y_NQ):
            raise DataError(
                f"x has {len(x_NP)} rows, y {len(y_NQ)}; give features of the same images"
            )
        if self._n:
            self._check_widths(x_NP.shape[1], y_NQ.shape[1])
        else:
            self._start(x_NP, y_NQ)
        blocks_y = shifted_blocks(y_NQ, self._reference_y_Q)
        for block_x in shifted_blocks(x_NP, self._reference_x_P):
            block_y = block_x if y_NQ is x_NP else next(blocks_y)
            self._add_block(block_x, block_y)
        self._n += len(x_NP)
        return self

    def merge(self, other: LinearCKA) -> LinearCKA:
        """Adds the images of another accumulator, which stays as it is.

        Args:
            other: Sums over further images for the same two models; may be empty.

        Returns:
            This accumulator.

        Raises:
            DataError: The widths differ.
        """
        if other._n == 0:
            return self
        if self._n == 0:
            vars(self).update(deepcopy(vars(other)))
            return self
        self._check_widths(other._reference_x_P.size, other._reference_y_Q.size)
        shift_x_P = self._reference_x_P - other._reference_x_P
        shift_y_Q = self._reference_y_Q - other._reference_y_Q
        for pair, sums in other._shifted(shift_x_P, shift_y_Q).items():
            self._sums[pair].add(sums)
        self._n += other._n
        return self

    def result(self) -> CKAResult:
        """Computes both estimates from the images so far; more may follow.

        Returns:
            The estimates with the number of images and the widths.

        Raises:
            DataError: The features are so large that their fourth powers would overflow float64.
        """
        n, p, q = self._n, self._reference_x_P.size, self._reference_y_Q.size
        if n == 0:
            return CKAResult(biased=math.nan, debiased=math.nan, n=0, p=p, q=q)
        own = (self._sums["xx"], self._sums["yy"])
        check_size(*own)
        means = {"x": own[0].sum_x_P / n, "y": own[1].sum_x_P / n}
        found = {
            pair: hsic(n, sums, means[pair[0]], means[pair[1]]) for pair, sums in self._sums.items()
        }
        biased, debiased = (
            hsic_ratio({pair: values[place] for pair, values in found.items()}) for place in (0, 1)
        )
        return CKAResult(biased=biased, debiased=debiased, n=n, p=p, q=q)

    def state_dict(self) -> dict[str, int | float | Array]:
        """Copies the sums into a flat dict of integers, floats and float64 arrays.

        Returns:
            What `from_state` takes, in this process or another.
        """
        state: dict[str, int | float | Array] = {
            "n": self._n,
            "reference_x": self._reference_x_P.copy(),
            "reference_y": self._reference_y_Q.copy(),
        }
        for pair, sums in self._sums.items():
            state |= {f"{pair}.{name}": value for name, value in deepcopy(vars(sums)).items()}
        return state

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> LinearCKA:
        """Rebuilds an accumulator from a copy of its sums.

        Args:
            state: What `state_dict` gave; numbers may have become zero-dimensional arrays, as
                they do in an npz file.

        Returns:
            A new accumulator that shares no memory with the state.

        Raises:
            DataError: A key is missing or unknown, or an array does not have the width that
                the reference vectors have.
        """
        n = int(state.get("n", 0))
        names = [f"{pair}.{name}" for pair in PAIRS for name in vars(PairSums(0, 0))]
        wanted = {"n", "reference_x", "reference_y", *(names if n else ())}
        if set(state) != wanted or n < 0:
            missing, unknown = sorted(wanted - set(state)), sorted(set(state) - wanted)
            raise DataError(f"not a LinearCKA state: missing {missing}, unknown {unknown}, n={n}")
        made = cls()
        made._n = n
        made._reference_x_P = np.array(state["reference_x"], dtype=np.float64).reshape(-1)
        made._reference_y_Q = np.array(state["reference_y"], dtype=np.float64).reshape(-1)
        made._sums = made._zero_sums() if n else {}
        for pair, sums in made._sums.items():
            sums.read(state, pair)
        return made

    def _start(self, x_NP: AnyArray, y_NQ: AnyArray) -> None:
        """Fixes widths and reference vectors from the first batch."""
        self._reference_x_P = reference_of(x_NP)
        self._reference_y_Q = self._reference_x_P.copy() if y_NQ is x_NP else reference_of(y_NQ)
        self._sums = self._zero_sums()

    def _zero_sums(self) -> dict[str, PairSums]:
        """Makes the sums over no image, of the reference vectors' widths."""
        p, q = self._reference_x_P.size, self._reference_y_Q.size
        return {"xx": PairSums(p, p), "yy": PairSums(q, q), "xy": PairSums(p, q)}

    def _add_block(self, x_NP: Array, y_NQ: Array) -> None:
        """Adds one block of shifted features to the three pairs."""
        norms_x_N = np.einsum("np,np->n", x_NP, x_NP)
        norms_y_N = norms_x_N if y_NQ is x_NP else np.einsum("nq,nq->n", y_NQ, y_NQ)
        self._sums["xx"].add_block(x_NP, x_NP, norms_x_N, norms_x_N)
        self._sums["yy"].add_block(y_NQ, y_NQ, norms_y_N, norms_y_N)
        self._sums["xy"].add_block(x_NP, y_NQ, norms_x_N, norms_y_N)

    def _shifted(self, shift_x_P: Array, shift_y_Q: Array) -> dict[str, PairSums]:
        """Gives the sums as they would be over features minus the shifts."""
        shifts = {"x": shift_x_P, "y": shift_y_Q}
        return {
            pair: sums.shifted(self._n, shifts[pair[0]], shifts[pair[1]])
            for pair, sums in self._sums.items()
        }

    def _check_widths(self, p: int, q: int) -> None:
        """Refuses widths other than the ones already summed."""
        wanted = (self._reference_x_P.size, self._reference_y_Q.size)
        if (p, q) != wanted:
            raise DataError(
                f"features of widths {(p, q)} cannot join sums over widths {wanted}; use one "
                + "accumulator per pair of models"
            )


def linear_cka(x: Features, y: Features) -> CKAResult:
    """Computes the linear CKA of two feature matrices.

    Args:
        x: (N, P) features of the first model, any float dtype, any device; N >= 1.
        y: (N, Q) features of the second model for the same images, in the same order.

    Returns:
        Both estimates.

    Raises:
        DataError: As `LinearCKA.update` and `LinearCKA.result`.
    """
    return LinearCKA().update(x, y).result()
