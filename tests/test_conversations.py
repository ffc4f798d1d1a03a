"""Conversations from LLaVA's json to manifests: prepared whole, judged, measured."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
from conftest import jpeg, pair
from PIL import Image
from talks import about_image, len_of, manifest_of, parts_of, talk, write_talks
from typer.testing import CliRunner, Result

from kdscale.cli import app
from kdscale.core.config import DataSpec
from kdscale.core.storage import Storage
from kdscale.core.types import BadManifest, DataError, FolderTaken, ShardChanged
from kdscale.data.mix import MixedSource, mix
from kdscale.data.prepare import Preparation, prepare
from kdscale.data.raw import RawSample
from kdscale.data.samples import decode
from kdscale.data.shards import Manifest, build_manifest, read_good, read_tar
from kdscale.stages.inputs import find_source, manifest_place, read_manifest, verified

LOCAL = fsspec.filesystem("file")


def run(*command: object) -> Result:
    return CliRunner().invoke(app, ["data", *map(str, command)])


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory, write_tar: Any) -> Manifest:
    return manifest_of(write_talks(tmp_path_factory.mktemp("talks"), write_tar))


# -- verification ----------------------------------------------------------------------------


def test_lengths_are_words_and_negative_without_an_image(manifest: Manifest):
    assert manifest.counts == (23, 16, 30)
    assert manifest.causes() == {}
    for entry in manifest.shards:
        samples = list(read_good(entry.path, LOCAL, entry))
        words = [" ".join(t["value"] for t in s.meta["conversations"]).split() for s in samples]
        signs = [1 if s.jpg else -1 for s in samples]
        assert entry.lengths == tuple(s * len(w) for s, w in zip(signs, words, strict=True))
    assert manifest.shards[0].lengths
    assert [n < 0 for n in manifest.shards[0].lengths[:5]] == [False, False, False, True, False]
    assert Manifest.from_json(manifest.to_json()) == manifest
    edited = manifest.to_json().replace('"lengths": [', '"lengths": [1, ', 1)
    with pytest.raises(DataError):
        Manifest.from_json(edited.replace('"num_samples": 23', '"num_samples": 24'))


def test_what_is_wrong_with_a_conversation(tmp_path: Path, write_tar: Any):
    def record(turns: Any, **more: Any) -> bytes:
        return json.dumps({"conversations": turns} | more).encode()

    cases = {
        "missing_conversation": record(None),
        "bad_json": b"[1",
        "bad_conversation": record(talk("hello", "you", "there")),
        "empty_conversation": record(talk("hello", " ")),
        "non_utf8_conversation": record(talk("hello", "\udc80")),
        "missing_image": record(talk("<image>\nwhat?", "nothing")),
        "missing image by name": record(talk("what?", "nothing"), image="a.jpg"),
    }
    members = [(f"{i}.json", data) for i, data in enumerate(cases.values())]
    members += [("broken.jpg", jpeg(1)[:-60]), ("broken.json", record(about_image(1)))]
    members += [("lonely.jpg", jpeg(1)), *parts_of("good", 1), *parts_of("text", 2, image=False)]
    found = manifest_of(write_tar(tmp_path / "a.tar", members))
    assert found.num_samples == 2
    causes = [cause for *_, cause in found.shards[0].quarantine]
    expected = [cause if "by" not in cause else "missing_image" for cause in cases]
    assert causes == [*expected, "truncated_jpeg", "missing_conversation"]


def test_the_same_shards_serve_as_captions_and_as_conversations(tmp_path: Path, write_tar: Any):
    talks = [m for i in range(6) for m in parts_of(f"k{i}", i)]
    members = [m for k in range(6) for m in (*talks[2 * k : 2 * k + 2], (f"k{k}.txt", b"thing"))]
    write_tar(tmp_path / "a.tar", members)
    spec, storage = DataSpec(name="t", urls=f"{tmp_path}/*.tar"), Storage(str(tmp_path / "runs"))
    captions = find_source(spec, storage)
    talking = find_source(spec, storage, content="conversations")
    assert captions.manifest().lengths is None
    assert talking.manifest().lengths == ((*[len_of(i) for i in range(6)],),)
    assert (captions.content, talking.content) == ("captions", "conversations")
    assert captions.hash != talking.hash == talking.manifest().hash
    names = [manifest_place(spec.urls or "", content=c)[1] for c in ("captions", "conversations")]
    assert sorted(names) == storage.names("manifests")
    url = storage.url("manifests", names[1])
    assert read_manifest(url, content="conversations").hash == talking.hash
    with pytest.raises(BadManifest, match="vouches for conversations, captions are needed"):
        verified(spec.replace(urls=url), storage)
    url = storage.url("manifests", names[0])
    with pytest.raises(BadManifest, match=r"`kdscale data verify --conversations`"):
        read_manifest(url, content="conversations")


def test_manifests_of_before_are_read_as_they_were(tmp_path: Path, write_tar: Any):
    path = write_tar(tmp_path / "a.tar", [p for i in range(3) for p in pair(f"k{i}", i)])
    for content, labelled in (("captions", "false"), ("labels", "true")):
        found = build_manifest(DataSpec(name="t", urls=str(path)), content=content)
        old = found.to_json().replace(f'"content": "{content}"', f'"labelled": {labelled}')
        assert "content" not in old
        assert "lengths" not in old
        assert Manifest.from_json(old) == found
        assert Manifest.from_json(old).hash == found.hash


def test_a_shard_whose_images_come_or_go_has_changed(manifest: Manifest):
    entry = manifest.shards[1]
    assert entry.lengths is not None
    for place, match in ((2, "an image it had not"), (3, "no whole image")):
        lengths = list(entry.lengths)
        lengths[place] *= -1
        with pytest.raises(ShardChanged, match=match):
            list(read_good(entry.path, LOCAL, replace(entry, lengths=tuple(lengths))))
    with pytest.raises(DataError, match="16 usable samples and 1 lengths"):
        replace(entry, lengths=(1,))


def test_mixes_keep_the_lengths_of_what_they_take(manifest: Manifest, shards: str):
    half = mix([MixedSource("t", manifest, 1.5)])
    assert half.content == "conversations"
    assert half.lengths is not None
    assert tuple(map(len, half.lengths)) == half.counts
    for entry, lengths in zip(half.shards[3:], half.lengths[3:], strict=True):
        places = entry.used_places()
        assert entry.lengths is not None
        assert places is not None
        assert lengths == tuple(entry.lengths[place] for place in places)
    assert Manifest.from_json(half.to_json()) == half
    captions = build_manifest(DataSpec(name="c", urls=shards), num_threads=1)
    with pytest.raises(DataError, match="mix data of one content"):
        mix([MixedSource("t", manifest, 1), MixedSource("c", captions, 1)])


# -- preparation -----------------------------------------------------------------------------


def gif(number: int) -> bytes:
    out = io.BytesIO()
    Image.open(io.BytesIO(jpeg(number))).convert("P").save(out, "GIF")
    return out.getvalue()


@pytest.fixture
def source(tmp_path: Path) -> tuple[Path, Path]:
    """A json in LLaVA's format and its images: (json, folder)."""
    images = tmp_path / "images"
    (images / "ocr").mkdir(parents=True)
    records: list[dict[str, Any]] = []
    for number in range(12):
        name = f"ocr/{number}.jpg" if number < 3 else f"{number}.jpg"
        (images / name).write_bytes(jpeg(number))
        records.append({"id": number, "image": name, "conversations": about_image(number)})
    (images / "ocr/1.jpg").rename(images / "ocr/1.jpeg")
    (images / "ocr/2.jpg").unlink()
    (images / "ocr/2.gif").write_bytes(gif(2))
    (images / "5.jpg").unlink()
    records.append({"id": "t", "model": "", "conversations": talk("hi", "hello", "why?", "so")})
    answer_first = [{"from": "gpt", "value": "welcome"}, *talk("hi", "there")]
    records.append({"id": 13, "conversations": answer_first})
    records.append({"id": 14, "conversations": talk("<image>\nwhat?", "a thing")})
    records.append({"id": 15, "image": "3.jpg", "conversations": talk("one question")})
    path = tmp_path / "talks.json"
    path.write_text(json.dumps(records))
    return path, images


