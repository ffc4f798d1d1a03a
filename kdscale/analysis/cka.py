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
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from kdscale.core.types import DataError

Array: TypeAlias = npt.NDArray[np.float64]
AnyArray: TypeAlias = npt.NDArray[Any]

_BLOCK_ROWS = 2048  # large enough for a full-speed matrix product, small enough for the cache
_PAIRS = ("xx", "yy", "xy")
_NO_DIGITS_LEFT = 64 * float(np.finfo(np.float64).eps)
_LARGEST_NORMS = 1e150  # squared, still within float64


class _Tensor(Protocol):
    """What is used of a torch tensor, so that torch need not be imported."""

    @property
    def dtype(self) -> object: ...
    def is_floating_point(self) -> bool: ...
    def element_size(self) -> int: ...
    def detach(self) -> _Tensor: ...
    def cpu(self) -> _Tensor: ...
    def float(self) -> _Tensor: ...
    def numpy(self) -> AnyArray: ...


Features: TypeAlias = AnyArray | _Tensor


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
    the same order, and merging in the same order, repeats the result bit for bit; any other
    order changes rounding only. The sums take 8 (P^2 + Q^2 + P Q) bytes and a few vectors.

    Source: Kornblith et al. 2019, "Similarity of Neural Network Representations Revisited"
    (biased); Song et al. 2012, "Feature Selection via Dependence Maximization", HSIC_1, put
    into the same ratio (debiased).
    """

    def __init__(self) -> None:
        self._n: int = 0
        self._reference_x_P: Array = np.zeros(0)
        self._reference_y_Q: Array = np.zeros(0)
        self._sums: dict[str, _PairSums] = {}

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
        x_NP = _as_matrix(x, "x")
        y_NQ = x_NP if y is x else _as_matrix(y, "y")
        if len(x_NP) != len(y_NQ):
            raise DataError(
                f"x has {len(x_NP)} rows, y {len(y_NQ)}; give features of the same images"
            )
        if self._n:
            self._check_widths(x_NP.shape[1], y_NQ.shape[1])
        else:
            self._start(x_NP, y_NQ)
        blocks_y = _shifted_blocks(y_NQ, self._reference_y_Q)
        for block_x in _shifted_blocks(x_NP, self._reference_x_P):
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
        if not all(sums.norms_x <= _LARGEST_NORMS for sums in own):
            raise DataError(
                "the features are too large for sums in float64; divide them by a constant, "
                + "which CKA does not depend on"
            )
        centred = self._shifted(own[0].sum_x_P / n, own[1].sum_x_P / n)
        biased = {
            pair: float(np.vdot(sums.cross_PQ, sums.cross_PQ)) for pair, sums in centred.items()
        }
        debiased = {pair: _unbiased(n, biased[pair], sums) for pair, sums in centred.items()}
        return CKAResult(biased=_ratio(biased), debiased=_ratio(debiased), n=n, p=p, q=q)

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
        names = [f"{pair}.{name}" for pair in _PAIRS for name in vars(_PairSums(0, 0))]
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
        self._reference_x_P = _reference(x_NP)
        self._reference_y_Q = self._reference_x_P.copy() if y_NQ is x_NP else _reference(y_NQ)
        self._sums = self._zero_sums()

    def _zero_sums(self) -> dict[str, _PairSums]:
        """Makes the sums over no image, of the reference vectors' widths."""
        p, q = self._reference_x_P.size, self._reference_y_Q.size
        return {"xx": _PairSums(p, p), "yy": _PairSums(q, q), "xy": _PairSums(p, q)}

    def _add_block(self, x_NP: Array, y_NQ: Array) -> None:
        """Adds one block of shifted features to the three pairs."""
        norms_x_N = np.einsum("np,np->n", x_NP, x_NP)
        norms_y_N = norms_x_N if y_NQ is x_NP else np.einsum("nq,nq->n", y_NQ, y_NQ)
        self._sums["xx"].add_block(x_NP, x_NP, norms_x_N, norms_x_N)
        self._sums["yy"].add_block(y_NQ, y_NQ, norms_y_N, norms_y_N)
        self._sums["xy"].add_block(x_NP, y_NQ, norms_x_N, norms_y_N)

    def _shifted(self, shift_x_P: Array, shift_y_Q: Array) -> dict[str, _PairSums]:
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


