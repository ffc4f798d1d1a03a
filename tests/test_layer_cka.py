"""CKA between all layers at once, against one pair at a time; and its picture."""

from __future__ import annotations

import io
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kdscale.analysis.cka import linear_cka
from kdscale.analysis.heat_map import heat_map
from kdscale.analysis.layer_cka import LayerCKA, LayerCKAResult, sums_bytes
from kdscale.core.types import DataError

TOLERANCE = 1e-11


def layers(n, widths, seed=0, mean=0.0):
    """Layers that grow out of one another, so that all are related."""
    rng = np.random.default_rng(seed)
    found = [rng.standard_normal((n, 6))]
    for width in widths:
        found.append(np.tanh(found[-1] @ rng.standard_normal((found[-1].shape[1], width))))
    return [layer + mean for layer in found[1:]]


def fed(x, y, cuts=()):
    """Feeds one accumulator in batches that end at the given rows."""
    made, bounds = LayerCKA(), [0, *cuts, len(x[0])]
    for start, stop in pairwise(bounds):
        a = [layer[start:stop] for layer in x]
        made.update(a, a if y is x else [layer[start:stop] for layer in y])
    return made.result()


def assert_close(found: LayerCKAResult, biased, debiased, tolerance=TOLERANCE):
    np.testing.assert_allclose(found.biased, biased, rtol=tolerance, atol=1e-14)
    # A difference of nearly equal numbers where few images or few dimensions leave little.
    np.testing.assert_allclose(found.debiased, debiased, rtol=tolerance, atol=1e-8)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(4, 60),
    p=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    q=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    mean=st.sampled_from([0.0, 1000.0]),
    cut=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_every_pair_equals_its_own_computation(n, p, q, mean, cut, seed):
    x, y = layers(n, p, seed), layers(n, q, seed + 100, mean)
    found = fed(x, y, [round(1 + cut * (n - 2))])
    pairs = [[linear_cka(a, b) for b in y] for a in x]
    assert (found.n, found.p, found.q) == (n, tuple(p), tuple(q))
    assert_close(
        found,
        [[pair.biased for pair in row] for row in pairs],
        [[pair.debiased for pair in row] for row in pairs],
        1e-9,
    )


def test_symmetric_and_one_with_itself():
    x, y = layers(300, (5, 7, 4)), layers(300, (6, 3), seed=1)
    there, back = fed(x, y, [100, 101]), fed(y, x, [250])
    assert_close(there, back.biased.T, back.debiased.T)
    own = fed(x, x, [7, 200])
    assert (np.diag(own.biased) == 1.0).all()
    assert (np.diag(own.debiased) == 1.0).all()
    assert_close(own, own.biased.T, own.debiased.T)


def test_invariances():
    x, y = layers(80, (5, 7)), layers(80, (6, 3), seed=1)
    plain, rng = fed(x, y), np.random.default_rng(2)
    turned = [layer @ np.linalg.qr(rng.standard_normal((layer.shape[1],) * 2))[0] for layer in x]
    order = rng.permutation(80)
    for found in (
        fed(turned, y),
        fed([3e-5 * layer + 2.0 for layer in x], [-1e4 * layer for layer in y]),
        fed([layer[order] for layer in x], [layer[order] for layer in y]),
    ):
        assert_close(found, plain.biased, plain.debiased, 1e-9)


def test_the_same_batches_repeat_it_bit_for_bit():
    x, y = layers(3000, (5, 7)), layers(3000, (6, 3), seed=1)
    first, again = fed(x, y, [1000, 1512]), fed(x, y, [1000, 1512])
    assert first.debiased.tobytes() == again.debiased.tobytes()
    assert first.biased.tobytes() == again.biased.tobytes()


def test_constant_layers_are_named():
    x, y = layers(20, (5, 7, 2)), layers(20, (6, 3), seed=1)
    x[1] = np.full((20, 7), 0.1)
    found = fed(x, y)
    assert (found.constant_x, found.constant_y) == ((1,), ())
    assert np.isnan(found.biased[1]).all()
    assert np.isnan(found.debiased[1]).all()
    assert np.isfinite(found.biased[[0, 2]]).all()
    empty = LayerCKA().result()
    assert (empty.n, empty.biased.shape) == (0, (0, 0))
    assert np.isnan(fed([a[:3] for a in x], [b[:3] for b in y]).debiased).all()


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([], [np.ones((3, 2))], "0 and 1 layers"),
        ([np.ones((3, 2)), np.ones((4, 2))], [np.ones((3, 2))], r"\[3, 4\] rows"),
        ([np.ones((3, 2)), np.full((3, 2), np.nan)], [np.ones((3, 2))], "layer 1 of x holds"),
        ([np.ones((3, 2))], [np.ones((3, 5))], "widths"),
    ],
)
def test_unusable_batches_change_nothing(x, y, message):
    made = LayerCKA().update(layers(9, (2,)), layers(9, (3,), seed=1))
    before = made.result().biased.tobytes()
    with pytest.raises(DataError, match=message):
        made.update(x, y)
    assert made.result().biased.tobytes() == before


def test_memory_does_not_grow_with_images():
    """What the sums hold is what `sums_bytes` says."""
    made = LayerCKA()
    for seed in range(3):
        made.update(layers(200, (5, 7), seed), layers(200, (6, 3, 4), seed + 9))
    sums = [*made._own_x, *made._own_y, *(pair for row in made._cross for pair in row)]
    held = sum(getattr(value, "nbytes", 0) for pair in sums for value in vars(pair).values())
    assert held == sums_bytes((5, 7), (6, 3, 4))
    assert sums_bytes((192,), (1152,)) < 13e6


def test_the_picture_has_a_panel_each():
    matrix = np.array([[1.0, 0.5, np.nan], [0.2, 0.0, -0.1]])
    names = ("small [1]", ["block 1", "final"]), ("large", ["block 1", "block 2", "final"])
    png = heat_map({"debiased": matrix, "biased": matrix}, *names)
    assert png == heat_map({"debiased": matrix, "biased": matrix}, *names)
    picture = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    assert picture.shape[1] > picture.shape[0] > 300
    for colour in ((200, 200, 200), (253, 231, 36), (68, 1, 84)):  # NaN, one, zero
        assert (picture == colour).all(axis=2).sum() > 1000
