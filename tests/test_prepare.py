"""From captions and images to shards: every format, every way to fail, and reruns."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from conftest import jpeg, pair
from PIL import Image, ImageOps
from typer.testing import CliRunner, Result

from kdscale.cli import app
from kdscale.core.types import (
    ConfigError,
    DataError,
    EmptyShard,
    FolderTaken,
    TooManyBadSamples,
)
from kdscale.data.captions import Captions
from kdscale.data.pictures import store
from kdscale.data.prepare import Preparation, Prepared, prepare
from kdscale.data.raw import RawSample
from kdscale.data.samples import BadImage, decode
from kdscale.data.shards import read_tar

LOCAL = fsspec.filesystem("file")
NUM_ROWS = 8
URLS = [f"https://example.org/{'ab'[i % 2]}/photo%20{i}.jpg?w={i}" for i in range(NUM_ROWS)]
CAPTIONS = [f"a picture, number {i}" for i in range(NUM_ROWS)]


def run(*command: object) -> Result:
    return CliRunner().invoke(app, ["data", *map(str, command)])


def write_images(folder: Path, names: list[str]) -> Path:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number))
    return folder


def write_source(folder: Path, kind: str, names: list[str], captions: list[str]) -> Path:
    """Writes a captions file of any format."""
    rows = [
        {"id": i, "Image": n, "caption": c}
        for i, (n, c) in enumerate(zip(names, captions, strict=True))
    ]
    if kind == "llava":
        talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt"}]
        values = [
            {"id": str(i), "image": n, "conversations": [talk[0], talk[1] | {"value": c}]}
            for i, (n, c) in enumerate(zip(names, captions, strict=True))
        ]
        text, suffix = json.dumps(values), "json"
    elif kind == "cc12m":
        text = "".join(f"{n}\t{c}\n" for n, c in zip(names, captions, strict=True))
        suffix = "tsv"
    elif kind in ("json", "jsonl"):
        text = json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows))
        suffix = kind
    else:
        out = io.StringIO()
        writer = csv.DictWriter(out, list(rows[0]), delimiter="\t" if kind == "tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
        text, suffix = out.getvalue(), kind
    path = folder / f"{kind}.{suffix}"
    path.write_text(text)
    return path


def prepared(source: Path, images: Path, out: Path, **options: Any) -> Prepared:
    fields: dict[str, Any] = {"max_bad_fraction": 1.0, "workers": 1, "samples_per_shard": 3}
    return prepare(
        Preparation(source=str(source), images=str(images), out=str(out), **(fields | options))
    )


def samples_of(out: Path) -> list[RawSample]:
    return [sample for path in sorted(out.glob("*.tar")) for sample in read_tar(str(path), LOCAL)]


def rejected(out: Path) -> list[tuple[int, str, str]]:
    lines = map(json.loads, (out / "rejected.jsonl").read_text().splitlines())
    return [(line["row"], line["key"], line["cause"]) for line in lines]


@pytest.mark.parametrize("kind", ["tsv", "csv", "json", "jsonl", "llava", "cc12m"])
def test_every_format_gives_the_same_shards(tmp_path: Path, kind: str):
    stored = [f"{i // 4}/{i:09d}.jpg" for i in range(NUM_ROWS)]
    images = write_images(tmp_path / "images", stored)
    (images / stored[2]).unlink()
    (images / stored[5]).write_bytes(jpeg(5)[:-60])
    captions = [*CAPTIONS[:6], " ", CAPTIONS[7]]
    source = write_source(tmp_path, kind, URLS if kind == "cc12m" else stored, captions)
    outcome = prepared(source, images, tmp_path / "out")
    assert outcome.format == (kind if kind in ("llava", "cc12m") else "table")
    assert (outcome.num_rows, outcome.num_samples, outcome.num_shards) == (8, 5, 2)
    causes = {2: "missing_image", 5: "truncated_jpeg", 6: "empty_caption"}
    assert rejected(tmp_path / "out") == [(i, f"{i:09d}", cause) for i, cause in causes.items()]
    assert outcome.causes == dict.fromkeys(causes.values(), 1)
    samples = samples_of(tmp_path / "out")
    assert [sample.key for sample in samples] == [f"{i:09d}" for i in (0, 1, 3, 4, 7)]
    assert [sample.caption for sample in samples] == [CAPTIONS[i] for i in (0, 1, 3, 4, 7)]
    assert samples[2].jpg == jpeg(3)
    meta = samples[2].meta
    assert (meta["source"], meta["width"], meta["height"]) == (stored[3], 48, 40)
    if kind == "llava":
        assert meta["id"] == "3"
        assert meta["conversations"][1]["value"] == CAPTIONS[3]
    if kind == "cc12m":
        assert meta["url"] == URLS[3]


def test_links_are_found_by_hash_number_or_last_part(tmp_path: Path):
    md5, sha = hashlib.md5(URLS[0].encode()), hashlib.sha256(URLS[1].encode())
    names = [f"{md5.hexdigest()}.jpg", f"x/{sha.hexdigest()}", "photo 2.jpg", "photo%203.jpg"]
    names += ["other.jpg", "a/photo 5.jpg", "b/photo 5.jpg"]
    images = write_images(tmp_path / "images", names)
    source = write_source(tmp_path, "cc12m", [*URLS[:6], "http://x.org/photo 2.jpg"], CAPTIONS[:7])
    prepared(source, images, tmp_path / "out")
    assert [sample.key for sample in samples_of(tmp_path / "out")] == [
        f"{i:09d}" for i in (0, 1, 3)
    ]
    causes = {2: "ambiguous_image", 4: "missing_image", 5: "ambiguous_image", 6: "ambiguous_image"}
    assert {row: cause for row, _, cause in rejected(tmp_path / "out")} == causes


def test_a_numbered_image_of_another_link_is_rejected(tmp_path: Path):
    images = write_images(tmp_path / "images", [f"{i:05d}.jpg" for i in range(3)])
    (images / "00000.json").write_text(json.dumps({"url": URLS[0]}))
    (images / "00001.json").write_text(json.dumps({"url": URLS[0]}))
    source = write_source(tmp_path, "cc12m", URLS[:3], CAPTIONS[:3])
    source.write_text("url\tcaption\n" + source.read_text())
    prepared(source, images, tmp_path / "out")
    assert rejected(tmp_path / "out") == [(1, "000000001", "another_url")]


def test_bad_lines_are_named_and_harm_no_other(tmp_path: Path):
    images = write_images(tmp_path / "images", ["a.jpg", "b.jpg"])
    write_images(tmp_path, ["secret.jpg"])
    lines = [
        b"file\tid\ttitle\tlabel",
        b'a.jpg\t0\t"two ""quoted"" words"\t7',
        b'b.jpg\t1\t"open quote\tx',
        b"a.jpg\t2\tcaf\xe9\t0",
        b"a.jpg\t3",
        b"../secret.jpg\t4\tclimbs out\t0",
        b"\t5\tno image\t0",
        b"",
    ]
    (tmp_path / "t.tsv").write_bytes(b"\n".join(lines))
    prepared(tmp_path / "t.tsv", images, tmp_path / "out")
    samples = samples_of(tmp_path / "out")
    assert [s.caption for s in samples] == ['two "quoted" words', '"open quote']
    assert [s.meta["label"] for s in samples] == [7, "x"]
    causes = ["non_utf8_caption", "bad_row", "outside_folder", "missing_image"]
    assert [cause for _, _, cause in rejected(tmp_path / "out")] == causes


def test_sources_that_cannot_be_read_at_all(tmp_path: Path):
    for name, text, match in (
        ("a.csv", "name,text\nx,y\n", "needs one of image"),
        ("a.json", '{"image": "x"}', "not a list"),
        ("b.json", "[", "not JSON"),
        ("a.xml", "<a/>", "--format"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises((DataError, ConfigError), match=match):
            list(Captions(str(tmp_path / name)))
    with pytest.raises(DataError, match="no captions file"):
        Captions(str(tmp_path / "nothing.csv"))


def test_only_what_must_change_is_encoded_anew():
    small, large = jpeg(1, 60, 80), jpeg(2, 300, 450)
    kept = store(small, 60, 90)
    assert kept.jpg == small
    assert kept.kept
    shrunk = store(large, 200, 90)
    assert (shrunk.size, shrunk.original_size, shrunk.kept) == ((300, 200), (450, 300), False)
    reference = Image.open(io.BytesIO(large)).resize((300, 200), Image.Resampling.LANCZOS)
    assert np.abs(decode(shrunk.jpg).astype(float) - np.asarray(reference)).mean() < 8
    png = io.BytesIO()
    Image.open(io.BytesIO(small)).save(png, "PNG")
    assert store(png.getvalue(), 60, 90).jpg[:2] == b"\xff\xd8"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_stored_upright(orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    out = io.BytesIO()
    Image.open(io.BytesIO(jpeg(3))).save(out, "JPEG", quality=95, exif=exif)
    reference = ImageOps.exif_transpose(Image.open(out))
    stored = store(out.getvalue(), 256, 95)
    assert stored.size == reference.size
    assert np.abs(decode(stored.jpg).astype(float) - np.asarray(reference)).mean() < 8


@pytest.fixture
def table(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A healthy table of eight images: (source, images, where to)."""
    names = [f"{i}.jpg" for i in range(NUM_ROWS)]
    images = write_images(tmp_path / "images", names)
    return write_source(tmp_path, "csv", names, CAPTIONS), images, tmp_path / "out"


