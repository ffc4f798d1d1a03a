"""Shards, their manifests, and every way in which input can be bad."""

from __future__ import annotations

import io
import json
import shutil
import struct
import subprocess
import sys
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import cv2
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import jpeg, pair
from PIL import Image

from kdscale.core.catalog_mini import MINI_STUDENTS
from kdscale.core.config import DataSpec
from kdscale.core.types import DataError, EmptyShard, NoShards, ShardChanged, TooManyBadSamples
from kdscale.data.blocks import _pixels
from kdscale.data.samples import BadImage, Crop, crop_box, decode, render, resize
from kdscale.data.shards import (
    Manifest,
    build_manifest,
    check_labels,
    expand,
    read_good,
    read_labelled,
    read_tar,
)
from kdscale.models import preprocess
from kdscale.models.preprocess import eval_crop

LOCAL = fsspec.filesystem("file")


def manifest_of(path: object, fraction: float = 1.0, **options: Any) -> Manifest:
    spec = DataSpec(name="test", urls=str(path), max_bad_fraction=fraction)
    return build_manifest(spec, num_threads=2, **options)


def bomb_header(side: int = 30_000) -> bytes:
    """Takes a small picture and claims that it is huge."""
    data = bytearray(jpeg(0))
    at = data.find(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", side, side)
    return bytes(data)


def encoded(image: np.ndarray, kind: str, mode: str = "RGB", **options: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).convert(mode).save(out, kind, **options)
    return out.getvalue()


def test_reading_needs_neither_ray_nor_torch():
    code = "import sys, kdscale.data.shards, kdscale.data.order; "
    code += "sys.exit(bool({'ray', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_expand_braces_globs_folders_and_urls(shards: str):
    listed = expand(shards)
    folder = Path(listed[0]).parent
    assert [Path(p).name for p in listed] == [f"{i:05d}.tar" for i in range(4)]
    assert expand(f"{folder}/*.tar") == listed == expand(str(folder))
    assert expand(f"{folder}/0000{{3,1}}.tar") == [listed[3], listed[1]]
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/a-1.tar", b"x")
    assert expand("memory://bucket/a-{1..1}.tar") == ["memory:///bucket/a-1.tar"]


def test_expand_names_what_is_missing(tmp_path: Path, shards: str):
    with pytest.raises(NoShards, match=r"nothing-\*\.tar"):
        expand(f"{tmp_path}/nothing-*.tar")
    with pytest.raises(NoShards, match=r"00004\.tar.*4 others exist"):
        expand(shards.replace("00003", "00004"))
    with pytest.raises(NoShards):
        expand(f"{tmp_path}/no-such-folder")


def test_manifest_of_healthy_shards(shards: str):
    manifest = manifest_of(shards, 0.0)
    assert manifest.counts == (13, 9, 17, 11)
    assert manifest.num_samples == 50
    assert manifest.causes() == {}
    assert Manifest.from_json(manifest.to_json()) == manifest
    entry = manifest.shards[2]
    samples = list(read_good(entry.path, LOCAL, entry))
    assert [s.key for s in samples] == [f"2{i:04d}" for i in range(17)]
    assert samples[5].caption == "picture number 205"
    assert samples[5].meta == {"label": 5}


def test_reader_agrees_with_tarfile(shards: str):
    for path in expand(shards):
        with tarfile.open(path) as tar:
            files = {m.name: tar.extractfile(m).read() for m in tar}  # pyright: ignore
        for sample in read_tar(path, LOCAL):
            assert sample.jpg == files[f"{sample.key}.jpg"]
            assert sample.txt == files[f"{sample.key}.txt"]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_long_names_links_and_folders(tmp_path: Path, form: int):
    long = "/".join(["folder" * 8] * (4 if form == tarfile.USTAR_FORMAT else 9)) + "/täil"
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as tar:
        tar.addfile(_info("folder", tarfile.DIRTYPE))
        for name, data in [*pair(long, 1), ("._hidden.jpg", b"x"), ("noext", b"y")]:
            tar.addfile(_info(name, size=len(data)), io.BytesIO(data))
        link = _info("link.jpg", tarfile.SYMTYPE)
        link.linkname = "/etc/passwd"
        tar.addfile(link)
    assert [s.key for s in read_tar(str(tmp_path / "a.tar"), LOCAL)] == [long]


def _info(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info


def test_names_that_climb_out_write_nothing(tmp_path: Path, write_tar):
    path = write_tar(tmp_path / "in" / "a.tar", pair("../../escaped", 1) + pair("/root/x", 2))
    before = sorted(p for p in tmp_path.rglob("*"))
    assert manifest_of(path).num_samples == 2
    assert sorted(p for p in tmp_path.rglob("*")) == before


BAD = {
    "truncated_jpeg": [("bad.jpg", jpeg(1)[:-60]), ("bad.txt", b"x")],
    "bomb": [("bad.jpg", bomb_header()), ("bad.txt", b"x")],
    "undecodable": [("bad.jpg", b"no image at all"), ("bad.txt", b"x")],
    "non_utf8_caption": pair("bad", 1, b"caf\xe9 \xff"),
    "empty_caption": pair("bad", 1, b" \n"),
    "missing_image": [("bad.txt", b"x")],
    "missing_caption": [("bad.jpg", jpeg(1))],
    "bad_json": [*pair("bad", 1)[:2], ("bad.json", b"{")],
    "duplicate_key": pair("first", 1),
}


@pytest.mark.parametrize("cause", BAD)
def test_each_bad_sample_is_quarantined_with_its_cause(tmp_path: Path, write_tar, cause: str):
    path = write_tar(tmp_path / "a.tar", pair("first", 1) + pair("mid", 5) + BAD[cause])
    manifest = manifest_of(path)
    assert manifest.causes() == {cause: 1}
    entry = manifest.shards[0]
    assert entry.quarantine[0][0] == 2
    assert [s.key for s in read_good(entry.path, LOCAL, entry)] == ["first", "mid"]
    with pytest.raises(TooManyBadSamples, match=rf"1 of 3 .*{cause} 1.* in .*a\.tar"):
        manifest_of(path, 0.2)


def test_a_bomb_is_refused_before_it_is_allocated():
    tracemalloc.start()
    with pytest.raises(BadImage, match=r"bomb.*30000 x 30000"):
        decode(bomb_header())
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(
        ">I4sIIBBBBBI", 13, b"IHDR", 9000, 9000, 8, 2, 0, 0, 0, 0
    )
    with pytest.raises(BadImage):
        decode(png)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_empty_shards_stop_everything(tmp_path: Path, write_tar):
    for parts, found in (([], "nothing"), (BAD["missing_image"], "missing_image 1")):
        path = write_tar(tmp_path / "a.tar", parts)
        with pytest.raises(EmptyShard, match=rf"a\.tar.*{found}"):
            manifest_of(path)
    (tmp_path / "zero.tar").write_bytes(b"")
    with pytest.raises(EmptyShard, match="zero"):
        manifest_of(tmp_path / "zero.tar")


def test_a_truncated_tar_gives_what_came_before(tmp_path: Path, write_tar):
    whole = write_tar(tmp_path / "a.tar", [p for i in range(6) for p in pair(f"k{i}", i)])
    data = whole.read_bytes()
    with tarfile.open(whole) as tar:
        ends = {m.name: m.offset_data + -(-m.size // 512) * 512 for m in tar}
    cuts = {
        ends["k4.jpg"] - 600: 4,  # within an image
        ends["k4.jpg"]: 4,  # between an image and its caption
        ends["k3.json"]: 4,  # between two samples
        ends["k3.json"] + 100: 4,  # within a header
    }
    for cut, expected in cuts.items():
        (tmp_path / "cut.tar").write_bytes(data[:cut])
        manifest = manifest_of(tmp_path / "cut.tar")
        assert manifest.causes() == {"truncated_tar": 1}
        entry = manifest.shards[0]
        keys = [s.key for s in read_good(entry.path, LOCAL, entry)]
        assert keys == [f"k{i}" for i in range(expected)]


def test_a_lying_member_size_is_a_cut(tmp_path: Path, write_tar):
    path = write_tar(tmp_path / "a.tar", pair("a", 1) + pair("b", 2))
    with tarfile.open(path) as tar:
        at = tar.getmember("b.jpg").offset
    data = bytearray(path.read_bytes())
    info = tarfile.TarInfo("b.jpg")
    info.size = 1 << 50
    data[at : at + 512] = info.tobuf(tarfile.GNU_FORMAT)
    path.write_bytes(data)
    assert manifest_of(path).causes() == {"truncated_tar": 1}


def test_the_hash_is_of_contents_not_of_places(tmp_path: Path, shards: str, write_tar):
    listed = expand(shards)
    for path in listed:
        shutil.copy(path, tmp_path / f"renamed-{Path(path).name}")
    here, there = manifest_of(shards), manifest_of(f"{tmp_path}/*.tar")
    assert here.hash == there.hash
    assert here != there
    other = write_tar(tmp_path / "renamed-00003.tar", pair("new", 1))
    assert manifest_of(f"{tmp_path}/*.tar").hash != here.hash
    assert manifest_of(other).hash != manifest_of(listed[3]).hash


def test_an_edited_manifest_is_refused(shards: str):
    text = manifest_of(shards).to_json()
    with pytest.raises(DataError, match="hash"):
        Manifest.from_json(text.replace('"num_samples": 13', '"num_samples": 12'))
    with pytest.raises(DataError, match="verify"):
        Manifest.from_json("[]")


def test_changed_shards_are_noticed(tmp_path: Path, write_tar):
    path = write_tar(tmp_path / "a.tar", pair("a", 1) + pair("b", 2))
    entry = manifest_of(path).shards[0]
    data = path.read_bytes()
    for change in (data + b"\0" * 512, data.replace(b"b.jpg", b"c.jpg")[: len(data)]):
        path.write_bytes(change)
        with pytest.raises(ShardChanged, match=r"a\.tar changed"):
            list(read_good(str(path), LOCAL, entry))
    path.unlink()
    with pytest.raises(ShardChanged, match="gone"):
        list(read_good(str(path), LOCAL, entry))


def test_parquet_shards(tmp_path: Path):
    images, captions = [jpeg(i) for i in range(5)], ["a", "b", None, "", "e"]
    pq.write_table(pa.table({"jpg": images, "txt": captions}), tmp_path / "a.parquet")
    nested = [{"bytes": image, "path": "x"} for image in images]
    table = pa.table({"image": nested, "caption": captions, "key": list("vwxyz")})
    pq.write_table(table, tmp_path / "b.parquet")
    manifest = manifest_of(f"{tmp_path}/*.parquet")
    assert manifest.counts == (3, 3)
    assert manifest.causes() == {"missing_caption": 2, "empty_caption": 2}
    entry = manifest.shards[1]
    assert [s.key for s in read_good(entry.path, LOCAL, entry)] == ["v", "w", "z"]
    pq.write_table(pa.table({"url": ["x"]}), tmp_path / "c.parquet")
    with pytest.raises(DataError, match="no column jpg or image"):
        manifest_of(tmp_path / "c.parquet")


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"json": [{"label": 1}]}, r"column json of .*a\.parquet holds struct<label: int64>"),
        ({"txt": [["a", "b"]]}, r"column txt of .*a\.parquet holds list<"),
        ({"jpg": ["aGVsbG8="]}, r"column jpg of .*a\.parquet holds string, not encoded images"),
    ],
)
def test_parquet_columns_of_other_types_are_named(tmp_path: Path, column: Any, message: str):
    table = pa.table({"jpg": [jpeg(0)], "txt": ["a"]} | column)
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=message):
        manifest_of(tmp_path / "a.parquet")


