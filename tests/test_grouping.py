"""Megabatches of one modality and like length: a permutation, aligned, and the reference's rule."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdscale.core.types import ConfigError, DataError
from kdscale.data.order import Grouping, Order, grouped, permutation


@st.composite
def orders(draw: st.DrawFn) -> Order:
    counts = tuple(draw(st.lists(st.integers(1, 40), min_size=1, max_size=8)))
    share = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    random = np.random.default_rng(draw(st.integers(0, 99)))
    lengths = tuple(
        tuple((random.integers(1, 60, n) * np.where(random.random(n) < share, -1, 1)).tolist())
        for n in counts
    )
    micro = draw(st.integers(1, 4))
    batch = micro * draw(st.integers(1, max(1, sum(counts) // micro)))
    if batch > sum(counts):
        micro = batch = 1
    return Order(
        counts,
        draw(st.integers(0, 9)),
        batch,
        epochs=2,
        window_samples=draw(st.integers(1, 120)),
        group_size=micro * draw(st.integers(1, 4)),
        micro_batch_size=micro,
        lengths=lengths,
    )


def words(order: Order, start: int, stop: int) -> np.ndarray[Any, Any]:
    """Lengths of the rows of some steps."""
    assert order.lengths is not None
    shards, places = order.rows(start, stop)
    return np.array([order.lengths[s][p] for s, p in zip(shards, places, strict=True)])


@settings(max_examples=40, deadline=None)
@given(orders(), st.data())
def test_grouping_changes_places_and_nothing_else(order: Order, data: st.DataObject):
    plain = replace(order, group_size=None)
    for epoch in range(2):
        for segment, other in zip(order.segments(), plain.segments(), strict=True):
            whole = replace(segment, start=0, stop=sum(segment.counts))
            known = replace(other, start=0, stop=sum(other.counts))
            mine = sorted(zip(*map(np.ndarray.tolist, whole.positions()), strict=True))
            assert mine == sorted(zip(*map(np.ndarray.tolist, known.positions()), strict=True))
        first = epoch * order.steps_per_epoch
        seen = list(zip(*order.rows(first, first + order.steps_per_epoch), strict=True))
        assert len(set(seen)) == len(seen) == order.steps_per_epoch * order.global_batch_size
    start = data.draw(st.integers(0, order.num_steps))
    whole, tail = order.rows(0, order.num_steps), order.rows(start, order.num_steps)
    for one, other in zip(whole, tail, strict=True):
        assert np.array_equal(one[start * order.global_batch_size :], other)


@settings(max_examples=40, deadline=None)
@given(orders())
def test_megabatches_are_of_one_modality_wherever_windows_end(order: Order):
    size, micro = order.group_size or 0, order.micro_batch_size
    per_epoch = order.steps_per_epoch
    for epoch in range(2):
        found = words(order, epoch * per_epoch, (epoch + 1) * per_epoch)
        windows = [sum(order.counts[s] for s in shards) for shards in order.windows(epoch)]
        ends = np.cumsum(windows)
        mixed = 0
        for at in range(0, len(found) - size + 1, size):
            group = found[at : at + size]
            mixed += len(set(group > 0)) > 1
            inside = not any(at < end < at + size for end in ends)
            if inside and len(set(group > 0)) == 1 and size // micro > 1:
                # Dealt longest first, so no micro-batch begins with less than another ends.
                heads = np.abs(group).reshape(-1, micro)[:, 0]
                assert heads.min() >= np.sort(np.abs(group))[::-1][size // micro - 1]
        # At most what is left of both modalities at both ends of every window.
        assert mixed <= 3 * len(windows)


def test_the_order_of_a_window_by_hand():
    # Two megabatches of images, one of text, and what is left of each.
    lengths = (9, 8, 7, 6, 5, 4, 3, 2, 1, -1, -2, -3, -4, -5)
    order = grouped(np.arange(14), Grouping(4, 2, 0, lengths), "name")
    groups = {(0, 3, 1, 2), (4, 7, 5, 6), (12, 9, 11, 10)}
    assert {tuple(order[at : at + 4].tolist()) for at in (0, 4, 8)} == groups
    assert order[12:].tolist() == [8, 13]
    # With a lead, what is left comes first; where it is too little, a megabatch is taken apart.
    led = grouped(np.arange(14), Grouping(4, 2, 3, lengths), "name").tolist()
    assert led[:2] == [8, 13]
    assert {tuple(led[at : at + 4]) for at in (3, 7)} < groups
    assert sorted(led) == list(range(14))


def test_a_micro_batch_is_dealt_as_the_reference_deals():
    # LLaVA: longest first, each to the emptiest of the micro-batches that still have room.
    lengths = (10, 9, 8, 7, 3, 2)
    order = grouped(np.arange(6), Grouping(6, 3, 0, lengths), "x").tolist()
    assert order == [0, 3, 4, 1, 2, 5]


def test_grouping_needs_lengths_and_whole_micro_batches():
    lengths = ((1, 2), (3, -4))
    Order((2, 2), 0, 2, epochs=1, group_size=2, micro_batch_size=1, lengths=lengths)
    with pytest.raises(ConfigError, match="whole micro-batches of 2"):
        Order((2, 2), 0, 2, epochs=1, group_size=3, micro_batch_size=2, lengths=lengths)
    for missing in (None, ((1,), (3, -4))):
        with pytest.raises(DataError, match="length of every sample"):
            Order((2, 2), 0, 2, epochs=1, group_size=2, lengths=missing)


def test_windows_without_text_and_lengths_seeds_and_epochs():
    lengths = (tuple(range(1, 65)),)
    order = Order((64,), 0, 8, epochs=2, group_size=16, micro_batch_size=4, lengths=lengths)
    first, second = words(order, 0, 8), words(order, 8, 16)
    assert sorted(first) == sorted(second) == list(range(1, 65))
    assert first.tolist() != second.tolist()
    assert first.tolist() != words(replace(order, seed=1), 0, 8).tolist()
    sums = first.reshape(4, 4, 4).sum(-1)
    plain = permutation(64, "window", 0, 0, 0) + 1
    assert np.ptp(sums, axis=1).mean() < np.ptp(plain.reshape(4, 4, 4).sum(-1), axis=1).mean() / 3
