"""Image sets, the CKA stage and `kdscale cka`."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import jpeg
from PIL import Image
from typer.testing import CliRunner, Result
from worlds import vit

from kdscale.analysis.cka import linear_cka
from kdscale.cli import app
from kdscale.core.config import DataSpec, MiniWorld
from kdscale.core.eval_config import Cka
from kdscale.core.journal import read_steps
from kdscale.core.storage import Storage
from kdscale.core.types import DataError, NoShards
from kdscale.data.image_sets import ImageSet, NoImages, TooFewImages, read_images, survey
from kdscale.data.samples import decode
from kdscale.models.taps import load_tower_of
from kdscale.models.towers import build_clip, save_clip
from kdscale.stages.cka import CkaRun, compare, compare_named, run_cka
from kdscale.stages.images import find_images
from kdscale.stages.jobs import CkaJob
from kdscale.stages.loop import World

NUM = 20
Writer = Callable[[Path, list[tuple[str, bytes]]], Path]


@pytest.fixture(scope="module")
def pictures() -> list[bytes]:
    return [jpeg(seed, 40 + seed % 3, 48) for seed in range(NUM)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, pictures: list[bytes]) -> Path:
    """Twenty pictures, two of them twice, two files that give none, and a caption."""
    root = tmp_path_factory.mktemp("pictures")
    (root / "sub").mkdir()
    for number, data in enumerate(pictures):
        root.joinpath("sub" if number % 2 else "", f"{number:03d}.jpg").write_bytes(data)
    for number in (3, 5):
        (root / f"again{number}.jpg").write_bytes(pictures[number])
    (root / "cut.jpg").write_bytes(pictures[0][:-200])
    (root / "none.jpg").write_bytes(b"")
    (root / "notes.txt").write_text("no picture")
    return root


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two tiny towers, of 2 and of 2 blocks, as directories."""
    root = tmp_path_factory.mktemp("models")
    for name, spec, seed in (("narrow", vit(), 1), ("wide", vit(24, 48), 2)):
        spec = spec.replace(name=name)
        save_clip(build_clip(spec, seed=seed), spec, root / name)
    return root / "narrow", root / "wide"


# Image sets.


def shards_of(pictures: list[bytes], root: Path, write_tar: Writer) -> list[str]:
    """The same pictures as a tar and in Parquet, in another order, one of them repeated."""
    parts = [(f"{n:03d}.jpg", pictures[n]) for n in reversed(range(8))]
    write_tar(root / "tars" / "0.tar", parts)
    write_tar(root / "tars" / "1.tar", [*((f"{n}.png", pictures[n]) for n in range(8, NUM))])
    cells = [{"bytes": data, "path": f"{n}.jpg"} for n, data in enumerate(pictures)]
    table = {
        "question": ["what?"] * NUM,
        "image": [cells[0], *cells[:13], *[None] * 6],
        "image_2": [*[None] * 13, *cells[13:]],
        "options": [[cells[1]]] + [[]] * (NUM - 1),
        "mask": [b"no picture"] * NUM,
    }
    (root / "parquet").mkdir()
    pq.write_table(pa.table(table), root / "parquet" / "0.parquet")
    return [str(root / "tars"), str(root / "parquet" / "*.parquet")]


def test_a_set_is_its_contents(pictures: list[bytes], tmp_path: Path, write_tar: Writer) -> None:
    """Wherever and in whatever order they lie."""
    plain = tmp_path / "plain"
    plain.mkdir()
    for number, data in enumerate(pictures):
        (plain / f"{number}.jpg").write_bytes(data)
    sets = [survey(place) for place in (str(plain), *shards_of(pictures, tmp_path, write_tar))]
    assert {images.num_images for images in sets} == {NUM}
    assert [images.num_duplicates for images in sets] == [0, 0, 2]
    assert len({images.hash for images in sets}) == 1
    for n in (None, 6):
        drawn = [
            {
                data
                for shard, wanted in zip(images.shards, images.chosen(n), strict=True)
                for _, data in read_images(shard, wanted)
            }
            for images in sets
        ]
        assert drawn[0] == drawn[1] == drawn[2]
        assert len(drawn[0]) == (n or NUM)
    assert ImageSet.from_json(sets[0].to_json()) == sets[0]