def test_files_that_are_no_shards_are_named(tmp_path: Path):
    pq.write_table(pa.table({"jpg": [jpeg(0)], "txt": ["a"]}), tmp_path / "whole.parquet")
    whole = (tmp_path / "whole.parquet").read_bytes()
    damaged = whole[:4] + bytes(len(whole) // 2) + whole[4 + len(whole) // 2 :]
    for number, data in enumerate((whole[:-20], b"", damaged)):
        (tmp_path / f"{number}.parquet").write_bytes(data)
        with pytest.raises(DataError, match=rf"{number}\.parquet cannot be read as Parquet"):
            manifest_of(tmp_path / f"{number}.parquet")
    (tmp_path / "folder.tar").mkdir()
    with pytest.raises(DataError, match=r"folder\.tar is a directory"):
        manifest_of(tmp_path / "*.tar")


def test_json_nested_without_end_is_bad_json(tmp_path: Path, write_tar):
    deep = ("bad.json", b'{"a":' * 200_000 + b"1" + b"}" * 200_000)
    path = write_tar(tmp_path / "a.tar", [*pair("first", 1), *pair("bad", 2)[:2], deep])
    assert manifest_of(path).causes() == {"bad_json": 1}


def test_labels(tmp_path: Path, write_tar):
    parts = [p for i in range(4) for p in pair(f"k{i}", i) if not p[0].endswith("txt")]
    path = write_tar(
        tmp_path / "a.tar", [*parts, ("k5.jpg", jpeg(5)), ("k5.json", b'{"label": "1"}')]
    )
    manifest = manifest_of(path, content="labels")
    assert manifest.causes() == {"missing_label": 1}
    assert [(key, label) for key, label, _ in read_labelled(manifest)] == [
        (f"k{i}", i) for i in range(4)
    ]
    with pytest.raises(DataError, match="content='labels'"):
        next(iter(read_labelled(Manifest(manifest.shards))))


def test_decode_reads_every_kind():
    image = np.asarray(Image.open(io.BytesIO(jpeg(3))).resize((48, 40)))
    for kind, mode, options in (
        ("JPEG", "RGB", {"progressive": True}),
        ("JPEG", "L", {}),
        ("JPEG", "CMYK", {}),
        ("PNG", "RGBA", {}),
        ("PNG", "P", {}),
        ("WEBP", "RGB", {"quality": 95}),
    ):
        data = encoded(image, kind, mode, **options)
        got = decode(data)
        assert got.shape == (40, 48, 3)
        assert got.dtype == np.uint8
        reference = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), float)
        assert np.abs(got - reference).mean() < 2, (kind, mode)


