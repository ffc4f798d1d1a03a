"""The conversation stream gives every worker exactly its micro-batches, in any arrangement."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from conftest import jpeg
from PIL import Image
from talks import manifest_of, parts_of, write_talks
from vocabularies import smollm

from kdscale.core.catalog_mini import MINI_STUDENTS
from kdscale.core.config import DataSpec
from kdscale.core.types import (
    CacheCorrupt,
    CacheMismatch,
    CacheMissing,
    ConfigError,
    DataError,
    OrderBroken,
    ShardChanged,
)
from kdscale.data.blocks import Reading, read_segment
from kdscale.data.collate import collate
from kdscale.data.features import FeatureRef, num_images, write_features
from kdscale.data.instruct import IMAGE, encode, rounds
from kdscale.data.instruct_blocks import finish_instruct, pad_to_square
from kdscale.data.instruct_stream import InstructBatch, InstructConfig, InstructStream
from kdscale.data.samples import decode
from kdscale.data.shards import Manifest, build_manifest, read_good, read_tar
from kdscale.models.preprocess import eval_crop

LOCAL = fsspec.filesystem("file")
TOWER = MINI_STUDENTS["vit_t16"].replace(image_px=32)
PX, VISUAL = 32, 4


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory, write_tar: Any) -> Manifest:
    return manifest_of(write_talks(tmp_path_factory.mktemp("talks"), write_tar))


def config_of(manifest: Manifest, **fields: Any) -> InstructConfig:
    image_id = smollm().convert_tokens_to_ids(IMAGE)
    assert isinstance(image_id, int)
    known: dict[str, Any] = {
        "manifest": manifest,
        "global_batch_size": 12,
        "micro_batch_size": 3,
        "template": "qwen2_base",
        "tokenizer": smollm,
        "image_token_id": image_id,
        "num_image_tokens": VISUAL,
        "max_length": 256,
        "image_px": PX,
        "render": make_render,
        "epochs": 2,
        "seed": 1,
        "window_samples": 30,
        "own_steps": 0,
    }
    return InstructConfig(**(known | fields))


def make_render() -> Any:
    return partial(eval_crop, spec=TOWER)


class Dealt:
    """Stands in for a split: finishes a run's blocks and gives one worker those that it is due."""

    def __init__(self, config: InstructConfig, rank: int) -> None:
        self.config, self.rank = config, rank

    def iter_batches(self, *, batch_size: int, **_: Any) -> Iterator[pa.Table]:
        config = self.config
        shards = config.manifest.shards
        read = [
            table
            for segment in config.order.segments(config.start_step)
            for table in read_segment(
                segment, tuple(shards[n] for n in segment.shards), Reading(conversations=True)
            )
        ]
        rows = pa.concat_tables(read)
        for number in range(self.rank, rows.num_rows // batch_size, config.num_workers):
            block = rows.slice(number * batch_size, batch_size)
            yield finish_instruct(block, config.plan())


def consume(config: InstructConfig) -> list[list[InstructBatch]]:
    """Runs a stream to its end; returns a list per step, of the workers' batches."""
    streams = [
        InstructStream(Dealt(config, rank), config, rank) for rank in range(config.num_workers)
    ]
    return [list(step) for step in zip(*streams, strict=True)]


def flat(shares: list[InstructBatch]) -> list[Any]:
    """Puts the micro-batches of a step in the order of their rows, as plain values."""
    found = sorted((m for share in shares for m in share.micro), key=lambda m: int(m.rows[0]))
    return [
        [
            m.rows.tolist(),
            m.keys,
            [(e.input_ids.tolist(), e.labels.tolist()) for e in m.encoded],
            [None if image is None else image.tobytes() for image in m.pixels],
        ]
        for m in found
    ]


@pytest.fixture(scope="module")
def alone(manifest: Manifest) -> list[list[InstructBatch]]:
    return consume(config_of(manifest))


def test_micro_batches_are_what_the_order_says(
    alone: list[list[InstructBatch]], manifest: Manifest
):
    config = config_of(manifest)
    samples = [list(read_tar(shard.path, LOCAL)) for shard in manifest.shards]
    assert [batch.step for (batch,) in alone] == list(range(10))
    for (batch,) in alone:
        shards, places = config.order.rows(batch.step, batch.step + 1)
        expected = [samples[s][p] for s, p in zip(shards, places, strict=True)]
        assert batch.epoch == batch.step // 5
        assert [m.rows.tolist() for m in batch.micro] == [
            list(range(first, first + 3))
            for first in range(12 * batch.step, 12 * batch.step + 12, 3)
        ]
        assert [key for m in batch.micro for key in m.keys] == [s.key for s in expected]
        encoded = [e for m in batch.micro for e in m.encoded]
        pixels = [p for m in batch.micro for p in m.pixels]
        for sample, ids, image in zip(expected, encoded, pixels, strict=True):
            assert (sample.jpg is None) == (image is None)
            want = encode(
                rounds(sample.meta["conversations"]), config.template, bool(sample.jpg), smollm(),
                image_token_id=config.image_token_id, num_image_tokens=VISUAL, max_length=256,
            )  # fmt: skip
            assert np.array_equal(ids.input_ids, want.input_ids)
            assert np.array_equal(ids.labels, want.labels)
            assert ids.input_ids.dtype == ids.labels.dtype == np.int64
            if image is not None:
                assert np.array_equal(image, eval_crop(decode(sample.jpg or b""), TOWER))


def test_workers_share_the_same_micro_batches(alone: list[list[InstructBatch]], manifest: Manifest):
    for workers in (2, 4):
        config = config_of(manifest, num_workers=workers)
        shared = consume(config)
        assert [flat(step) for step in shared] == [flat(step) for step in alone]
        assert all(len(share.micro) == config.accumulation for step in shared for share in step)


def test_a_resumed_stream_is_the_tail_of_the_whole(
    alone: list[list[InstructBatch]], manifest: Manifest
):
    tail = consume(config_of(manifest, start_step=3))
    assert [flat(step) for step in tail] == [flat(step) for step in alone[3:]]


def test_grouped_micro_batches_are_of_one_modality(
    alone: list[list[InstructBatch]], manifest: Manifest
):
    grouped = consume(config_of(manifest, group_size=6, epochs=1))
    keys = {key for (batch,) in grouped for m in batch.micro for key in m.keys}
    assert len(keys) == 60
    micro = [m for (batch,) in grouped for m in batch.micro]
    mixed = sum(len({p is None for p in m.pixels}) > 1 for m in micro)
    before = sum(len({p is None for p in m.pixels}) > 1 for (b,) in alone[:5] for m in b.micro)
    assert mixed < before / 2


def test_micro_batches_collate(alone: list[list[InstructBatch]], manifest: Manifest):
    config = config_of(manifest)
    for (batch,) in alone[:2]:
        for m in batch.micro:
            made = collate(
                m.encoded,
                m.pixels,
                pad_id=0,
                image_token_id=config.image_token_id,
                num_image_tokens=VISUAL,
                pixel_shape=config.pixel_shape,
            )
            assert made["pixel_values"].shape[1:] == (PX, PX, 3)
            images = made["input_ids"] == config.image_token_id
            assert int(images.sum()) == VISUAL * len(made["pixel_values"])
            assert bool((made["labels"] != -100).any())


def test_images_are_padded_before_they_are_rendered(manifest: Manifest):
    colour = tuple(int(255 * mean) for mean in TOWER.mean)
    assert len(colour) == 3
    config = config_of(manifest, pad_colour=colour, total_steps=1)
    ((batch,),) = consume(config)
    first = batch.micro[0]
    place = next(i for i, pixels in enumerate(first.pixels) if pixels is not None)
    key, image = first.keys[place], first.pixels[place]
    original = Image.fromarray(decode(jpeg(int(key))))
    square = Image.new("RGB", (48, 48), colour)
    square.paste(original, (0, 4))
    assert np.array_equal(image, eval_crop(np.asarray(square), TOWER))


def test_padding_makes_squares_of_any_shape(monkeypatch: pytest.MonkeyPatch):
    for height, width in ((5, 8), (8, 5), (7, 7), (1, 4)):
        image = np.full((height, width, 3), 200, np.uint8)
        square = pad_to_square(image, (1, 2, 3))
        side = max(height, width)
        reference = Image.new("RGB", (side, side), (1, 2, 3))
        reference.paste(Image.fromarray(image), ((side - width) // 2, (side - height) // 2))
        assert np.array_equal(square, np.asarray(reference))
    monkeypatch.setattr("kdscale.data.instruct_blocks.MAX_PIXELS", 10_000)
    assert pad_to_square(np.zeros((2, 400, 3), np.uint8), (9, 9, 9)).shape == (100, 100, 3)


def test_impossible_streams_are_refused(manifest: Manifest, shards: str):
    for fields, match in (
        ({"micro_batch_size": 5}, "do not make up a global batch of 12"),
        ({"num_workers": 3}, "4 micro-batches of a step cannot be shared equally by 3 workers"),
        ({"start_step": 11}, "start_step 11 lies outside"),
        ({"group_size": 4}, "whole micro-batches of 3"),
        ({"template": "qwen"}, "unknown template"),
        ({"template": "pretrain"}, "16 samples of the data have no image"),
    ):
        with pytest.raises((ConfigError, DataError), match=match):
            config_of(manifest, **fields)
    captions = build_manifest(DataSpec(name="c", urls=shards), num_threads=1)
    with pytest.raises(DataError, match="verify the data with --conversations"):
        config_of(captions)


def test_blocks_of_others_or_too_few_are_refused(manifest: Manifest):
    config = config_of(manifest, num_workers=2, start_step=1)
    with pytest.raises(OrderBroken, match="micro-batch 0 of worker 0 in step 1 should be rows 12"):
        list(InstructStream(Dealt(config, 1), config, 0))
    short = config_of(manifest, epochs=1)
    stream = InstructStream(Dealt(short, 0), config_of(manifest), 0)
    with pytest.raises(DataError, match="ended before step 5 of 10"):
        list(stream)
    assert len(stream) == 10
    assert stream.take_wait_s() > 0
    assert stream.wait_s == 0


def test_a_rotten_image_is_named(tmp_path: Path, write_tar: Any):
    members = [m for i in range(4) for m in parts_of(f"k{i}", i)]
    path = write_tar(tmp_path / "a.tar", members)
    config = config_of(manifest_of(path), global_batch_size=3, epochs=1)
    data = path.read_bytes()
    at = data.find(b"\xff\xda", data.find(b"k1.jpg"))
    path.write_bytes(data[:at] + b"\xff\xd9" * 100 + data[at + 200 :])
    with pytest.raises(ShardChanged, match=r"a\.tar changed.*bad image under 'k1'"):
        consume(config)


def test_data_tasks_need_neither_ray_nor_torch():
    code = "import sys, kdscale.data.instruct_blocks, kdscale.data.prepare; "
    code += "sys.exit(bool({'ray', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- cached features -------------------------------------------------------------------------


@pytest.fixture
def features(manifest: Manifest, tmp_path: Path) -> FeatureRef:
    """Random features of every image."""
    ref = FeatureRef(str(tmp_path), "tower 1", (VISUAL, 5))
    for number, entry in enumerate(manifest.shards):
        write_features(Path(ref.path(entry)), ref, entry, batches(number, num_images(entry)))
    return ref


def batches(seed: int, count: int) -> Iterator[Any]:
    values = np.random.default_rng(seed).random((count, VISUAL, 5)).astype(np.float16)
    yield from np.array_split(values, 3)


def test_features_come_with_their_rows(
    alone: list[list[InstructBatch]], manifest: Manifest, features: FeatureRef
):
    from safetensors.numpy import load_file

    config = config_of(manifest, features=features)
    assert config.pixel_shape == (VISUAL, 5)
    known: dict[str, Any] = {}
    for entry in manifest.shards:
        images = [s.key for s in read_good(entry.path, LOCAL, entry) if s.jpg]
        rows = load_file(features.path(entry))["features"]
        known |= dict(zip(images, rows, strict=True))
    for (batch,), (online,) in zip(consume(config), alone, strict=True):
        for m, other in zip(batch.micro, online.micro, strict=True):
            assert m.keys == other.keys
            for key, found, image in zip(m.keys, m.pixels, other.pixels, strict=True):
                assert (found is None) == (image is None) == (key not in known)
                assert found is None or np.array_equal(found, known[key])


def test_features_that_are_not_those(manifest: Manifest, features: FeatureRef):
    path = Path(features.path(manifest.shards[0]))
    whole, roots = path.read_bytes(), count(1)

    def refused(error: type[Exception], match: str, **fields: Any) -> None:
        # A header is read once per process and reference: each case gets a root of its own.
        number = next(roots)
        ref = replace(features, **fields, root=f"{features.root}{'/.' * number}")
        with pytest.raises(error, match=match):
            consume(config_of(manifest, features=ref, epochs=1))

    refused(CacheMismatch, "tower 2", tower="tower 2")
    refused(CacheCorrupt, "which is not", shape=(VISUAL, 6))
    path.write_bytes(whole[:-4])
    refused(CacheCorrupt, "which is not")
    at = len(whole) - 8 * num_images(manifest.shards[0]) - 100
    path.write_bytes(whole[:at] + bytes(60) + whole[at + 60 :])
    refused(CacheCorrupt, "does not fit its checksum")
    path.write_bytes(b"rubbish, not tensors")
    refused(CacheCorrupt, "not a safetensors file")
    path.unlink()
    refused(CacheMissing, "were never computed")
    entry = manifest.shards[1]
    for values, match in (
        (np.zeros((2, VISUAL, 5), np.float16), "12 images, 2 were given"),
        (np.zeros((12, VISUAL, 5), np.float32), "float16"),
    ):
        with pytest.raises(DataError, match=match):
            write_features(path, features, entry, [values])
        assert not path.exists()
