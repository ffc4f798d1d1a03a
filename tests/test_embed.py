"""The teacher cache equals the teacher, and refuses whatever it was not made for."""

from __future__ import annotations

import io
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import pair
from torch.nn.functional import normalize
from worlds import PX, vit

import kdscale.stages.distill as distill_module
from kdscale.core.config import DataSpec, Distill, Embed, Execution, TowerSpec
from kdscale.core.journal import read_steps
from kdscale.core.stop import ask_to_stop
from kdscale.core.types import (
    CacheCorrupt,
    CacheMismatch,
    CacheMissing,
    ConfigError,
    ShardChanged,
    StageStopped,
    StorageError,
)
from kdscale.data.blocks import Plan, Reading, finish, read_segment
from kdscale.data.order import Order
from kdscale.data.samples import Batch, Crop, render
from kdscale.data.shards import Manifest, build_manifest, read_tar
from kdscale.data.sidecars import read_sidecar, read_summary, view_name
from kdscale.models.preprocess import tokenizer
from kdscale.models.towers import build_clip, normalise
from kdscale.stages.by_shard import finish as finish_embed
from kdscale.stages.by_shard import run_shards, shard_row, shards_of
from kdscale.stages.embed import Embedder, pending
from kdscale.stages.jobs import DistillJob, EmbedJob, embed_recipe
from kdscale.stages.loop import World
from kdscale.sweep.check import check_cacheable

GLOBAL, STEPS, VIEWS = 8, 10, 2


def tall(image_px: int, patch_px: int) -> TowerSpec:
    """Returns a teacher that reads larger images than the student, through a sigmoid head."""
    text = {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    vision = {
        "image_size": image_px,
        "layers": 2,
        "width": 32,
        "head_width": 16,
        "patch_size": patch_px,
    }
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text, "init_logit_bias": -10.0}
    return TowerSpec(
        name=f"teacher {image_px}",
        clip_config=config,
        image_px=image_px,
        context_length=8,
        embed_dim=24,
        width=32,
        patch_px=patch_px,
        resize="squash",
    )


