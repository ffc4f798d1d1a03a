"""The Ray Data stream gives every worker exactly its rows, in any arrangement."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import pair

import kdscale.data.stream as stream_module
from kdscale.core.config import DataSpec
from kdscale.core.types import ConfigError, DataError, OrderBroken, ShardChanged
from kdscale.data.samples import Batch, Crop, render, view_of
from kdscale.data.shards import build_manifest, read_tar
from kdscale.data.sidecars import CacheRef, encode_sidecar
from kdscale.data.stream import StreamConfig, TrainStream, train_dataset

GLOBAL, STEPS = 8, 14


def make_tokenizer() -> Callable[[], Callable[[list[str]], Any]]:
    """Gives a factory that travels by value: workers cannot import a test file."""

    def factory() -> Callable[[list[str]], Any]:
        def tokenise(captions: list[str]) -> Any:
            return np.array([[ord(c) for c in text.ljust(20)[:20]] for text in captions])

        return tokenise

    return factory


@pytest.fixture(scope="module")
def config(shards: str) -> StreamConfig:
    return StreamConfig(
        manifest=build_manifest(DataSpec(name="t", urls=shards), num_threads=1),
        global_batch_size=GLOBAL,
        sizes=(32, 16),
        epochs=3,
        total_steps=STEPS,
        seed=1,
        window_samples=24,
        crop=Crop(seed=3),
        views=2,
        tokenizers={"letters": make_tokenizer()},
        cpus_per_task=1.0,
    )


def consume(config: StreamConfig) -> list[list[Batch]]:
    """Runs a stream to its end with one thread per worker; returns a list per step."""
    splits = train_dataset(config).streaming_split(config.num_workers, equal=True)
    streams = [TrainStream(split, config, rank) for rank, split in enumerate(splits)]
    with ThreadPoolExecutor(len(streams)) as pool:
        shares = list(pool.map(list, streams))
    return [list(step) for step in zip(*shares, strict=True)]


def together(shares: list[Batch]) -> dict[str, Any]:
    """Joins the workers' shares of one step."""
    return {
        "step": {share.step for share in shares},
        "epoch": {share.epoch for share in shares},
        "rows": np.concatenate([share.rows for share in shares]).tolist(),
        "keys": [key for share in shares for key in share.keys],
        "images": np.concatenate([share.images[32].numpy() for share in shares]).tobytes(),
        "small": np.concatenate([share.images[16].numpy() for share in shares]).tobytes(),
        "tokens": np.concatenate([share.tokens["letters"].numpy() for share in shares]).tolist(),
    }


@pytest.fixture(scope="module")
def alone(ray_cluster: Any, config: StreamConfig) -> list[list[Batch]]:
    return consume(config)


@pytest.mark.ray
def test_batches_are_what_the_order_says(alone: list[list[Batch]], config: StreamConfig):
    samples = [list(read_tar(shard.path, _local())) for shard in config.manifest.shards]
    assert [step[0].step for step in alone] == list(range(STEPS))
    for (batch,) in alone:
        shards, places = config.order.rows(batch.step, batch.step + 1)
        expected = [samples[s][p] for s, p in zip(shards, places, strict=True)]
        assert batch.keys == [sample.key for sample in expected]
        assert batch.epoch == batch.step // config.order.steps_per_epoch
        assert str(batch.images[32].dtype) == "torch.uint8"
        assert batch.images[32].shape == (GLOBAL, 32, 32, 3)
        assert str(batch.tokens["letters"].dtype) == "torch.int64"
        for i, sample in enumerate(expected):
            crops = render(
                sample.jpg or b"",
                sample.key,
                view_of(batch.epoch, 2, config.seed),
                config.crop,
                (32, 16),
            )
            for px in config.sizes:
                assert np.array_equal(crops[px], batch.images[px][i].numpy())
            text = bytes(batch.tokens["letters"][i].tolist()).decode()
            assert text.strip() == sample.caption


def _local() -> Any:
    import fsspec

    return fsspec.filesystem("file")