def prepared(source: tuple[Path, Path], out: Path, **options: Any) -> list[RawSample]:
    fields: dict[str, Any] = {"format": "conversations", "samples_per_shard": 5, "workers": 1}
    where = {"source": str(source[0]), "images": str(source[1]), "out": str(out)}
    prepare(Preparation(**(where | fields | {"max_bad_fraction": 1.0} | options)))
    return [s for path in sorted(out.glob("*.tar")) for s in read_tar(str(path), LOCAL)]


def test_conversations_are_prepared_whole(source: tuple[Path, Path], tmp_path: Path):
    samples = prepared(source, tmp_path / "out")
    keys = [int(sample.key) for sample in samples]
    assert sorted(keys) == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13]
    assert keys != sorted(keys)
    known = {int(sample.key): sample for sample in samples}
    assert known[4].meta["conversations"] == about_image(4)
    assert (known[4].meta["id"], known[4].meta["n_words"]) == ("4", len_of(4))
    assert known[4].jpg == jpeg(4)
    assert (known[4].txt, known[3].txt) == (None, b"a very very very thing")
    assert known[1].meta["source"] == "ocr/1.jpeg"
    assert known[1].jpg == jpeg(1)
    assert decode(known[2].jpg or b"").shape == (40, 48, 3)
    for number in (12, 13):
        assert (known[number].jpg, known[number].txt) == (None, None)
        assert known[number].meta["modality"] == "text"
    assert known[13].meta["n_words"] == 3
    lines = map(json.loads, (tmp_path / "out/rejected.jsonl").read_text().splitlines())
    causes = {5: "missing_image", 14: "missing_image", 15: "bad_conversation"}
    assert {line["row"]: line["cause"] for line in lines} == causes
    found = manifest_of(tmp_path / "out")
    assert (found.num_samples, found.causes()) == (13, {})