def student() -> TowerSpec:
    """Returns a small student that reads CLIP's real tokens."""
    text = {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    spec = vit()
    assert isinstance(spec.clip_config, dict)
    return spec.replace(clip_config=spec.clip_config | {"text_cfg": text})


@pytest.fixture(scope="module")
def manifest(shards: str) -> Manifest:
    return build_manifest(DataSpec(name="t", urls=shards), num_threads=1)


def distill_job(
    root: Path | str, manifest: Manifest, teacher: TowerSpec, **fields: Any
) -> DistillJob:
    data = DataSpec(name="t", urls="elsewhere")
    recipe = Distill(
        student=student(),
        teacher=teacher,
        data=data,
        views=VIEWS,
        global_batch_size=GLOBAL,
        bn_group=4,
        warmup_steps=1,
        lr=1e-3,
        precision="fp32",
        zero_shot=None,
        run=Execution(),
        **fields,
    )
    return DistillJob("distill", "0" * 16, str(root), recipe, STEPS, manifest, None, {})


def embed_job(job: DistillJob, **fields: Any) -> EmbedJob:
    recipe = embed_recipe(job.recipe).replace(**fields)
    return EmbedJob("e" * 16, job.storage_root, recipe, job.data, {})


def fill(job: EmbedJob) -> None:
    embedder = Embedder(job, device="cpu")
    for number in pending(job):
        embedder(number)
    finish_embed(job, embedder.summary(), 0.0)


def batches(job: DistillJob, sizes: tuple[int, ...]) -> Iterator[Batch]:
    """Makes the batches of a run from the stream's own parts, without Ray."""
    recipe = job.recipe
    order = Order(job.data.counts, recipe.seed, GLOBAL, 3, STEPS)
    crop = Crop(seed=recipe.crop_seed, scale=recipe.crop_scale)
    reading = Reading(recipe.views, recipe.captions, job.cache)
    plan = Plan(crop, recipe.views, sizes, {}, tuple(s.path for s in job.data.shards))
    tables: list[Any] = []
    for segment in order.segments():
        entries = tuple(job.data.shards[number] for number in segment.shards)
        tables += read_segment(segment, entries, reading)
    rows: list[dict[str, Any]] = [
        finish(table.slice(i, 1), plan) for table in tables for i in range(len(table))
    ]
    captions = [text for table in tables for text in table.column("caption").to_pylist()]
    for step in range(order.num_steps):
        part = slice(step * GLOBAL, (step + 1) * GLOBAL)
        columns = {k: np.concatenate([r[k] for r in rows[part]]) for k in rows[0]}
        embeddings = {
            k: torch.from_numpy(columns[k])
            for k in ("teacher_image", "teacher_text")
            if k in columns
        }
        yield Batch(
            step,
            int(columns["epoch"][0]),
            columns["row"],
            columns["key"].tolist(),
            {px: torch.from_numpy(columns[f"image_{px}"]) for px in sizes},
            {student().tokens_name: tokenizer(student())(captions[part])},
            **embeddings,
        )


def losses(job: DistillJob, sizes: tuple[int, ...]) -> list[float]:
    task = distill_module.DistillTask(job, World())
    return [float(task.step(batch)["total"]) for batch in batches(job, sizes)]


@pytest.mark.parametrize("teacher", [tall(224, 32), tall(384, 64)], ids=["224", "384"])
def test_cached_training_equals_online(
    tmp_path: Path, manifest: Manifest, teacher: TowerSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    online = distill_job(tmp_path, manifest, teacher)
    expected = losses(online, (PX, teacher.image_px))
    embed = embed_job(online)
    fill(embed)

    real = distill_module.load_tower

    def no_teacher(spec: TowerSpec, *args: Any, **options: Any) -> Any:
        assert spec.name != teacher.name, "the teacher was loaded"
        return real(spec, *args, **options)

    monkeypatch.setattr(distill_module, "load_tower", no_teacher)
    cached = distill_job(tmp_path, manifest, teacher, teacher_outputs=f"embed:{embed.key}")
    found = losses(cached, (PX,))
    assert len(found) == STEPS
    assert found == pytest.approx(expected, rel=1e-3)
    assert found != expected  # fp16 leaves its mark: the cache was really read


def test_embeddings_are_the_teachers_own(tmp_path: Path, manifest: Manifest) -> None:
    import fsspec

    teacher = tall(224, 32)
    job = embed_job(distill_job(tmp_path, manifest, teacher))
    fill(job)
    model: Any = build_clip(teacher).eval()
    entry = manifest.shards[1]
    samples = list(read_tar(entry.path, fsspec.filesystem("file")))
    seen: list[Any] = []
    for view in range(VIEWS):
        pictures = [render(s.jpg or b"", s.key, view, job.cache.crop, (224,))[224] for s in samples]
        with torch.no_grad():
            pixels = normalise(torch.from_numpy(np.stack(pictures)), teacher)
            expected = normalize(model.encode_image(pixels), dim=-1).numpy()
        keys, values = read_sidecar(job.cache, view_name(view), entry)
        assert keys == [sample.key for sample in samples]
        assert values.dtype == np.float16
        assert np.abs(values - expected).max() <= 2**-11  # half a unit in the last place below 1
        seen.append(np.stack(pictures))
    differing = [not np.array_equal(one, other) for one, other in zip(*seen, strict=True)]
    assert sum(differing) > len(differing) / 2
    summary = read_summary(job.cache)
    assert summary["logit_bias"] == -10.0
    assert summary["logit_scale"] == pytest.approx(1 / 0.07, rel=1e-5)


def test_only_missing_shards_are_embedded_again(tmp_path: Path, manifest: Manifest) -> None:
    job = embed_job(distill_job(tmp_path, manifest, tall(224, 32)))
    fill(job)
    assert pending(job) == []
    files = sorted(Path(job.stage.url("output")).rglob("*.parquet"))
    assert len(files) == len(manifest.shards) * (VIEWS + 1)
    before = {file: file.stat().st_mtime_ns for file in files}
    gone = Path(job.cache.path(view_name(1), manifest.shards[2]))
    gone.unlink()
    assert pending(job) == [2]
    fill(job)
    touched = {f for f in files if f.stat().st_mtime_ns != before[f]}
    assert {f.name for f in touched} == {gone.name}


def test_a_job_that_is_asked_to_stop_stops_after_a_shard(
    tmp_path: Path, manifest: Manifest
) -> None:
    job = embed_job(distill_job(tmp_path, manifest, tall(224, 32)), run=Execution(num_workers=0))
    ask_to_stop(job.stage, "enough")

    def done(number: int) -> dict[str, Any]:
        return shard_row(number, 1, time.perf_counter() - 1, {})

    with pytest.raises(StageStopped, match="stopped early at step 1: enough"):
        list(run_shards(job, [0, 1, 2], lambda: done, 3))
    assert [line["step"] for line in read_steps(job.stage)] == [1]
    assert job.stage.failure() is None


def test_a_shard_listed_twice_is_embedded_once(tmp_path: Path, manifest: Manifest) -> None:
    job = embed_job(distill_job(tmp_path, manifest, tall(224, 32)))
    double = replace(job, data=Manifest(manifest.shards * 2))
    assert shards_of(double) == list(range(len(manifest.shards)))
    few = replace(job, recipe=job.recipe.replace(max_samples=14))
    assert shards_of(few) == [0, 1]


def test_captions_take_turns(tmp_path: Path, write_tar: Any) -> None:
    parts = [part for i in range(8) for part in pair(f"k{i}", i)]
    parts = [
        (name, b'{"captions": ["another one"]}' if name.endswith("json") else data)
        for name, data in parts
    ]
    path = write_tar(tmp_path / "a.tar", parts)
    manifest = build_manifest(DataSpec(name="t", urls=str(path)))
    online = distill_job(tmp_path, manifest, tall(224, 32), captions=2)
    embed = embed_job(online)
    fill(embed)
    cached = distill_job(
        tmp_path, manifest, tall(224, 32), captions=2, teacher_outputs=f"embed:{embed.key}"
    )
    first, second = list(batches(cached, (PX,)))[:2]
    assert (first.epoch, second.epoch) == (0, 1)
    tokens = [batch.tokens[student().tokens_name] for batch in (first, second)]
    assert len(set(map(tuple, tokens[0].tolist()))) == 8
    assert len(set(map(tuple, tokens[1].tolist()))) == 1
    assert second.teacher_text is not None
    assert len(set(map(tuple, second.teacher_text.tolist()))) == 1
    assert losses(cached, (PX,)) == pytest.approx(losses(online, (PX, 224)), rel=1e-3)


@pytest.fixture
def filled(tmp_path: Path, manifest: Manifest) -> EmbedJob:
    job = embed_job(distill_job(tmp_path, manifest, tall(224, 32)))
    fill(job)
    return job


def test_a_rotten_file_is_named(filled: EmbedJob, manifest: Manifest) -> None:
    entry = manifest.shards[0]
    path = Path(filled.cache.path(view_name(0), entry))
    whole = path.read_bytes()
    keys, values = read_sidecar(filled.cache, view_name(0), entry)
    for content in (values.tobytes()[100:120], keys[3].encode()):
        rotten = bytearray(whole)
        rotten[whole.index(content)] ^= 0x01
        path.write_bytes(bytes(rotten))
        with pytest.raises(CacheCorrupt, match=r"is damaged .*digest"):
            read_sidecar(filled.cache, view_name(0), entry)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CacheCorrupt, match=r"is damaged"):
        read_sidecar(filled.cache, view_name(0), entry)


def test_rot_in_what_a_file_says_of_itself_is_named(filled: EmbedJob, manifest: Manifest) -> None:
    entry = manifest.shards[0]
    path = Path(filled.cache.path(view_name(0), entry))
    whole = path.read_bytes()
    for at in range(len(whole) - 900, len(whole), 3):  # the Parquet footer
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with suppress(CacheCorrupt, CacheMismatch):
            read_sidecar(filled.cache, view_name(0), entry)
    table = pq.read_table(io.BytesIO(whole))
    nameless = table.set_column(0, "key", table.column("key").cast("binary"))
    for rotten in (nameless, table.replace_schema_metadata({b"kdscale": b'{"shape": [24]}'})):
        pq.write_table(rotten, str(path))
        with pytest.raises(CacheCorrupt, match=f"damaged .*{filled.stage.url('DONE')}"):
            read_sidecar(filled.cache, view_name(0), entry)
    summary = Path(filled.stage.url("output", "cache.json"))
    for text in (summary.read_text()[:-9], "[]", '{"teacher": "x"}'):
        summary.write_text(text)
        with pytest.raises(CacheCorrupt, match=r"cache\.json is damaged"):
            read_summary(filled.cache)


def test_what_the_cache_was_not_made_for_is_named(filled: EmbedJob, manifest: Manifest) -> None:
    cache, entry = filled.cache, manifest.shards[0]
    with pytest.raises(CacheMismatch, match="another teacher"):
        read_sidecar(replace(cache, teacher="x"), view_name(0), entry)
    with pytest.raises(CacheMismatch, match="another teacher"):
        read_summary(replace(cache, teacher="x"))
    with pytest.raises(CacheMismatch, match="other crops"):
        read_sidecar(replace(cache, crop=Crop(seed=1)), view_name(0), entry)
    with pytest.raises(CacheMissing, match="view-002"):
        read_sidecar(cache, view_name(2), entry)
    with pytest.raises(CacheMissing, match="never embedded"):
        read_sidecar(cache, view_name(0), replace(entry, sha256="f" * 64))
    moved = replace(entry, keys_digest="0")
    with pytest.raises(CacheMismatch, match="other samples"):
        read_sidecar(cache, view_name(0), moved)
    other = Path(cache.path(view_name(0), manifest.shards[1]))
    other.write_bytes(Path(cache.path(view_name(0), entry)).read_bytes())
    with pytest.raises(CacheMismatch, match="another version of the shard"):
        read_sidecar(cache, view_name(0), manifest.shards[1])


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, manifest: Manifest) -> None:
    job = embed_job(distill_job(tmp_path, manifest, tall(224, 32)))
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (900, hard))
    try:
        with pytest.raises(StorageError, match="cannot write"):
            fill(job)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_the_plan_refuses_what_a_cache_cannot_feed(tmp_path: Path, manifest: Manifest) -> None:
    recipe = distill_job(tmp_path, manifest, tall(224, 32)).recipe
    with pytest.raises(ConfigError, match="needs views=N"):
        check_cacheable(recipe.replace(views=None))
    with pytest.raises(ConfigError, match="declares needs_online_teacher"):
        check_cacheable(recipe.replace(loss=own_loss))
    with pytest.raises(ConfigError, match="teacher_outputs"):
        recipe.replace(teacher_outputs="sometimes")


