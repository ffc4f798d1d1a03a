"""`kdscale data`: from captions to a run, inspection and mixes."""

from __future__ import annotations

import hashlib
import io
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
from conftest import jpeg, pair
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner, Result

from kdscale.cli import app
from kdscale.core.config import DataSpec
from kdscale.core.scale import PAPER, with_path
from kdscale.core.storage import Storage
from kdscale.core.types import (
    BadManifest,
    ConfigError,
    DataError,
    NoShards,
    TooManyBadSamples,
)
from kdscale.data.blocks import read_segment
from kdscale.data.contact import contact_sheet
from kdscale.data.mix import MixedSource, mix, parse_sources, spread
from kdscale.data.order import Order
from kdscale.data.shards import Manifest, build_manifest, read_good, read_labelled
from kdscale.data.survey import survey
from kdscale.stages import inputs

LOCAL = fsspec.filesystem("file")


def run(*command: object) -> Result:
    return CliRunner().invoke(app, ["data", *map(str, command)])


def test_from_prepare_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    images, out, captions = tmp_path / "images", tmp_path / "out", [f"number {i}" for i in range(8)]
    images.mkdir()
    for number in range(8):
        (images / f"{number}.jpg").write_bytes(jpeg(number))
    source = tmp_path / "captions.csv"
    lines = [f"{number}.jpg,{caption}" for number, caption in enumerate(captions)]
    source.write_text("\n".join(["image,caption", *lines]))
    options = ["--images", images, "--out", out, "--workers", 1, "--samples-per-shard", 3]
    found = run("prepare", source, *options)
    assert found.exit_code == 0, found.output
    assert f"next: kdscale data verify '{out}/*.tar'" in found.output
    pattern, storage = f"{out}/*.tar", tmp_path / "runs"
    listed = tmp_path / "manifest.json"
    found = run("verify", pattern, "--storage", storage, "--out", listed, "--json")
    document = json.loads(found.stdout)
    assert (document["shards"], document["samples"], document["quarantined"]) == (3, 8, {})
    assert document["manifest"].startswith(f"{storage}/manifests/")

    def never(*_: Any, **__: Any) -> Manifest:
        raise AssertionError("verified again")

    monkeypatch.setattr(inputs, "build_manifest", never)
    for urls in (pattern, str(listed)):
        manifest = inputs.verified(DataSpec(name="x", urls=urls), Storage(str(storage)))
        assert manifest.hash == document["hash"]
        samples = [s for e in manifest.shards for s in read_good(e.path, LOCAL, e)]
        assert [s.caption for s in samples] == captions


def test_a_benchmark_plans_no_more_than_it_can_use(shards: str):
    from kdscale.sweep.throughput import steps_within

    counts = build_manifest(DataSpec(name="t", urls=shards), num_threads=1).counts
    cores, steps = os.cpu_count() or 1, steps_within(seconds=20, batch_size=32)
    assert steps * 32 > 20 * cores * 5000
    assert len(Order(counts, 0, 32, None, steps).segments()) < cores * 10_000


def test_a_share_lies_between_none_and_all(shards: str):
    for share in (-0.1, 5):
        found = run("verify", shards, "--max-bad-fraction", share)
        assert found.exit_code == 2
        assert "Invalid value for '--max-bad-fraction'" in found.output


def test_verify_shows_what_is_wrong_and_keeps_nothing(tmp_path: Path, write_tar: Any):
    path = write_tar(tmp_path / "a.tar", [*pair("a", 1), *pair("b", 2), ("c.txt", b"x")])
    command = ["verify", path, "--storage", tmp_path / "runs"]
    found = run(*command)
    assert found.exit_code == 2
    assert "missing_image" in found.stdout
    assert "c in a.tar" in found.stdout
    assert "TooManyBadSamples" in found.stderr
    assert not (tmp_path / "runs").exists()
    assert run(*command, "--max-bad-fraction", 0.5, "--threads", 1).exit_code == 0
    with pytest.raises(TooManyBadSamples):
        inputs.verified(DataSpec(name="x", urls=str(path)), Storage(str(tmp_path / "runs")))
    assert run("verify", tmp_path / "b.tar", "--storage", tmp_path / "runs").exit_code == 2
    assert run(*command, "--labelled", "--max-bad-fraction", 1).exit_code == 0


