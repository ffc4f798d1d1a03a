"""The streaming CKA against its definition over N x N Gram matrices.

Shapes: N images, P and Q widths of the two models, D either of them.
"""

from __future__ import annotations

import io
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdscale.analysis.cka import CKAResult, LinearCKA, linear_cka
from kdscale.core.types import DataError

TOLERANCE = 1e-12


def features(n, p, q, *, mean=0.0, seed=0):
    """Makes two related feature matrices whose means are `mean` times their spread."""
    rng = np.random.default_rng(seed)
    x_NP = rng.standard_normal((n, p))
    y_NQ = x_NP @ rng.standard_normal((p, q)) / math.sqrt(p) + rng.standard_normal((n, q))
    return x_NP + mean * rng.standard_normal(p), y_NQ + mean * rng.standard_normal(q)


def centred_gram(features_ND):
    """Computes the Gram matrix of centred features, centring in extended precision."""
    wide_ND = np.asarray(features_ND, dtype=np.longdouble)
    centred_ND = (wide_ND - wide_ND.mean(axis=0)).astype(np.float64)
    return centred_ND @ centred_ND.T


def hsic_biased(k_NN, l_NN):
    """Computes tr(K H L H) for any Gram matrices."""
    rows_N = k_NN.mean(axis=0)
    return np.sum((k_NN - rows_N - rows_N[:, None] + rows_N.mean()) * l_NN)


def hsic_debiased(k_NN, l_NN):
    """Computes HSIC_1 as printed by Song et al., matrix by matrix."""
    n = len(k_NN)
    k_NN, l_NN = k_NN - np.diag(np.diag(k_NN)), l_NN - np.diag(np.diag(l_NN))
    one_N = np.ones(n)
    total = (one_N @ k_NN @ one_N) * (one_N @ l_NN @ one_N) / ((n - 1) * (n - 2))
    mixed = 2 / (n - 2) * (one_N @ k_NN @ l_NN @ one_N)
    return (np.sum(k_NN * l_NN) + total - mixed) / (n * (n - 3))


def brute_force(x_NP, y_NQ, hsic, gram=centred_gram):
    """Computes CKA of the given HSIC from whole Gram matrices."""
    k_NN, l_NN = gram(x_NP), gram(y_NQ)
    return hsic(k_NN, l_NN) / math.sqrt(hsic(k_NN, k_NN) * hsic(l_NN, l_NN))


def assert_matches(result, x_NP, y_NQ):
    """Compares both estimates with the brute force."""
    assert (result.n, result.p, result.q) == (*x_NP.shape, y_NQ.shape[1])
    assert result.biased == pytest.approx(brute_force(x_NP, y_NQ, hsic_biased), rel=TOLERANCE)
    assert result.debiased == pytest.approx(brute_force(x_NP, y_NQ, hsic_debiased), rel=TOLERANCE)


def stream(x, y, cuts):
    """Feeds one accumulator in batches that end at the given rows."""
    cka = LinearCKA()
    for start, stop in zip([0, *cuts], [*cuts, len(x)], strict=True):
        cka.update(x[start:stop], y[start:stop])
    return cka


def random_cuts(rng, n, num_batches):
    """Draws the inner boundaries of non-empty batches."""
    return sorted(rng.choice(np.arange(1, n), size=num_batches - 1, replace=False).tolist())


def tree_merge(parts):
    """Merges neighbours until one accumulator is left."""
    while len(parts) > 1:
        pairs = [parts[i : i + 2] for i in range(0, len(parts), 2)]
        parts = [pair[0].merge(pair[1]) if len(pair) == 2 else pair[0] for pair in pairs]
    return parts[0]


def assert_same(a, b, tolerance=TOLERANCE):
    """Compares two results."""
    assert (a.n, a.p, a.q) == (b.n, b.p, b.q)
    assert a.biased == pytest.approx(b.biased, rel=tolerance, nan_ok=True)
    assert a.debiased == pytest.approx(b.debiased, rel=tolerance, nan_ok=True)


@pytest.mark.parametrize("mean", [0.0, 1.0, 30.0, 1000.0])
@pytest.mark.parametrize(
    ("n", "p", "q"), [(4, 3, 5), (5, 8, 2), (17, 1, 4), (60, 40, 40), (300, 48, 96), (1200, 64, 33)]
)
def test_equals_brute_force_over_batches_and_merges(n, p, q, mean):
    x_NP, y_NQ = features(n, p, q, mean=mean, seed=n)
    rng = np.random.default_rng(n + 1)
    assert_matches(linear_cka(x_NP, y_NQ), x_NP, y_NQ)
    cuts = random_cuts(rng, n, min(n, 9))
    assert_matches(stream(x_NP, y_NQ, cuts).result(), x_NP, y_NQ)
    parts = [
        LinearCKA().update(x, y)
        for x, y in zip(np.split(x_NP, cuts), np.split(y_NQ, cuts), strict=True)
    ]
    assert_matches(tree_merge(parts).result(), x_NP, y_NQ)