def test_faults_and_changes_are_named(folder: Path, tmp_path: Path) -> None:
    images = survey(str(folder))
    assert (images.num_images, images.num_duplicates) == (NUM + 1, 2)  # the cut one has bytes
    assert images.faults == (("empty_file", 1),)
    (tmp_path / "a.jpg").write_bytes(b"one")
    alone = survey(str(tmp_path))
    (tmp_path / "a.jpg").write_bytes(b"two")
    with pytest.raises(DataError, match="changed while"):
        list(read_images(alone.shards[0], [0]))
    for place, kind, message in (
        (tmp_path / "nowhere", NoShards, "found nothing"),
        (tmp_path / "empty", NoShards, "no images, tars or Parquet"),
        (tmp_path / "text", NoImages, "no column of encoded images; it has caption"),
    ):
        (tmp_path / "empty").mkdir(exist_ok=True)
        (tmp_path / "text").mkdir(exist_ok=True)
        pq.write_table(pa.table({"caption": ["x"]}), tmp_path / "text" / "0.parquet")
        with pytest.raises(kind, match=message):
            survey(str(place))


# The stage.


def recipe(models: tuple[Path, Path], where: Path, **fields: Any) -> Cka:
    from kdscale.models.named import resolve

    a, b = (resolve(str(model)) for model in models)
    return Cka(a=a, b=b, images=DataSpec(name="pictures", urls=str(where)), **fields)


def job(given: Cka, storage: Path) -> CkaJob:
    images = find_images(given.images, Storage(str(storage)))
    return CkaJob("c" * 16, str(storage), given, images, {"kind": "cka"})


def test_the_stage_equals_a_computation_by_hand(
    models: tuple[Path, Path], pictures: list[bytes], tmp_path: Path, write_tar: Writer
) -> None:
    shards_of(pictures, tmp_path, write_tar)
    given = recipe(models, tmp_path / "tars", layers="all")
    done = job(given, tmp_path / "store")
    run_cka(done, World())
    assert done.stage.is_done()
    assert done.stage.storage.names(*done.stage.parts) == [
        "DONE",
        "journal",
        "output",
        "stage.json",
    ]
    found = json.loads(done.stage.storage.read(*done.stage.parts, "output", "cka.json"))
    features = []
    for spec in (given.a, given.b):
        tower = load_tower_of(spec)  # pyright: ignore[reportArgumentType]
        pixels = torch.from_numpy(np.stack([tower.render(decode(data)) for data in pictures]))
        with torch.no_grad():
            features.append(tower.vectors(pixels, "patch_mean", "all"))
    expected = linear_cka(features[0]["final"], features[1]["block 1"])
    assert found["layers"]["biased"][2][0] == pytest.approx(expected.biased, rel=1e-5)
    assert found["layers"]["debiased"][2][0] == pytest.approx(expected.debiased, rel=1e-4)
    assert (found["n"], found["p"], found["q"]) == (NUM, 32, 48)
    (line,) = read_steps(done.stage)
    assert (line["cka_biased"], line["images"]) == (found["biased"], NUM)
    png = done.stage.storage.read(*done.stage.parts, "output", "cka.png")
    assert Image.open(io.BytesIO(png)).size[0] > 300
    again = find_images(given.images, Storage(str(tmp_path / "store")))  # from the kept survey
    assert compare(given, again, Storage(str(tmp_path))).debiased == found["debiased"]


def test_models_may_be_named(models: tuple[Path, Path], folder: Path, tmp_path: Path) -> None:
    a, b = map(str, models)
    images = DataSpec(name="folder", urls=str(folder))
    found = compare_named(Cka(a=a, b=b, images=images), Storage(str(tmp_path)))
    assert found.result.n == 20
    named = recipe(models, folder)
    assert compare(named, survey(str(folder)), Storage(str(tmp_path))).debiased == found.debiased
    nowhere = Cka(a=a, b=b, images=DataSpec(name="elsewhere"))
    with pytest.raises(NoShards, match=r"'elsewhere'.*urls"):
        compare_named(nowhere, Storage(str(tmp_path)))


def test_workers_and_interruptions_change_no_bit(
    models: tuple[Path, Path], pictures: list[bytes], tmp_path: Path, write_tar: Writer
) -> None:
    """Each of two workers does its shards; a third attempt finds one of them done."""

    class Alone(World):
        """A worker whose others are not waited for."""

        def wait(self) -> None: ...

    shards_of(pictures, tmp_path, write_tar)
    given = recipe(models, tmp_path / "tars", n=15)
    whole = job(given, tmp_path / "one")
    run_cka(whole, World())
    parted = replace(whole, storage_root=str(tmp_path / "two"))
    run_cka(parted, Alone(rank=1, size=2))
    assert not parted.stage.is_done()
    attempt = CkaRun(parted, Alone(rank=0, size=1), lambda _: None)
    assert len(parted.stage.storage.names(*parted.stage.parts, "vectors")) == 1
    attempt.train()
    one, two = (
        run.stage.storage.read(*run.stage.parts, "output", "cka.json") for run in (whole, parted)
    )
    assert one == two
    assert json.loads(one)["n"] == 15