@pytest.mark.ray
def test_the_same_key_and_view_give_the_same_crop(alone: list[list[Batch]]):
    seen: dict[tuple[str, int], bytes] = {}
    met = 0
    for (batch,) in alone:
        for key, image in zip(batch.keys, batch.images[32], strict=True):
            place = (key, view_of(batch.epoch, 2, 1))
            met += place in seen
            assert seen.setdefault(place, image.numpy().tobytes()) == image.numpy().tobytes()
    assert met
    assert any(seen[key, 0] != seen[key, 1] for key, _ in seen if {(key, 0), (key, 1)} <= set(seen))


@pytest.mark.ray
@pytest.mark.parametrize(("block_bytes", "cpus"), [(stream_module.BLOCK_BYTES, 1.0), (13_000, 0.5)])
def test_two_workers_see_the_same_global_batches(
    alone: list[list[Batch]],
    config: StreamConfig,
    block_bytes: int,
    cpus: float,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(stream_module, "BLOCK_BYTES", block_bytes)
    shared = replace(config, num_workers=2, cpus_per_task=cpus)
    assert shared.block_rows == (4 if block_bytes > 13_000 else 2)
    assert [together(s) for s in consume(shared)] == [together(s) for s in alone]


@pytest.mark.ray
def test_cached_embeddings_come_with_their_rows(
    alone: list[list[Batch]], config: StreamConfig, tmp_path: Path
):
    cache = CacheRef(str(tmp_path), "teacher", config.crop, views=2)
    known: dict[tuple[str, str], bytes] = {}
    for number, entry in enumerate(config.manifest.shards):
        keys = [sample.key for sample in read_tar(entry.path, _local())]
        for place, part in enumerate(cache.parts()):
            shape = (len(keys), 1, 5) if part == "text" else (len(keys), 5)
            values = np.random.default_rng([number, place]).random(shape).astype(np.float16)
            path = Path(cache.path(part, entry))
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(encode_sidecar(keys, values, cache.metadata(part, entry)))
            known |= {(part, k): v.tobytes() for k, v in zip(keys, values, strict=True)}
    cached = consume(replace(config, num_workers=2, cache=cache))
    assert [together(s) for s in cached] == [together(s) for s in alone]
    for step in cached:
        for share in step:
            assert share.teacher_image is not None
            assert share.teacher_text is not None
            part = f"view-{view_of(share.epoch, 2, config.seed):03d}"
            for i, key in enumerate(share.keys):
                assert share.teacher_image[i].numpy().tobytes() == known[part, key]
                assert share.teacher_text[i].numpy().tobytes() == known["text", key]


@pytest.mark.ray
def test_a_resumed_stream_is_the_tail_of_the_whole(alone: list[list[Batch]], config: StreamConfig):
    # Step 5 lies within a window of the first epoch; the run ends within the third.
    tail = consume(replace(config, start_step=5, own_steps=0))
    assert [together(s) for s in tail] == [together(s) for s in alone[5:]]


@pytest.mark.parametrize("workers", [1, 2])
def test_steps_that_workers_read_themselves_are_the_same(config: StreamConfig, workers: int):
    whole = replace(config, own_steps=STEPS)
    split = replace(whole, num_workers=workers)
    nothing = Fake([])
    expected = [[batch] for batch in TrainStream(nothing, whole, 0)]
    streams = [TrainStream(nothing, split, rank) for rank in range(workers)]
    assert [together(list(s)) for s in zip(*streams, strict=True)] == [
        together(step) for step in expected
    ]


@pytest.mark.ray
def test_a_changed_shard_ends_training_by_name(
    ray_cluster: Any, tmp_path: Path, write_tar: Any, config: StreamConfig
):
    path = write_tar(tmp_path / "a.tar", [p for i in range(8) for p in pair(f"k{i}", i)])
    manifest = build_manifest(DataSpec(name="t", urls=str(path)))
    rotten = replace(config, manifest=manifest, epochs=1, total_steps=None)
    data = path.read_bytes()
    at = data.find(b"\xff\xda", data.find(b"k5.jpg"))
    path.write_bytes(data[:at] + b"\xff\xd9" * 100 + data[at + 200 :])
    with pytest.raises(ShardChanged, match=r"a\.tar changed.*bad image under 'k5'"):
        consume(rotten)
    path.write_bytes(data[:-512])
    with pytest.raises(ShardChanged, match="bytes instead of"):
        consume(rotten)


@pytest.mark.ray
def test_blocks_are_arrow_and_of_equal_size(ray_cluster: Any, config: StreamConfig):
    import pyarrow as pa

    dataset = train_dataset(replace(config, num_workers=2, total_steps=3, own_steps=0))
    blocks = [
        ray_cluster.get(ref) for b in dataset.iter_internal_ref_bundles() for ref in b.block_refs
    ]
    assert all(isinstance(block, pa.Table) for block in blocks)
    assert [block.num_rows for block in blocks] == [4] * 6
    assert [block["row"][0].as_py() for block in blocks] == list(range(0, 24, 4))


def test_a_stream_of_other_rows_is_refused(config: StreamConfig):
    with pytest.raises(OrderBroken, match="order contract broken: step 2 of worker 1"):
        list(
            TrainStream(
                Fake([16, 17, 18, 19]), replace(config, num_workers=2, start_step=2, own_steps=0), 1
            )
        )


def test_a_stream_that_ends_early_is_refused(config: StreamConfig):
    stream = iter(TrainStream(Fake(range(16, 24)), replace(config, start_step=2, own_steps=0), 0))
    assert next(stream).step == 2
    with pytest.raises(DataError, match="ended before step 3 of 14"):
        next(stream)


def test_waiting_is_measured_and_reset(config: StreamConfig):
    last = replace(config, start_step=STEPS - 1, own_steps=0)
    stream = TrainStream(Fake(range((STEPS - 1) * 8, STEPS * 8)), last, 0)
    assert len(stream) == len(list(stream)) == 1
    assert stream.take_wait_s() > 0
    assert stream.wait_s == 0


class Fake:
    """Stands in for a split: one batch of given rows, then nothing."""

    def __init__(self, rows: Any) -> None:
        self.rows = np.array(rows)

    def iter_batches(self, **_: Any) -> Any:
        size = len(self.rows)
        yield {
            "row": self.rows,
            "epoch": np.zeros(size, np.int64),
            "key": np.array(["k"] * size),
            "image_32": np.zeros((size, 32, 32, 3), np.uint8),
            "image_16": np.zeros((size, 16, 16, 3), np.uint8),
            "tokens_letters": np.zeros((size, 20), np.int64),
        }


def test_impossible_streams_are_refused(config: StreamConfig):
    with pytest.raises(ConfigError, match="cannot be shared equally by 3"):
        replace(config, num_workers=3)
    with pytest.raises(ConfigError, match="start_step 15"):
        replace(config, start_step=15)
    with pytest.raises(ConfigError, match="neither"):
        replace(config, sizes=(), tokenizers={})


def test_block_rows_fit_the_budget_and_divide_the_share(config: StreamConfig):
    def rows(batch: int, workers: int, *sizes: int) -> int:
        wide = replace(config, manifest=Wide(), global_batch_size=batch, sizes=sizes)
        return replace(wide, num_workers=workers).block_rows

    assert rows(4096, 16, 224) == 256
    assert rows(4096, 1, 224) == 256
    assert rows(4096, 2, 224, 384) == 64
    assert rows(2 * 1021, 2, 224) == 1021  # a prime: better one large block than single rows


class Wide:
    """A manifest large enough for any batch."""

    counts = (100_000,)


def test_trainer_options_keep_the_order():
    from kdscale.stages.group import SharedStreams

    options = SharedStreams(num_cpus=3)._resolve_execution_options("x")
    assert options.preserve_order
    assert options.resource_limits.cpu == 3