def test_sixteen_bits_of_grey_are_scaled():
    ramp = np.linspace(0, 65_535, 48 * 40).astype(np.uint16).reshape(40, 48)
    out = io.BytesIO()
    Image.fromarray(ramp).save(out, "PNG")
    assert np.array_equal(decode(out.getvalue()), np.repeat(ramp[..., None] >> 8, 3, axis=2))


@pytest.mark.parametrize("turned", [False, True])
def test_a_thread_of_an_image_is_cropped_before_it_is_resized(
    turned: bool, monkeypatch: pytest.MonkeyPatch
):
    spec = MINI_STUDENTS["vit_t16"].replace(image_px=32)
    thread = np.random.default_rng(0).integers(90, 160, (7, 7 * 201, 3), np.uint8)
    thread = thread.transpose(1, 0, 2).copy() if turned else thread
    cropped = eval_crop(thread, spec)
    monkeypatch.setattr(preprocess, "MAX_ASPECT", 1000)
    whole = eval_crop(thread, spec)
    assert cropped.shape == whole.shape == (32, 32, 3)
    assert np.abs(cropped.astype(int) - whole).max() <= 1
    monkeypatch.undo()
    sizes: list[Any] = []
    resize_of = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda *a, **k: sizes.append(a[1]) or resize_of(*a, **k)
    )
    eval_crop(np.zeros((65_000, 1, 3), np.uint8), spec)
    assert sizes == [(32, 32)]


