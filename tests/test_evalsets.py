"""Evaluation image sets: three formats, labels, captions, and what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import jpeg
from zero_shot_world import karpathy, write_folders, write_parquet

from kdscale.core.types import DataError, NoShards, TooManyBadSamples
from kdscale.data.captionsets import read_captions
from kdscale.data.evalsets import (
    EmptyEvalSet,
    check_readable,
    content_digest,
    find_eval_shards,
    read_items,
)
from kdscale.data.labels import Labels, UnknownLabel
from kdscale.eval.classes import class_set

WNIDS = class_set("imagenet_r").wnids
WriteTar = Callable[[Path, list[tuple[str, bytes]]], Path]


def labels(classes: Any = "imagenet", numbering: Any = "own") -> Labels:
    return Labels(class_set(classes), numbering, "the set")


def contents(urls: Path | str, meaning: Labels | None = None) -> list[tuple[Any, ...]]:
    found = [
        (item.label, item.image, item.captions)
        for shard in find_eval_shards(str(urls), meaning)
        for item in read_items(shard, meaning)
    ]
    return sorted(found, key=repr)


def test_lists_of_classes() -> None:
    every = class_set("imagenet")
    assert (len(every.names), every.num_distinct, every.wnids[0]) == (1000, 998, "n01440764")
    for name in ("imagenet_r", "imagenet_a"):
        some = class_set(name)
        assert len(some.places) == len(set(some.places)) == len(some.names) == 200
        assert list(some.places) == sorted(some.places)
        assert [every.wnids[place] for place in some.places] == list(some.wnids)
        assert [every.names[place] for place in some.places] == list(some.names)


def test_folders_of_v2_are_numbers_not_places_in_a_listing(tmp_path: Path) -> None:
    names = ["0", "1", "10", "100", "2", "999"]
    write_folders(tmp_path, names)
    shards = find_eval_shards(str(tmp_path), labels())
    found = {file.key.split("/")[0]: file.label for shard in shards for file in shard.files}
    assert found == {name: int(name) for name in names}


def test_three_formats_hold_the_same(tmp_path: Path, write_tar: WriteTar) -> None:
    places = [5, 0, 199]
    images = [jpeg(place) for place in range(3)]
    meaning = labels("imagenet_r")
    folders = write_folders(tmp_path / "folders", [WNIDS[place] for place in places])
    (folders / "README.txt").write_text("not a picture")
    tars = tmp_path / "tars"
    parts = [
        part
        for i in range(3)
        for part in ((f"{i}.jpg", images[i]), (f"{i}.cls", b"%d\n" % places[i]))
    ]
    write_tar(tars / "0.tar", parts[:4])
    write_tar(tars / "1.tar", parts[4:])
    wnids = [json.dumps({"wnid": WNIDS[place]}).encode() for place in places]
    other = [part for i in range(3) for part in ((f"{i}.webp", images[i]), (f"{i}.json", wnids[i]))]
    write_tar(tmp_path / "json.tar", other)
    rows = write_parquet(tmp_path / "rows" / "0.parquet", images, label=places)
    named = write_parquet(tmp_path / "named.parquet", images, wnid=[WNIDS[i] for i in places])
    expected = contents(folders, meaning)
    assert [label for label, *_ in expected] == sorted(places, key=str)
    for other_place in (tars, tmp_path / "json.tar", rows.parent, named):
        assert contents(other_place, meaning) == expected
    first, again = (content_digest(find_eval_shards(str(tars), meaning)) for _ in range(2))
    write_tar(tars / "1.tar", [*parts[4:5], ("2.cls", b"7")])
    assert first == again != content_digest(find_eval_shards(str(tars), meaning))


def test_what_a_label_may_be() -> None:
    every, some = labels(), labels("imagenet_r")
    tench = [every.of(value, "here") for value in (0, "0", "n01440764", "Tench")]
    assert tench == [0, 0, 0, 0]
    assert labels("imagenet_r", "imagenet").of(1, "here") == some.of("n01443537", "here") == 0
    cases: list[tuple[Labels, Any, str]] = [
        (every, 1000, "outside 0 to 999$"),
        (some, 987, "outside 0 to 199; numbering='imagenet'"),
        (labels("imagenet_r", "imagenet"), 0, "none of the 200 of ImageNet's 1,000"),
        (some, "n01440764", "none of the 200 classes of imagenet_r"),
        (every, "missile", "neither an integer, a WordNet id"),  # two classes have this name
        (every, None, "neither"),
        (every, True, "outside"),
        (every, -1, "outside"),
    ]
    for meaning, value, words in cases:
        with pytest.raises(UnknownLabel, match=words):
            meaning.of(value, "here")


def test_places_without_a_set(tmp_path: Path, write_tar: WriteTar) -> None:
    meaning = labels()
    with pytest.raises(NoShards):
        find_eval_shards(str(tmp_path / "absent"), meaning)
    with pytest.raises(EmptyEvalSet, match="found nothing"):
        find_eval_shards(str(tmp_path), meaning)
    write_folders(tmp_path / "a", ["val"])
    with pytest.raises(UnknownLabel, match=r"folder .*/val is labelled 'val'"):
        find_eval_shards(str(tmp_path / "a"), meaning)
    write_folders(tmp_path / "b", ["."])
    with pytest.raises(UnknownLabel, match=r"1 pictures lie in .* itself"):
        find_eval_shards(str(tmp_path / "b"), meaning)
    tar = write_tar(tmp_path / "c" / "0.tar", [("0.jpg", jpeg(0)), ("0.cls", b"3")])
    whole = tar.read_bytes()
    tar.write_bytes(whole[: len(jpeg(0)) // 2 + 512])
    with pytest.raises(DataError, match="ends inside '0'; fetch it again"):
        contents(tar, meaning)
    tar.write_bytes(whole)
    rows = write_parquet(tar.with_name("1.parquet"), [jpeg(1)], title=["x"])
    with pytest.raises(DataError, match="point at one of the two"):
        find_eval_shards(str(tar.parent), meaning)
    with pytest.raises(DataError, match=r"no column of labels .* it has image, title"):
        contents(rows, meaning)
    rows.write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        contents(rows, meaning)


def test_captions_of_every_format(tmp_path: Path, write_tar: WriteTar) -> None:
    rows = [("a.jpg", ("one", "two")), ("b.jpg", ("three",))]
    images = [jpeg(0), jpeg(1)]
    folder = tmp_path / "images" / "val2014"
    folder.mkdir(parents=True)
    for (name, _), image in zip(rows, images, strict=True):
        (folder / name).write_bytes(image)
    expected = sorted([(-1, images[0], ("one", "two")), (-1, images[1], ("three",))], key=repr)
    files = {
        "k.json": karpathy(rows),
        "list.json": json.dumps([{"image": n, "caption": list(t)} for n, t in rows]),
        "c.tsv": "image\tcaption\nval2014/a.jpg\tone\nb.jpg\tthree\nval2014/a.jpg\ttwo\n",
        "c.token": "a.jpg#0\tone\na.jpg#1\ttwo\nb.jpg#0\tthree\n",
    }
    for name, text in files.items():
        (tmp_path / "images" / name).write_text(text)
        assert contents(tmp_path / "images" / name) == expected
    with pytest.raises(NoShards, match=r"holds several: c\.token, c\.tsv"):
        find_eval_shards(str(tmp_path / "images"), None)
    parts = [
        part
        for (name, texts), image in zip(rows, images, strict=True)
        for part in ((name, image), (name[0] + ".txt", "\n".join(texts).encode()))
    ]
    assert contents(write_tar(tmp_path / "0.tar", parts)) == expected
    table = write_parquet(
        tmp_path / "0.parquet",
        [*images, jpeg(7)],
        caption=[["one", "two"], ["three"], ["x"]],
        split=["test", "test", "train"],
    )
    assert contents(table) == expected


def test_captions_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    cases = {
        karpathy([("a.jpg", ["x"])], split="train"): "no image of split 'test'; it has train",
        karpathy([("a.jpg", [])]): "1 images have no caption, first 'val2014/a.jpg'",
        '{"annotations": []}': "is no file of captions: KeyError",
        "not json": "is no file of captions",
        '[["a.jpg", "x"]]': "is no file of captions",
    }
    for text, words in cases.items():
        path.write_text(text)
        with pytest.raises(DataError, match=words):
            read_captions(str(path), "test")


def test_share_of_unreadable_images() -> None:
    check_readable({"bomb": 1}, 100, 0.01, "x")
    with pytest.raises(TooManyBadSamples, match=r"2 of 100 images .*1 bomb, 1 missing_image"):
        check_readable({"bomb": 1, "missing_image": 1}, 100, 0.01, "x")
    with pytest.raises(TooManyBadSamples):
        check_readable({"bomb": 3}, 3, 1.0, "x")
    with pytest.raises(EmptyEvalSet):
        check_readable({}, 0, 1.0, "x")
