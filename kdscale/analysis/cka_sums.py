"""The sums that linear CKA is made of, and what is computed from them.

For every pair of models (or layers) the same few sums over images are kept, in float64, over
features from which a fixed reference vector has been taken; they add up over batches and shards.

Source: Kornblith et al. 2019 (linear CKA); Song et al. 2012 (HSIC_1).

Shapes: N images of one batch or block, P width of the first model, Q width of the second.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from kdscale.core.types import DataError

Array: TypeAlias = npt.NDArray[np.float64]
AnyArray: TypeAlias = npt.NDArray[Any]

_BLOCK_ROWS = 2048  # large enough for a full-speed matrix product, small enough for the cache
PAIRS = ("xx", "yy", "xy")
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


class PairSums:
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

    def add(self, other: PairSums) -> None:
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

    def shifted(self, n: int, u_P: Array, v_Q: Array) -> PairSums:
        """Expands every sum over x_i - u and y_i - v in the sums over x_i and y_i."""
        uu, vv = float(u_P @ u_P), float(v_Q @ v_Q)
        ux, vy = float(u_P @ self.sum_x_P), float(v_Q @ self.sum_y_Q)
        cross_v_P, cross_u_Q = self.cross_PQ @ v_Q, u_P @ self.cross_PQ
        norms_x = self.norms_x - 2 * ux + n * uu
        norms_y = self.norms_y - 2 * vy + n * vv
        norms_xy = self.norms_xy + vv * self.norms_x + uu * self.norms_y + n * uu * vv
        norms_xy -= 2 * float(u_P @ self.weighted_x_P) + 2 * float(v_Q @ self.weighted_y_Q)
        norms_xy += 4 * float(u_P @ cross_v_P) - 2 * vv * ux - 2 * uu * vy
        out = PairSums(0, 0)
        out.sum_x_P = self.sum_x_P - n * u_P
        out.sum_y_Q = self.sum_y_Q - n * v_Q
        out.cross_PQ = self.cross_PQ - np.outer(self.sum_x_P, v_Q)
        out.cross_PQ -= np.outer(u_P, out.sum_y_Q)
        out.norms_x, out.norms_y, out.norms_xy = norms_x, norms_y, norms_xy
        out.weighted_x_P = self.weighted_x_P - 2 * cross_v_P + vv * self.sum_x_P - norms_y * u_P
        out.weighted_y_Q = self.weighted_y_Q - 2 * cross_u_Q + uu * self.sum_y_Q - norms_x * v_Q
        return out


def check_size(*own: PairSums) -> None:
    """Refuses the own sums of models whose features are too large.

    Raises:
        DataError: Their fourth powers would overflow float64.
    """
    if not all(sums.norms_x <= _LARGEST_NORMS for sums in own):
        raise DataError(
            "the features are too large for sums in float64; divide them by a constant, "
            + "which CKA does not depend on"
        )


def hsic(n: int, sums: PairSums, mean_x_P: Array, mean_y_Q: Array) -> tuple[float, float]:
    """Computes a pair's HSIC up to a common factor: (biased, debiased).

    Args:
        n: Number of images, at least 1.
        sums: The pair's sums over them.
        mean_x_P: Mean of the first model's features as they were summed.
        mean_y_Q: The same of the second model.
    """
    centred = sums.shifted(n, mean_x_P, mean_y_Q)
    squared = float(np.vdot(centred.cross_PQ, centred.cross_PQ))
    return squared, _unbiased_hsic(n, squared, centred)


def _unbiased_hsic(n: int, cross_squared: float, centred: PairSums) -> float:
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


def hsic_ratio(hsic: Mapping[str, float]) -> float:
    """Computes xy / sqrt(xx yy), exactly 1 for three equal numbers and free of overflow."""
    if not (hsic["xx"] > 0 and hsic["yy"] > 0):
        return math.nan
    (x, power_x), (y, power_y), (xy, power_xy) = (math.frexp(hsic[pair]) for pair in PAIRS)
    half, odd = divmod(power_x + power_y, 2)
    return math.ldexp(xy / math.sqrt(math.ldexp(x * y, odd)), power_xy - half)


def reference_of(features_ND: AnyArray) -> Array:
    """Takes the mean of the first rows; the first row itself for a constant feature."""
    block_ND = features_ND[:_BLOCK_ROWS].astype(np.float64)
    first_D = block_ND[0].copy()
    return first_D + (block_ND - first_D).mean(axis=0)


def shifted_blocks(features_ND: AnyArray, reference_D: Array) -> Iterator[Array]:
    """Yields blocks of rows as float64, minus the reference vector."""
    for start in range(0, len(features_ND), _BLOCK_ROWS):
        rows_ND = features_ND[start : start + _BLOCK_ROWS]
        yield np.subtract(rows_ND, reference_D, dtype=np.float64, order="C")


def as_matrix(features: Features, name: str) -> AnyArray:
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