def test_inspect_counts_and_draws(tmp_path: Path, write_tar: Any):
    png = io.BytesIO()
    Image.open(io.BytesIO(jpeg(2, 300, 200))).save(png, "PNG")
    parts = [*pair("a", 1), ("b.png", png.getvalue()), ("b.txt", "drei kleine Wörter".encode())]
    write_tar(
        tmp_path / "0.tar", [*parts, ("c.jpg", b"rot"), ("d.jpg", jpeg(3)), ("d.txt", b"\xff")]
    )
    write_tar(tmp_path / "1.tar", [p for i in range(6) for p in pair(f"k{i}", i)])
    sheet = tmp_path / "sheet.png"
    found = run("inspect", f"{tmp_path}/*.tar", "--out", sheet, "--samples", 5, "--json")
    document = json.loads(found.stdout)
    assert document["whole"]
    assert document["looked_at"] == {"shards": 2, "samples": 10}
    assert document["formats"] == {"JPEG": 8, "PNG": 1}
    assert document["width"]["max"] == 200
    assert document["height"]["min"] == 40
    assert [m for m in document["megapixels"] if m["images"]] == [
        {"from": 0.0, "images": 8}, {"from": 0.05, "images": 1},
    ]  # fmt: skip
    assert document["caption_words"]["max"] == 3
    assert document["caption_characters"]["max"] == 18
    assert document["non_jpeg"] == pytest.approx(1 / 9)
    expected = {"unreadable_image": 1, "missing_caption": 1, "non_utf8_caption": 1}
    assert document["faults"] == expected
    assert Image.open(sheet).size[0] > 500
    shown = run("inspect", f"{tmp_path}/*.tar", "--out", sheet).output
    assert "10 samples in 2 shards (all)" in shown
    assert "next: kdscale data verify" in shown
    assert run("inspect", tmp_path / "none-*.tar").exit_code == 2
    with pytest.raises(DataError, match="no sample"):
        contact_sheet([], "", "")


def test_inspect_draws_by_its_seed(shards: str, monkeypatch: pytest.MonkeyPatch):
    def keys(seed: int) -> list[str]:
        return [sample.key for sample in survey(shards, num_picked=9, seed=seed).picked]

    assert len(set(keys(0))) == 9
    assert keys(0) == keys(0) != keys(1)
    monkeypatch.setattr("kdscale.data.survey.MAX_SHARDS", 2)
    monkeypatch.setattr("kdscale.data.survey.MAX_SAMPLES", 10)
    found = survey(shards)
    assert (found.num_shards, found.looked_shards, found.num_samples) == (4, 2, 10)
    assert not found.whole


def manifest_of(urls: str) -> Manifest:
    return build_manifest(DataSpec(name="t", urls=urls), num_threads=1)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=9), st.data())
def test_shares_are_exact(sizes: list[int], data: st.DataObject):
    total = data.draw(st.integers(0, sum(sizes)))
    parts = spread(total, sizes)
    assert sum(parts) == total
    for part, size in zip(parts, sizes, strict=True):
        assert part <= size
        assert abs(part - total * size / sum(sizes)) < 1


@pytest.mark.parametrize("weight", [0.5, 1, 2.5, 0.03])
def test_a_weight_is_so_many_passes(shards: str, weight: float):
    whole = manifest_of(shards)
    manifest = mix([MixedSource(shards, whole, weight)])
    assert manifest.num_samples == round(weight * 50)
    counts: dict[tuple[str, str], int] = {}
    order = Order(manifest.counts, 0, 1, epochs=2, window_samples=30)
    for segment in order.segments(0, order.steps_per_epoch):
        entries = tuple(manifest.shards[number] for number in segment.shards)
        for block in read_segment(segment, entries):
            numbers, keys = block.column("shard").to_pylist(), block.column("key").to_pylist()
            for number, key in zip(numbers, keys, strict=True):
                path = manifest.shards[number].path
                counts[path, key] = counts.get((path, key), 0) + 1
    copies, rest = divmod(round(weight * 50), 50)
    assert sum(counts.values()) == round(weight * 50)
    assert sum(count == copies + 1 for count in counts.values()) == rest
    assert all(count in (copies, copies + 1) for count in counts.values())
    assert len(counts) == (50 if copies else rest)