def test_a_rerun_writes_only_what_is_missing(table: tuple[Path, Path, Path]):
    out = table[2]
    assert prepared(*table).num_reused == 0
    before = {path: path.read_bytes() for path in out.iterdir()}
    times = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    (out / "00001.tar").unlink()
    (out / ".00001.tar.999.tmp").write_bytes(b"half a shard")
    (out / "00002_stats.json").unlink()
    outcome = prepared(*table)
    assert (outcome.num_reused, outcome.num_shards, outcome.num_samples) == (1, 3, 8)
    after = {path: path.read_bytes() for path in out.iterdir()}
    record = out / "prepare.json"
    assert {**after, record: b""} == {**before, record: b""}
    assert (out / "00000.tar").stat().st_mtime_ns == times[out / "00000.tar"]
    assert json.loads(record.read_text())["outcome"]["num_samples"] == 8


def test_a_rerun_notices_other_images(table: tuple[Path, Path, Path]):
    _, images, out = table
    prepared(*table)
    (images / "4.jpg").write_bytes(jpeg(99))
    assert prepared(*table).num_reused == 2
    assert samples_of(out)[4].jpg == jpeg(99)
    for number in range(5):
        (images / f"{number}.jpg").unlink()
    assert prepared(*table).num_shards == 1
    assert sorted(path.name for path in out.iterdir()) == [
        "00000.tar", "00000_stats.json", "prepare.json", "rejected.jsonl",
    ]  # fmt: skip