def test_crops_follow_the_rule():
    seen = set()
    for key in map(str, range(300)):
        top, left, height, width = crop_box(key, 0, Crop(), 256, 341)
        assert 0 <= top <= 256 - height
        assert 0 <= left <= 341 - width
        assert 0.89 < height * width / (256 * 341) <= 1.0
        assert 0.74 < width / height < 1.35
        seen.add((top, left, height, width))
    assert len(seen) > 150
    assert crop_box("k", 1, Crop(), 256, 256) == crop_box("k", 1, Crop(), 256, 256)
    assert crop_box("k", 1, Crop(), 256, 256) != crop_box("k", 2, Crop(), 256, 256)
    assert crop_box("k", 1, Crop(1), 256, 256) != crop_box("k", 1, Crop(), 256, 256)
    # A panorama admits no box of nine tenths of its area: the largest central one is taken.
    assert crop_box("k", 0, Crop(), 100, 1000) == (0, 433, 100, 133)


def test_crops_are_the_same_for_ever():
    boxes = [crop_box(key, view, Crop(7), 256, 341) for key in ("a", "é") for view in (0, 1)]
    assert boxes == [(2, 7, 253, 327), (5, 13, 250, 325), (1, 8, 255, 318), (1, 0, 254, 332)]


def test_resize_stays_near_antialiased_bicubic():
    image = decode(jpeg(4, 240, 240))
    for px in (300, 224, 160, 96, 48):
        want = np.asarray(Image.fromarray(image).resize((px, px), Image.Resampling.BICUBIC), float)
        error = np.mean((resize(image, px) - want) ** 2)
        assert 10 * np.log10(255**2 / error) > 30, px