def test_single_rows_and_a_batch_of_several_blocks():
    x_NP, y_NQ = features(4500, 6, 9, mean=1000.0)
    assert_same(stream(x_NP, y_NQ, range(1, 4500)).result(), linear_cka(x_NP, y_NQ))
    x_NP, y_NQ = x_NP[:800], y_NQ[:800]
    assert_matches(stream(x_NP, y_NQ, range(1, 800)).result(), x_NP, y_NQ)


def test_images_sorted_by_class_and_feature_scales_apart():
    rng = np.random.default_rng(3)
    x_NP, y_NQ = features(400, 12, 20, seed=3)
    scale_P = 10.0 ** rng.uniform(-3, 3, size=12)
    x_NP = (x_NP + np.repeat(rng.standard_normal((8, 12)) * 5, 50, axis=0)) * scale_P
    assert_matches(stream(x_NP, y_NQ, range(50, 400, 50)).result(), x_NP, y_NQ)


def test_debiased_equals_the_formula_on_features_that_nobody_centred():
    x_NP, y_NQ = features(40, 7, 5, mean=2.0)
    raw = brute_force(x_NP, y_NQ, hsic_debiased, gram=lambda f_ND: f_ND @ f_ND.T)
    assert linear_cka(x_NP, y_NQ).debiased == pytest.approx(raw, rel=1e-11)


def test_symmetric():
    x_NP, y_NQ = features(50, 7, 12, mean=10.0)
    there, back = linear_cka(x_NP, y_NQ), linear_cka(y_NQ, x_NP)
    assert there.biased == pytest.approx(back.biased, rel=1e-14)
    assert there.debiased == pytest.approx(back.debiased, rel=1e-14)


def test_invariant_under_rotation_scaling_translation_and_row_order():
    rng = np.random.default_rng(0)
    x_NP, y_NQ = features(80, 9, 14)
    plain = linear_cka(x_NP, y_NQ)
    rotation_PP = np.linalg.qr(rng.standard_normal((9, 9)))[0]
    order_N = rng.permutation(80)
    assert_same(linear_cka(x_NP @ rotation_PP, y_NQ), plain)
    assert_same(linear_cka(-3e-5 * x_NP, 1e6 * y_NQ), plain)
    assert_same(linear_cka(1e-30 * x_NP, 1e30 * y_NQ), plain)
    assert_same(linear_cka(x_NP + rng.standard_normal(9), y_NQ - 7.0), plain)
    assert_same(linear_cka(x_NP[order_N], y_NQ[order_N]), plain)
    stretched = linear_cka(x_NP * np.linspace(0.1, 5, 9), y_NQ)
    assert stretched.biased != pytest.approx(plain.biased, rel=1e-3)


@pytest.mark.parametrize("shape", [(4, 3), (37, 5), (5, 64), (3000, 21)])
def test_a_model_with_itself_is_exactly_one(shape):
    x_NP = np.random.default_rng(1).standard_normal(shape) + 100
    parts = [LinearCKA().update(x, x) for x in (x_NP[:2], x_NP[2:])]
    for result in (linear_cka(x_NP, x_NP), parts[0].merge(parts[1]).result()):
        assert result.biased == 1.0
        assert result.debiased == 1.0
    assert linear_cka(x_NP, x_NP.copy()).biased == pytest.approx(1.0, rel=1e-14)


def test_four_points_on_the_axes():
    axes = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    turn = np.array([[0.6, -0.8], [0.8, 0.6]])
    assert linear_cka(axes, 5 * axes @ turn).biased == pytest.approx(1.0, rel=1e-14)
    assert linear_cka(axes, axes[:, :1]).biased == pytest.approx(math.sqrt(0.5), rel=1e-14)
    assert linear_cka(axes[:, :1], axes[:, 1:]).biased == 0.0


def test_unrelated_features_look_similar_to_the_biased_estimate_only():
    rng = np.random.default_rng(5)
    result = linear_cka(rng.standard_normal((300, 192)), rng.standard_normal((300, 768)))
    assert result.biased == pytest.approx(0.53, abs=0.01)
    assert abs(result.debiased) < 0.02