def test_a_drawn_world(tmp_path: Path, models: tuple[Path, Path]) -> None:
    world = MiniWorld(split="eval", num_samples=12, samples_per_shard=6, image_px=32)
    spec = DataSpec(name="mini", mini=world)
    images = find_images(spec, Storage(str(tmp_path)))
    assert (len(images.shards), images.num_images) == (2, 12)


# The command.


def run(*command: object) -> Result:
    return CliRunner().invoke(app, ["cka", *map(str, command)], env={"COLUMNS": "140"})


def test_command(models: tuple[Path, Path], folder: Path, tmp_path: Path) -> None:
    options = (*models, "--images", folder, "--out", tmp_path / "[out]")
    found = run(*options, "--layers", "all", "--tap", "vlm")
    assert found.exit_code == 0, found.output
    for words in ("n = 20; 2 duplicates", "p = 32", "q = 48", "truncated_jpeg 1", "next: "):
        assert words in found.output
    assert "empty_file 1" in found.output
    assert "with 20 neither figure can be trusted" in found.output
    assert "trust the debiased" not in found.output
    assert str(tmp_path / "[out]" / "cka.png") in found.output.replace("\n", "")
    document = json.loads((tmp_path / "[out]" / "cka.json").read_text())
    assert f"{document['debiased']:.4f}" in found.output
    with np.load(tmp_path / "[out]" / "cka.npz") as arrays:
        assert arrays["debiased"].shape == (3, 3)
        assert arrays["debiased"][-1, -1] == document["debiased"]
    again = run(models[0], *options[:1], *options[2:], "--json")
    same = json.loads(again.stdout)
    assert same["debiased"] == pytest.approx(1.0, rel=1e-12)
    assert [Path(file).name for file in same["files"]] == ["cka.json", "cka.npz"]


def test_command_explains_what_is_undefined(
    models: tuple[Path, Path], folder: Path, tmp_path: Path
) -> None:
    spec = vit().replace(name="flat")
    model: Any = build_clip(spec)
    torch.nn.init.zeros_(model.visual.ln_post.weight)
    save_clip(model, spec, tmp_path / "flat")
    found = run(tmp_path / "flat", models[1], "--images", folder, "--out", tmp_path, "--json")
    document = json.loads(found.stdout)
    assert document["biased"] is None
    assert "flat gives all images the same vector in final" in document["notes"][0]
    torch.nn.init.constant_(model.visual.ln_post.weight, float("nan"))
    save_clip(model, spec, tmp_path / "flat")
    found = run(tmp_path / "flat", models[1], "--images", folder, "--out", tmp_path)
    assert found.exit_code == 2
    assert "DataError: flat gives values that are not finite in layer final" in found.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("vit_tiny_patch16_225",), "UnknownName: unknown model 'vit_tiny_patch16_225'. Did you"),
        (("--precision", "fp16", "--images", "NOWHERE"), "fp16 on a CPU"),
        (("--layers", "1"), "ConfigError: --layers takes final, all, or a number from 2 on"),
        (("--images", "FEW"), "TooFewImages: 3 distinct images are left"),
        (("--images", "NOWHERE"), "NoShards: "),
    ],
)
def test_command_names_mistakes(
    options: tuple[str, ...], message: str, models: tuple[Path, Path], folder: Path, tmp_path: Path
) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for number in range(4):
        (few / f"{number}.jpg").write_bytes(jpeg(number % 3))
    given = {"FEW": str(few), "NOWHERE": str(tmp_path / "nowhere")}
    second = options[:1] if not options[0].startswith("-") else models[1:]
    rest = [given.get(option, option) for option in options if option not in second]
    command = [models[0], *second, "--images", folder, "--out", tmp_path / "out", *rest]
    found = run(*command)
    assert found.exit_code == 2, found.output
    assert message in found.output
    assert not (tmp_path / "out").exists()


def test_too_few_that_decode(models: tuple[Path, Path], tmp_path: Path) -> None:
    for number in range(5):
        data = jpeg(number)
        (tmp_path / f"{number}.jpg").write_bytes(data[:-200] if number > 2 else data)
    with pytest.raises(TooFewImages, match=r"3 distinct images .*unreadable: .*truncated_jpeg"):
        compare(recipe(models, tmp_path), survey(str(tmp_path)), Storage(str(tmp_path)))