def test_a_part_of_a_shard_is_always_the_same(shards: str):
    entry = replace(manifest_of(shards).shards[2], take=6)
    places = entry.used_places()
    assert places is not None
    assert places.tolist() == sorted({*places.tolist()})
    assert (len(places), entry.used, int(places[-1]) < 17) == (6, 6, True)
    more = replace(entry, take=7).used_places()
    assert more is not None
    assert set(places.tolist()) < set(more.tolist())
    assert replace(entry, take=None).used_places() is None
    for take in (0, 18):
        with pytest.raises(DataError, match="cannot be taken"):
            replace(entry, take=take)


def test_manifests_of_before_keep_their_hash(shards: str):
    whole = manifest_of(shards)
    rows = [(s.sha256, s.num_samples, s.keys_digest, s.quarantine) for s in whole.shards]
    text = json.dumps([whole.version, False, rows])
    assert whole.hash == hashlib.sha256(text.encode()).hexdigest()
    assert "take" not in whole.to_json()
    half = mix([MixedSource(shards, whole, 0.5)])
    assert half.hash != whole.hash
    assert Manifest.from_json(half.to_json()) == half
    with pytest.raises(BadManifest, match="hash"):
        Manifest.from_json(half.to_json().replace('"take": 7', '"take": 6'))


def test_mixes_that_mean_nothing(shards: str):
    whole = manifest_of(shards)
    source = MixedSource(shards, whole, 1)
    for sources, match in (
        ([source, replace(source, pattern="again")], "already part of"),
        ([replace(source, manifest=mix([replace(source, weight=0.5)]))], "a mix"),
        ([replace(source, manifest=Manifest(whole.shards, "labels"))], "labelled"),
        ([replace(source, weight=0.001)], "leaves none"),
    ):
        with pytest.raises(DataError, match=match):
            mix(sources)
    assert parse_sources(["s3://x/year=2024/*.tar=2.5"]) == {"s3://x/year=2024/*.tar": 2.5}
    for items in (["a.tar"], ["a=0"], ["a=nan"], ["=1"], ["a=1", "a=2"]):
        with pytest.raises(ConfigError, match="--source"):
            parse_sources(items)
    with pytest.raises(DataError, match="read whole"):
        next(iter(read_labelled(Manifest(mix([replace(source, weight=0.5)]).shards, "labels"))))


def test_mix_command_and_its_use_as_data(shards: str, tmp_path: Path, write_tar: Any):
    write_tar(tmp_path / "b.tar", [p for i in range(10) for p in pair(f"z{i}", i)])
    other = f"{tmp_path}/[ab].tar"
    out, storage = tmp_path / "mix.json", tmp_path / "runs"
    sources = ["--source", f"{shards}=0.5", "--source", f"{other}=2.5"]
    found = run("mix", out, *sources, "--storage", storage)
    assert found.exit_code == 0, found.output
    for text in ("25", "50.0%", "[ab]", "next: kdscale plan"):
        assert text in found.output
    assert len(os.listdir(storage / "manifests")) == 2
    source = inputs.find_source(DataSpec(name="x", urls=str(out)), Storage(str(storage)))
    assert source.num_samples == 50
    assert source.manifest().hash == source.hash == Manifest.from_json(out.read_text()).hash
    for role in ("cc12m", "CC12M"):
        scale = PAPER.replace(data_paths={role: str(out), "": "others"})
        assert with_path(scale.data["cc12m"], scale).urls == str(out)
    with pytest.raises(BadManifest, match="labels are needed"):
        inputs.read_manifest(str(out), labelled=True)
    with pytest.raises(NoShards, match="no manifest"):
        inputs.read_manifest(str(tmp_path / "none.json"))
    (tmp_path / "text.json").write_text("[]")
    with pytest.raises(BadManifest, match=r"text\.json is not a usable manifest"):
        inputs.read_manifest(str(tmp_path / "text.json"))
    assert run("mix", tmp_path / "mix.txt", *sources).exit_code == 2
    assert run("mix", out, "--source", shards, "--storage", storage).exit_code == 2