def own_loss(inputs: Any) -> dict[str, Any]:
    """Stands for a loss that runs the teacher itself."""
    raise AssertionError(inputs)


own_loss.needs_online_teacher = True  # pyright: ignore[reportFunctionMemberAccess]


def test_the_views_of_the_benchmark_are_evaluation_crops(
    tmp_path: Path, shards: str, manifest: Manifest
) -> None:
    labelled = build_manifest(DataSpec(name="t", urls=shards), content="labels", num_threads=1)
    recipe = Embed(teacher=tall(224, 32), data=DataSpec(name="t"), views=0, captions=0)
    job = EmbedJob("f" * 16, str(tmp_path), recipe, labelled, {})
    fill(job)
    _, values = read_sidecar(job.cache, "eval", labelled.shards[0])
    assert values.dtype == np.float32
    assert values.shape == (13, 32)


def test_a_shard_that_has_changed_under_its_keys_is_not_embedded(
    tmp_path: Path, write_tar: Any
) -> None:
    path = write_tar(tmp_path / "a.tar", [part for i in range(8) for part in pair(f"k{i}", i)])
    manifest = build_manifest(DataSpec(name="t", urls=str(path)))
    path.write_bytes(path.read_bytes().replace(b"number 3", b"number 4"))
    job = embed_job(distill_job(tmp_path, manifest, tall(224, 32)))
    with pytest.raises(ShardChanged, match=r"a\.tar changed .* other contents"):
        Embedder(job, device="cpu")(0)
    assert pending(job) == [0]


@pytest.mark.ray
def test_a_pool_of_actors_writes_what_one_process_writes(
    ray_cluster: Any, tmp_path: Path, manifest: Manifest
):
    from kdscale.stages.worker import embed

    alone, pooled = (
        embed_job(distill_job(tmp_path / name, manifest, tall(48, 16)))
        for name in ("alone", "pooled")
    )
    fill(alone)
    (number, *_) = pending(pooled)
    Embedder(pooled, device="cpu")(number)  # left by an attempt that was killed before it noted it
    run = Execution(num_workers=2, cpus_per_worker=0.5)
    embed(replace(pooled, recipe=pooled.recipe.replace(run=run)))
    assert pooled.stage.is_done()
    steps = [line["step"] for line in read_steps(pooled.stage)]
    assert steps == list(range(1, len(shards_of(pooled)) + 1))
    assert read_summary(pooled.cache) == read_summary(alone.cache)
    for part in alone.cache.parts():
        for entry in manifest.shards:
            (_, expected), (_, values) = (
                read_sidecar(job.cache, part, entry) for job in (alone, pooled)
            )
            assert np.array_equal(values, expected)