def test_one_box_serves_every_size():
    views = render(jpeg(1, 200, 200), "k", 0, Crop(), (64, 32))
    assert {px: v.shape for px, v in views.items()} == {64: (64, 64, 3), 32: (32, 32, 3)}
    small = resize(views[64], 32).astype(float)
    assert np.abs(small - views[32]).mean() < 4
    assert json.dumps(sorted(views)) == "[32, 64]"


def test_labels_must_name_classes(shards: str) -> None:
    manifest = build_manifest(DataSpec(name="t", urls=shards), content="labels", num_threads=1)
    manifest = Manifest.from_json(manifest.to_json())
    assert manifest.shards[0].labels == (0, 9)
    check_labels(manifest, 10, "ten")
    with pytest.raises(DataError, match="labels from 0 to 9, the benchmark 'few' has classes 0"):
        check_labels(manifest, 9, "few")


def test_what_a_cut_shard_lost_counts(tmp_path: Path, write_tar: Any) -> None:
    for number in range(3):
        parts = [p for i in range(20) for p in pair(f"{number}{i:03d}", i)]
        path = write_tar(tmp_path / f"{number}.tar", parts)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    spec = DataSpec(name="t", urls=f"{tmp_path}/*.tar", max_bad_fraction=0.1)
    with pytest.raises(TooManyBadSamples, match=r"allowed 10\.0%"):
        build_manifest(spec)


def test_large_jpegs_are_decoded_at_a_half_or_a_quarter():
    gradient = np.linspace(0, 255, 900 * 700 * 3, dtype=np.uint8).reshape(700, 900, 3)
    jpeg = cv2.imencode(".jpg", cv2.GaussianBlur(gradient, (31, 31), 9))[1].tobytes()
    assert [decode(jpeg, d).shape for d in (1, 2, 4)] == [
        (700, 900, 3),
        (350, 450, 3),
        (175, 225, 3),
    ]
    png = cv2.imencode(".png", gradient)[1].tobytes()
    assert decode(png, 4).shape == (700, 900, 3)
    whole = decode(jpeg)
    top, left, height, width = crop_box("k", 0, Crop(), 700, 900)
    together = render(jpeg, "k", 0, Crop(), (64, 224, 600))
    for px, image in together.items():
        expected = resize(whole[top : top + height, left : left + width], px)
        assert np.abs(image.astype(int) - expected).mean() < 2.5, px
        # What one size shows does not depend on the others.
        assert np.array_equal(image, render(jpeg, "k", 0, Crop(), (px,))[px])


def test_the_memory_of_a_block_is_used_again_once_nobody_holds_it():
    first = _pixels((3, 2, 2, 3))
    second, place = _pixels((3, 2, 2, 3)), first.ctypes.data
    held = pa.py_buffer(first)
    del first
    third = _pixels((3, 2, 2, 3))
    last = third.ctypes.data
    assert len({place, second.ctypes.data, last}) == 3
    del held, third
    assert _pixels((3, 2, 2, 3)).ctypes.data == last