def test_a_folder_of_something_else_is_refused(table: tuple[Path, Path, Path], write_tar: Any):
    source, images, out = table
    prepared(*table)
    with pytest.raises(FolderTaken, match="px 256, now 32"):
        prepared(*table, px=32)
    source.write_text(source.read_text().replace("number 1", "number one"))
    with pytest.raises(FolderTaken, match="sha256"):
        prepared(*table)
    write_tar(out.parent / "taken" / "mine.tar", pair("a", 1))
    with pytest.raises(FolderTaken, match=r"mine\.tar"):
        prepared(source, images, out.parent / "taken")


def test_too_many_bad_rows_end_it_after_the_list(table: tuple[Path, Path, Path]):
    source, images, out = table
    (images / "1.jpg").unlink()
    with pytest.raises(TooManyBadSamples, match=r"1 of 8 rows.*missing_image 1.*rejected\.jsonl"):
        prepared(*table, max_bad_fraction=0.1)
    assert rejected(out) == [(1, "000000001", "missing_image")]
    (images / "7.jpg").write_bytes(b"no image")
    with pytest.raises(TooManyBadSamples, match="2 of 8 rows"):
        prepared(*table, max_bad_fraction=0.2)
    assert [row for row, _, _ in rejected(out)] == [1, 7]
    assert prepared(*table, max_bad_fraction=0.25).num_reused == 3
    for path in images.iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(EmptyShard):
        prepared(source, images, out.parent / "none")


def test_processes_write_the_same_bytes(table: tuple[Path, Path, Path]):
    source, images, out = table
    prepared(*table)
    prepared(source, images, out.parent / "two", workers=2)
    for path in out.glob("0*"):
        assert path.read_bytes() == (out.parent / "two" / path.name).read_bytes()


def test_prepare_command_names_what_is_wrong(table: tuple[Path, Path, Path]):
    source, images, out = table
    command = ["prepare", source, "--images", images, "--out", out]
    (images / "3.jpg").unlink()
    found = run(*command)
    assert found.exit_code == 2
    assert "TooManyBadSamples" in found.stderr
    assert rejected(out) == [(3, "000000003", "missing_image")]
    assert run(*command, "--format", "nonsense").exit_code == 2
    assert run(*command, "--quality", 0).exit_code == 2
    assert run("prepare", source, "--images", out / "none", "--out", out).exit_code == 2
    with tarfile.open(out / "x.tar", "w"):
        pass
    shown = run(*command, "--max-bad-fraction", 0.2, "--workers", 1)
    assert "missing_image" in shown.output


def test_an_image_too_long_for_a_jpeg_is_refused_by_name() -> None:
    file = io.BytesIO()
    Image.new("RGB", (70_000, 3)).save(file, "PNG")
    with pytest.raises(BadImage, match="too_long: 70000 x 3 pixels"):
        store(file.getvalue(), 256, 90)
