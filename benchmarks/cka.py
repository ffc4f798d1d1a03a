"""CKA of 50,000 images in one pass, beside the three matrix products that it cannot do without.

    python benchmarks/cka.py

The baseline is XᵀX, YᵀY and XᵀY in float64 over the whole matrices, nothing else. Both are timed
in turns in one process.
"""

from __future__ import annotations

import argparse
import statistics
import time
import tracemalloc

import numpy as np
from _common import table

from kdscale.analysis.cka import LinearCKA
from kdscale.analysis.layer_cka import LayerCKA

BATCH = 2048


def products(x: np.ndarray, y: np.ndarray) -> float:
    """Times the three products."""
    began = time.perf_counter()
    for a, b in ((x, x), (y, y), (x, y)):
        a.T @ b
    return time.perf_counter() - began


def one_pass(x: np.ndarray, y: np.ndarray, layers: bool = False) -> float:
    """Times the sums of all batches and both estimates."""
    began = time.perf_counter()
    sums = LayerCKA() if layers else LinearCKA()
    for start in range(0, len(x), BATCH):
        a, b = x[start : start + BATCH], y[start : start + BATCH]
        sums.update([a], [b]) if layers else sums.update(a, b)  # type: ignore[arg-type,list-item]
    sums.result()
    return time.perf_counter() - began


def peak_mib(x: np.ndarray, y: np.ndarray) -> float:
    """Returns the largest memory that the sums and their result take beyond the features."""
    tracemalloc.start()
    one_pass(x, y)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    random = np.random.default_rng(0)
    x, y = (random.standard_normal((options.images, width)) for width in (192, 1152))
    bare: list[float] = []
    linear: list[float] = []
    layered: list[float] = []
    for _ in range(options.repeats):
        bare.append(products(x, y))
        linear.append(one_pass(x, y))
        layered.append(one_pass(x, y, layers=True))
    middle = statistics.median(bare)
    rows = [("three products, float64", f"{middle:.2f}", "1.00", "")]
    for name, seconds in (("LinearCKA", linear), ("LayerCKA, one layer each", layered)):
        memory = f"{peak_mib(x, y):.0f}" if name == "LinearCKA" else ""
        ratio = statistics.median(own / base for own, base in zip(seconds, bare, strict=True))
        rows.append((name, f"{statistics.median(seconds):.2f}", f"{ratio:.2f}", memory))
    title = f"CKA, {options.images:,} x (192, 1152), one pass in batches of {BATCH}"
    print(table(title, ("", "seconds", "times the products", "peak memory, MiB"), rows))


if __name__ == "__main__":
    main()
