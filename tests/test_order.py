"""The order of the samples: pure, complete, and the same for any number of workers."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdscale.core.types import ConfigError, DataError
from kdscale.data.order import Order
from kdscale.data.samples import view_of

COUNTS = (13, 9, 17, 11)

orders = st.builds(
    Order,
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=12).map(tuple),
    seed=st.integers(0, 9),
    global_batch_size=st.just(1),
    epochs=st.integers(1, 4),
    window_samples=st.integers(1, 80),
)


def resized(order: Order, data: st.DataObject) -> Order:
    batch = data.draw(st.integers(1, order.num_samples))
    return Order(order.counts, order.seed, batch, order.epochs, None, order.window_samples)


def pairs(order: Order, start: int, stop: int) -> list[tuple[int, int]]:
    shards, places = order.rows(start, stop)
    return list(zip(shards.tolist(), places.tolist(), strict=True))


@settings(max_examples=60, deadline=None)
@given(orders, st.data())
def test_each_epoch_shows_each_sample_once_but_for_the_tail(order: Order, data: st.DataObject):
    order = resized(order, data)
    for epoch in range(order.epochs or 0):
        first = epoch * order.steps_per_epoch
        seen = pairs(order, first, first + order.steps_per_epoch)
        assert len(seen) == order.steps_per_epoch * order.global_batch_size
        assert len(set(seen)) == len(seen)
        assert all(0 <= place < order.counts[shard] for shard, place in seen)
        assert order.num_samples - len(seen) < order.global_batch_size


@settings(max_examples=60, deadline=None)
@given(orders, st.data())
def test_any_slice_of_steps_is_that_slice_of_the_run(order: Order, data: st.DataObject):
    order = resized(order, data)
    start = data.draw(st.integers(0, order.num_steps))
    stop = data.draw(st.integers(start, order.num_steps))
    size = order.global_batch_size
    assert pairs(order, start, stop) == pairs(order, 0, order.num_steps)[start * size : stop * size]
    row = start * size
    for segment in order.segments(start, stop):
        assert segment.first_row == row
        assert segment.num_rows > 0
        row += segment.num_rows
    assert row == stop * size


@settings(max_examples=60, deadline=None)
@given(orders)
def test_windows_hold_whole_shards_within_the_budget(order: Order):
    for epoch in range(order.epochs or 0):
        windows = order.windows(epoch)
        assert sorted(shard for window in windows for shard in window) == list(
            range(len(order.counts))
        )
        for window in windows:
            held = sum(order.counts[shard] for shard in window)
            assert held <= order.window_samples or len(window) == 1


def test_segments_by_number_and_in_turn_agree():
    order = Order(COUNTS, 3, 7, epochs=5, window_samples=30)
    segments = order.segments(2, 30)
    assert [segments[i] for i in range(len(segments))] == list(segments)
    assert list(segments[1:3]) == list(segments)[1:3]
    assert segments[-1] == list(segments)[-1]
    with pytest.raises(IndexError):
        segments[len(segments)]


def test_seeds_and_epochs_differ_and_repeat():
    order = Order(COUNTS, 0, 10, epochs=2, window_samples=20)
    assert pairs(order, 0, 5) == pairs(Order(COUNTS, 0, 10, epochs=9, window_samples=20), 0, 5)
    assert pairs(order, 0, 5) != pairs(order, 5, 10)
    assert pairs(order, 0, 5) != pairs(Order(COUNTS, 1, 10, epochs=2, window_samples=20), 0, 5)


def test_the_order_is_the_same_for_ever():
    shards, places = Order(COUNTS, 5, 8, total_steps=3, window_samples=24).rows(0, 1)
    assert shards.tolist() == [3, 3, 1, 1, 1, 1, 3, 1]
    assert places.tolist() == [6, 9, 5, 2, 0, 6, 5, 8]


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_workers_share_the_same_global_batches(workers: int):
    order = Order(COUNTS, 0, 8, epochs=2)
    share = 8 // workers
    whole = pairs(order, 0, order.num_steps)
    for step in range(order.num_steps):
        rows = [step * 8 + rank * share + i for rank in range(workers) for i in range(share)]
        assert [whole[row] for row in rows] == pairs(order, step, step + 1)


def test_length_of_a_run():
    assert Order(COUNTS, 0, 8, epochs=3).num_steps == 18
    assert Order(COUNTS, 0, 8, epochs=3, total_steps=7).num_steps == 7
    assert Order(COUNTS, 0, 8, epochs=3, total_steps=70).num_steps == 18
    assert Order(COUNTS, 0, 8, total_steps=70).num_steps == 70
    assert Order(COUNTS, 0, 50, epochs=2).steps_per_epoch == 1


def test_impossible_orders_are_refused():
    with pytest.raises(DataError, match="50 samples are fewer than one global batch of 51"):
        Order(COUNTS, 0, 51, epochs=1)
    with pytest.raises(ConfigError, match="epochs or total_steps"):
        Order(COUNTS, 0, 5)
    with pytest.raises(ConfigError, match="total_steps must be at least 1"):
        Order(COUNTS, 0, 5, total_steps=0)
    with pytest.raises(DataError, match="at least one sample"):
        Order((3, 0), 0, 1, epochs=1)
    with pytest.raises(ConfigError, match="do not lie within"):
        Order(COUNTS, 0, 5, epochs=1).segments(3, 20)


def test_a_run_of_the_papers_size_is_cheap():
    began = time.perf_counter()
    order = Order((5040,) * 2176, 0, 4096, epochs=32)
    segments = order.segments(40_000)
    segments[len(segments) // 2].positions()
    assert time.perf_counter() - began < 5
    assert len(segments) > 10_000


def test_views_repeat_or_not():
    assert [view_of(epoch, None) for epoch in range(4)] == [0, 1, 2, 3]
    for seed in range(4):
        shown = [view_of(epoch, 3, seed) for epoch in range(12)]
        assert all(sorted(shown[start : start + 3]) == [0, 1, 2] for start in range(0, 12, 3))
    orders = {tuple(view_of(epoch, 3, seed) for epoch in range(3)) for seed in range(40)}
    assert len(orders) == 6
    assert np.unique([view_of(epoch, 1) for epoch in range(4)]).tolist() == [0]