class _PairSums:
    """Sums over images i of two feature vectors x_i, y_i (of two models, or of one twice)."""

    def __init__(self, p: int, q: int) -> None:
        self.sum_x_P: Array = np.zeros(p)  # sum of x_i
        self.sum_y_Q: Array = np.zeros(q)  # sum of y_i
        self.cross_PQ: Array = np.zeros((p, q))  # sum of x_i y_i^T
        self.norms_x: float = 0.0  # sum of |x_i|^2
        self.norms_y: float = 0.0  # sum of |y_i|^2
        self.norms_xy: float = 0.0  # sum of |x_i|^2 |y_i|^2
        self.weighted_x_P: Array = np.zeros(p)  # sum of |y_i|^2 x_i
        self.weighted_y_Q: Array = np.zeros(q)  # sum of |x_i|^2 y_i

    def read(self, state: Mapping[str, Any], pair: str) -> None:
        """Takes one pair's entries of a state, whose shapes must be the present ones."""
        for name, present in vars(self).items():
            value = np.array(state[f"{pair}.{name}"], dtype=np.float64)
            if value.shape != np.shape(present):
                raise DataError(
                    f"state entry {pair}.{name} has shape {value.shape}, not {np.shape(present)}"
                )
            setattr(self, name, value if value.shape else float(value))

    def add(self, other: _PairSums) -> None:
        """Adds sums over further images, taken with the same reference vectors."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def add_block(self, x_NP: Array, y_NQ: Array, norms_x_N: Array, norms_y_N: Array) -> None:
        """Adds one block of images, given the squared norms of its rows."""
        self.cross_PQ += x_NP.T @ y_NQ
        sum_x_P, weighted_x_P = x_NP.sum(axis=0), x_NP.T @ norms_y_N
        same = x_NP is y_NQ
        self.sum_x_P += sum_x_P
        self.sum_y_Q += sum_x_P if same else y_NQ.sum(axis=0)
        self.weighted_x_P += weighted_x_P
        self.weighted_y_Q += weighted_x_P if same else y_NQ.T @ norms_x_N
        self.norms_x += float(norms_x_N.sum())
        self.norms_y += float(norms_y_N.sum())
        self.norms_xy += float(norms_x_N @ norms_y_N)

    def shifted(self, n: int, u_P: Array, v_Q: Array) -> _PairSums:
        """Expands every sum over x_i - u and y_i - v in the sums over x_i and y_i."""
        uu, vv = float(u_P @ u_P), float(v_Q @ v_Q)
        ux, vy = float(u_P @ self.sum_x_P), float(v_Q @ self.sum_y_Q)
        cross_v_P, cross_u_Q = self.cross_PQ @ v_Q, u_P @ self.cross_PQ
        norms_x = self.norms_x - 2 * ux + n * uu
        norms_y = self.norms_y - 2 * vy + n * vv
        norms_xy = self.norms_xy + vv * self.norms_x + uu * self.norms_y + n * uu * vv
        norms_xy -= 2 * float(u_P @ self.weighted_x_P) + 2 * float(v_Q @ self.weighted_y_Q)
        norms_xy += 4 * float(u_P @ cross_v_P) - 2 * vv * ux - 2 * uu * vy
        out = _PairSums(0, 0)
        out.sum_x_P = self.sum_x_P - n * u_P
        out.sum_y_Q = self.sum_y_Q - n * v_Q
        out.cross_PQ = self.cross_PQ - np.outer(self.sum_x_P, v_Q)
        out.cross_PQ -= np.outer(u_P, out.sum_y_Q)
        out.norms_x, out.norms_y, out.norms_xy = norms_x, norms_y, norms_xy
        out.weighted_x_P = self.weighted_x_P - 2 * cross_v_P + vv * self.sum_x_P - norms_y * u_P
        out.weighted_y_Q = self.weighted_y_Q - 2 * cross_u_Q + uu * self.sum_y_Q - norms_x * v_Q
        return out


def _unbiased(n: int, cross_squared: float, centred: _PairSums) -> float:
    """Computes n (n - 3) HSIC_1 from sums over features centred at their mean.

    HSIC_1 does not change when features are translated, and at the mean the sum of all Gram
    entries is zero, so that only the squared cross product and the diagonals remain.
    """
    if n < 4:
        return math.nan
    diagonal = centred.norms_xy * n / (n - 2)
    total = centred.norms_x * centred.norms_y / ((n - 1) * (n - 2))
    value = cross_squared - diagonal + total
    rounding = _NO_DIGITS_LEFT * (cross_squared + diagonal + total)
    return value if abs(value) > rounding else 0.0


def _ratio(hsic: Mapping[str, float]) -> float:
    """Computes xy / sqrt(xx yy), exactly 1 for three equal numbers and free of overflow."""
    if not (hsic["xx"] > 0 and hsic["yy"] > 0):
        return math.nan
    (x, power_x), (y, power_y), (xy, power_xy) = (math.frexp(hsic[pair]) for pair in _PAIRS)
    half, odd = divmod(power_x + power_y, 2)
    return math.ldexp(xy / math.sqrt(math.ldexp(x * y, odd)), power_xy - half)


def _reference(features_ND: AnyArray) -> Array:
    """Takes the mean of the first rows; the first row itself for a constant feature."""
    block_ND = features_ND[:_BLOCK_ROWS].astype(np.float64)
    first_D = block_ND[0].copy()
    return first_D + (block_ND - first_D).mean(axis=0)


def _shifted_blocks(features_ND: AnyArray, reference_D: Array) -> Iterator[Array]:
    """Yields blocks of rows as float64, minus the reference vector."""
    for start in range(0, len(features_ND), _BLOCK_ROWS):
        rows_ND = features_ND[start : start + _BLOCK_ROWS]
        yield np.subtract(rows_ND, reference_D, dtype=np.float64, order="C")


def _as_matrix(features: Features, name: str) -> AnyArray:
    """Brings features to a NumPy float matrix on the CPU, without a copy where possible."""
    if isinstance(features, np.ndarray):
        matrix: AnyArray = features
        floating = np.issubdtype(features.dtype, np.floating)
    elif hasattr(features, "detach"):
        floating = features.is_floating_point()
        tensor = features.detach().cpu()
        # NumPy has no bfloat16 or float8; float32 holds every value of the short types
        matrix = (tensor.float() if tensor.element_size() < 4 else tensor).numpy()
    else:
        raise DataError(f"{name} is a {type(features).__name__}, not an array or a tensor")
    if not floating or matrix.ndim != 2 or 0 in matrix.shape:
        raise DataError(
            f"{name} has shape {tuple(matrix.shape)} and dtype {features.dtype}; features are "
            + "a matrix of floats, one row per image, with at least one row and one column"
        )
    if matrix.dtype.itemsize > 8:
        matrix = matrix.astype(np.float64)
    for start in range(0, len(matrix), _BLOCK_ROWS):
        finite = np.isfinite(matrix[start : start + _BLOCK_ROWS]).all(axis=1)
        if not finite.all():
            row = start + int(np.argmin(finite))
            raise DataError(f"{name} holds a value that is not finite, first in row {row}")
    return matrix