def test_their_order_is_drawn_once(source: tuple[Path, Path], tmp_path: Path):
    first = prepared(source, tmp_path / "one")
    assert prepared(source, tmp_path / "one") == first == prepared(source, tmp_path / "two")
    other = prepared(source, tmp_path / "three", seed=1)
    assert [s.key for s in other] != [s.key for s in first]
    assert sorted(s.key for s in other) == sorted(s.key for s in first)
    with pytest.raises(FolderTaken, match="seed 1, now 0"):
        prepared(source, tmp_path / "three")


def test_from_json_to_manifest_on_the_command_line(source: tuple[Path, Path], tmp_path: Path):
    out, storage = tmp_path / "out", tmp_path / "runs"
    command = ["prepare", source[0], "--images", source[1], "--out", out, "--workers", 1]
    found = run(*command, "--conversations", "--max-bad-fraction", 0.5)
    assert found.exit_code == 0, found.output
    assert f"next: kdscale data verify '{out}/*.tar' --conversations" in found.output
    assert json.loads((out / "prepare.json").read_text())["options"]["px"] == 512
    found = run("verify", f"{out}/*.tar", "--conversations", "--storage", storage, "--json")
    document = json.loads(found.stdout)
    assert (document["samples"], document["quarantined"]) == (13, {})
    assert document["manifest"].endswith("-conversations.json")
    half = ["mix", tmp_path / "mix.json", "--source", f"{out}=0.5", "--storage", storage]
    assert run(*half, "--conversations").exit_code == 0
    assert read_manifest(str(tmp_path / "mix.json"), content="conversations").num_samples == 6
    assert run("verify", out, "--conversations", "--labelled").exit_code == 2
    assert run(*command, "--conversations", "--format", "cc12m").exit_code == 2