def test_undefined_is_nan():
    x_NP, y_NQ = features(6, 3, 4)
    empty = LinearCKA().result()
    assert math.isnan(empty.biased)
    assert math.isnan(empty.debiased)
    assert (empty.n, empty.p, empty.q) == (0, 0, 0)
    assert math.isnan(linear_cka(x_NP[:1], y_NQ[:1]).biased)
    three = linear_cka(x_NP[:3], y_NQ[:3])
    assert 0 < three.biased <= 1
    assert math.isnan(three.debiased)
    constant = linear_cka(np.full((6, 3), 0.1), y_NQ)
    assert math.isnan(constant.biased)
    assert math.isnan(constant.debiased)


def test_equidistant_images_have_no_debiased_self_similarity():
    result = linear_cka(np.eye(4) * 0.3, features(4, 2, 3)[1])
    assert 0 < result.biased < 1
    assert math.isnan(result.debiased)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]
)
def test_tensors_count_as_the_float64_values_they_hold(dtype):
    x, y = (torch.from_numpy(f).to(dtype) for f in features(64, 5, 6, mean=1.0))
    assert_matches(linear_cka(x, y), x.double().numpy(), y.double().numpy())
    if dtype == torch.float32:
        assert_same(linear_cka(x.requires_grad_(), y.T.contiguous().T), linear_cka(x, y))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.longdouble])
def test_arrays_of_other_dtypes_and_layouts(dtype):
    x_NP, y_NQ = (f.astype(dtype) for f in features(64, 5, 6, mean=1.0))
    wanted = linear_cka(x_NP.astype(np.float64), y_NQ.astype(np.float64))
    assert linear_cka(x_NP, y_NQ) == wanted
    assert_same(linear_cka(np.asfortranarray(x_NP), y_NQ[::-1][::-1]), wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tensors_on_a_gpu():
    x, y = (torch.from_numpy(f) for f in features(64, 5, 6))
    assert linear_cka(x.cuda(), y.cuda()) == linear_cka(x, y)


def test_input_is_left_alone():
    x_NP, y_NQ = features(30, 4, 5, mean=3.0)
    kept = x_NP.copy(), y_NQ.copy()
    linear_cka(x_NP, y_NQ)
    np.testing.assert_array_equal(x_NP, kept[0])
    np.testing.assert_array_equal(y_NQ, kept[1])


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.ones((3, 2)), np.ones((4, 2)), "3 rows"),
        (np.ones(3), np.ones((3, 2)), "x has shape"),
        (np.ones((3, 2)), np.ones((3, 2, 1)), "y has shape"),
        (np.ones((0, 2)), np.ones((0, 2)), "at least one row"),
        (np.ones((3, 0)), np.ones((3, 2)), "one column"),
        (np.ones((3, 2), dtype=int), np.ones((3, 2)), "dtype int64"),
        (torch.ones(3, 2, dtype=torch.int8), np.ones((3, 2)), r"dtype torch\.int8"),
        (np.ones((3, 2), dtype=complex), np.ones((3, 2)), "complex"),
        ([[1.0]], np.ones((1, 2)), "a list"),
        (np.array([[1.0], [np.nan]]), np.ones((2, 2)), "x holds .* row 1"),
        (np.ones((2, 2)), torch.tensor([[1.0], [math.inf]]), "y holds .* row 1"),
    ],
)
def test_unusable_input(x, y, message):
    with pytest.raises(DataError, match=message):
        linear_cka(x, y)


def test_a_refused_batch_or_merge_changes_nothing():
    x_NP, y_NQ = features(20, 4, 6)
    cka = LinearCKA().update(x_NP, y_NQ)
    before = cka.result()
    bad_NP = np.vstack([np.ones((2500, 4)), np.full((1, 4), np.inf)])
    with pytest.raises(DataError, match="row 2500"):
        cka.update(bad_NP, np.ones((2501, 6)))
    with pytest.raises(DataError, match="widths"):
        cka.update(x_NP[:, :3], y_NQ)
    with pytest.raises(DataError, match="widths"):
        cka.merge(LinearCKA().update(y_NQ, x_NP))
    assert cka.result() == before
    fresh = LinearCKA()
    with pytest.raises(DataError):
        fresh.update(x_NP, np.full((20, 6), np.nan))
    assert fresh.update(y_NQ, x_NP).result().p == 6


@pytest.mark.filterwarnings("ignore:overflow")
def test_too_large_features():
    x_NP, y_NQ = features(10, 3, 3)
    with pytest.raises(DataError, match="too large"):
        linear_cka(x_NP * 1e100, y_NQ)


def test_merging_with_empty_accumulators_and_itself():
    x_NP, y_NQ = features(20, 4, 6, mean=5.0)
    full = LinearCKA().update(x_NP, y_NQ)
    before = full.result()
    assert full.merge(LinearCKA()) is full
    assert full.result() == before
    copied = LinearCKA().merge(full)
    assert copied.result() == before
    copied.update(x_NP, y_NQ)
    assert full.result() == before
    doubled = full.merge(full).result()
    assert_matches(doubled, np.vstack([x_NP, x_NP]), np.vstack([y_NQ, y_NQ]))
    assert LinearCKA().merge(LinearCKA()).result().n == 0


def test_merge_leaves_the_other_alone():
    x_NP, y_NQ = features(40, 4, 6, mean=50.0)
    a, b = LinearCKA().update(x_NP[:15], y_NQ[:15]), LinearCKA().update(x_NP[15:], y_NQ[15:])
    before = pickle.dumps(b)
    a.merge(b)
    assert pickle.dumps(b) == before


def test_passes_between_processes_bit_for_bit():
    x_NP, y_NQ = features(40, 4, 6, mean=50.0)
    cka = LinearCKA().update(x_NP[:25], y_NQ[:25])
    file = io.BytesIO()
    np.savez(file, **cka.state_dict())
    file.seek(0)
    rebuilt = [
        pickle.loads(pickle.dumps(cka)),
        LinearCKA.from_state(cka.state_dict()),
        LinearCKA.from_state(dict(np.load(file))),
    ]
    wanted = cka.update(x_NP[25:], y_NQ[25:]).result()
    for other in rebuilt:
        assert other.update(x_NP[25:], y_NQ[25:]).result() == wanted
    empty = LinearCKA.from_state(LinearCKA().state_dict())
    assert empty.update(x_NP, y_NQ).result() == linear_cka(x_NP, y_NQ)


def test_a_state_shares_no_memory():
    x_NP, y_NQ = features(20, 4, 6)
    cka = LinearCKA().update(x_NP, y_NQ)
    before, state = cka.result(), cka.state_dict()
    rebuilt = LinearCKA.from_state(state)
    for value in state.values():
        if isinstance(value, np.ndarray):
            value[...] = 9.0
    assert cka.result() == before == rebuilt.result()


def test_unusable_state():
    state = LinearCKA().update(*features(20, 4, 6)).state_dict()
    with pytest.raises(DataError, match=r"missing \['xy.norms_x'\]"):
        LinearCKA.from_state({key: v for key, v in state.items() if key != "xy.norms_x"})
    with pytest.raises(DataError, match=r"unknown \['more'\]"):
        LinearCKA.from_state({**state, "more": 1.0})
    with pytest.raises(DataError, match=r"yy.sum_x_P has shape"):
        LinearCKA.from_state({**state, "yy.sum_x_P": np.zeros(5)})
    with pytest.raises(DataError, match="n=-1"):
        LinearCKA.from_state({**state, "n": -1})


def test_the_result_is_frozen():
    result = CKAResult(biased=0.5, debiased=0.4, n=10, p=2, q=3)
    with pytest.raises(AttributeError):
        result.biased = 1.0  # pyright: ignore[reportAttributeAccessIssue]


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=3, max_size=3),
    widths=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    mean=st.sampled_from([0.0, 1.0, 1000.0]),
    seed=st.integers(0, 1000),
)
def test_merge_is_associative_and_commutative(sizes, widths, mean, seed):
    x_NP, y_NQ = features(sum(sizes) + 3, *widths, mean=mean, seed=seed)
    cuts = np.cumsum(sizes[:2]).tolist()
    shards = list(zip(np.split(x_NP, cuts), np.split(y_NQ, cuts), strict=True))

    def part(index):
        return LinearCKA().update(*shards[index])

    whole = linear_cka(x_NP, y_NQ)
    merged = [
        part(0).merge(part(1)).merge(part(2)),
        part(0).merge(part(1).merge(part(2))),
        part(2).merge(part(0)).merge(part(1)),
    ]
    for result in (cka.result() for cka in merged):
        assert result.biased == pytest.approx(whole.biased, rel=1e-11)
        assert result.debiased == pytest.approx(whole.debiased, rel=1e-9, abs=1e-11, nan_ok=True)
