"""The zero-shot suite: ranks, scores, retrieval, gates, the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import jpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize as unit
from typer.testing import CliRunner
from zero_shot_world import karpathy, tiny, tower, write_folders, write_parquet

from kdscale.cli import app
from kdscale.cli_zero_shot import parse_benchmarks, parse_places
from kdscale.core.catalog import TEACHERS
from kdscale.core.catalog_zero_shot import PUBLISHED, SUITE, published_top1
from kdscale.core.config import DataSpec
from kdscale.core.storage import StageStore, Storage
from kdscale.core.types import ConfigError, DataError, TooManyBadSamples, UnknownName
from kdscale.core.zero_shot_config import ZeroShot
from kdscale.data.samples import decode
from kdscale.eval import ranking
from kdscale.eval.classes import class_set, prompt_templates
from kdscale.eval.ranking import EmbeddingUnusable, cosines, right_ranks
from kdscale.eval.retrieval import chosen, score_retrieval
from kdscale.eval.zeroshot import score_classes
from kdscale.models.named import resolve_clip
from kdscale.models.towers import eval_crop, normalise, save_clip, tokenizer
from kdscale.stages.evaluate import Tower
from kdscale.stages.gate import GateFailed, GateUndecided, gate, teacher_gate
from kdscale.stages.zeroshot import evaluate

SMALL = settings(max_examples=50, deadline=None)
WNIDS = class_set("imagenet_r").wnids
WriteTar = Callable[[Path, list[tuple[str, bytes]]], Path]


def recipe(urls: Path | str, images: str = "imagenet_r", **fields: Any) -> ZeroShot:
    bad = fields.pop("bad", 0.0)
    data = DataSpec(name="x", urls=str(urls), max_bad_fraction=bad)
    defaults = {"tower": tiny(), "images": SUITE[images], "data": data, "templates": "simple"}
    return ZeroShot(**(defaults | fields))


@st.composite
def owned(draw: st.DrawFn) -> tuple[torch.Tensor, ...]:
    """Embeddings of few directions, so that many tie, and who owns what."""
    owners = draw(st.integers(1, 6))
    extra = draw(st.lists(st.integers(0, owners - 1), max_size=8))
    owner_C = torch.tensor(draw(st.permutations([*range(owners), *extra])))
    owner_Q = torch.tensor(draw(st.lists(st.integers(0, owners - 1), min_size=1, max_size=6)))
    rows = st.sampled_from([[1.0, 0, 0], [0, 1, 0], [0.3, 0.7, 0.1], [2, 0, 0], [-1, 1, 5]])
    query = [draw(rows) for _ in owner_Q]
    candidate = [draw(rows) for _ in owner_C]
    return torch.tensor(query), torch.tensor(candidate), owner_Q, owner_C


@SMALL
@given(owned(), st.integers(1, 40))
def test_ranks_equal_a_stable_sort(case: tuple[torch.Tensor, ...], cells: int) -> None:
    query, candidate, owner_Q, owner_C = case
    expected = []
    for row, owner in zip(cosines(query, candidate).tolist(), owner_Q.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda place: (-row[place], place))
        expected.append(next(i for i, place in enumerate(order) if owner_C[place] == owner))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "MAX_CELLS", cells)
        assert right_ranks(query, candidate, owner_Q, owner_C).tolist() == expected


def test_tied_classes_go_to_the_lowest_label() -> None:
    """Two classes of one name tie exactly, whatever a matrix product rounds."""
    random = torch.Generator().manual_seed(0)
    classes = torch.randn(1000, 48, generator=random)
    classes[[744, 837]] = classes[[657, 836]]
    images = classes[[657, 744, 836, 837]] + 0.01 * torch.randn(4, 48, generator=random)
    scores = score_classes(images, torch.tensor([657, 744, 836, 837]), classes)
    assert scores.ranks.tolist() == [0, 1, 0, 1]
    assert scores.predictions.tolist() == [657, 657, 836, 836]
    assert (scores.top1, scores.top5, scores.chance1, scores.chance5) == (50.0, 100.0, 0.1, 0.5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_embeddings_without_a_direction(value: float) -> None:
    images = torch.ones(3, 4)
    images[1] = value
    with pytest.raises(EmbeddingUnusable, match=r"1 of 3 .* first number 1"):
        score_classes(images, torch.zeros(3, dtype=torch.int64), torch.ones(2, 4))
    with pytest.raises(EmbeddingUnusable):
        score_retrieval(torch.ones(3, 4), images, torch.arange(3))


@SMALL
@given(st.integers(0, 2**31), st.sampled_from(["first", "all"]))
def test_retrieval_equals_brute_force(seed: int, which: Any) -> None:
    random = np.random.default_rng(seed)
    captions = [[f"{i} {j}" for j in range(random.integers(1, 4))] for i in range(7)]
    texts, owners = chosen(captions, which)
    assert texts[:1] == ["0 0"]
    assert len(texts) == (7 if which == "first" else sum(map(len, captions)))
    image, text = random.normal(size=(7, 3)), random.normal(size=(len(texts), 3))
    found = score_retrieval(torch.tensor(image), torch.tensor(text), owners)
    near = unit(torch.tensor(image), dim=1).numpy() @ unit(torch.tensor(text), dim=1).numpy().T
    for k in (1, 5):
        hits = [any(owners[j] == i for j in np.argsort(-near[i])[:k]) for i in range(7)]
        assert found.image_to_text.at(k) == pytest.approx(100 * np.mean(hits))
        back = [owners[j] in np.argsort(-near[:, j])[:k] for j in range(len(texts))]
        assert found.text_to_image.at(k) == pytest.approx(100 * np.mean(back))
    assert found.text_to_image.chance[5] == pytest.approx(500 / 7)
    assert found.image_to_text.chance[1] == pytest.approx(100 / 7)


def test_retrieval_needs_captions() -> None:
    with pytest.raises(DataError, match="1 images have no caption, first number 1"):
        chosen([["a"], []], "all")
    with pytest.raises(DataError, match="1 queries have no right candidate, first 2"):
        score_retrieval(torch.ones(3, 2), torch.ones(2, 2), torch.tensor([0, 1]))


def brute_force(pair: Tower, images: list[bytes]) -> list[list[float]]:
    """Cosines of each image with each class, one image and one class at a time."""
    model: Any = pair.model
    tokens = tokenizer(pair.spec)
    (template,) = prompt_templates("simple")
    names = class_set("imagenet_r").names
    near: list[list[float]] = []
    with torch.no_grad():
        texts = [model.encode_text(tokens([template.format(name)]))[0] for name in names]
        for data in images:
            pixels = torch.from_numpy(eval_crop(decode(data), pair.spec).copy())[None]
            image = model.encode_image(normalise(pixels, pair.spec))[0]
            near.append([float(torch.cosine_similarity(image, text, dim=0)) for text in texts])
    return near


def test_a_set_of_200_classes_in_three_formats(tmp_path: Path, write_tar: WriteTar) -> None:
    pair = tower()
    images = [jpeg(place) for place in range(9)]
    near = brute_force(pair, images)
    predictions = [row.index(max(row)) for row in near]
    labels = [p if place % 3 == 0 else 37 * place for place, p in enumerate(predictions)]
    labels = [label % 200 for label in labels]
    ranks = [sum(v > row[own] for v in row) for row, own in zip(near, labels, strict=True)]
    files = list(zip(images, labels, strict=True))
    for data, label in files:
        folder = tmp_path / "folders" / WNIDS[label]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{len(list(folder.iterdir()))}.jpg").write_bytes(data)
    write_tar(
        tmp_path / "0.tar",
        [
            part
            for i, (data, label) in enumerate(files)
            for part in ((f"{i}.jpg", data), (f"{i}.cls", str(label).encode()))
        ],
    )
    write_parquet(tmp_path / "0.parquet", images, label=labels)
    expected = sorted(zip(labels, predictions, ranks, strict=True))
    top1 = 100 * sum(rank == 0 for rank in ranks) / len(ranks)
    assert 0 < top1 < 100
    for place in ("folders", "0.tar", "0.parquet"):
        found = evaluate(recipe(tmp_path / place), pair)
        rows = [(item["label"], item["prediction"], item["rank"]) for item in found.items]
        assert sorted(rows) == expected
        assert found.metrics["top1"].value == pytest.approx(top1)
        assert (found.metrics["top1"].chance, found.metrics["top5"].chance) == (0.5, 2.5)
        assert found.metrics["top1"].interval.low < top1 < found.metrics["top1"].interval.high
        assert (found.n, found.complete) == (9, False)
    limited = evaluate(recipe(tmp_path / "0.tar", limit=2), pair)
    assert [item["key"] for item in limited.items] == ["0", "1"]


def test_unreadable_images_are_counted_and_limited(tmp_path: Path) -> None:
    write_folders(tmp_path, WNIDS[:4])
    broken = next((tmp_path / WNIDS[2]).iterdir())
    broken.write_bytes(jpeg(2)[:300])
    with pytest.raises(TooManyBadSamples, match="ImageNet-R: 1 of 4 images cannot be read"):
        evaluate(recipe(tmp_path), tower())
    found = evaluate(recipe(tmp_path, bad=0.25), tower())
    assert (found.n, found.unreadable, found.complete) == (3, {"truncated_jpeg": 1}, False)


def test_a_broken_tower_is_named(tmp_path: Path) -> None:
    pair = tower()
    model: Any = pair.model
    model.visual.proj.data.fill_(float("nan"))
    write_folders(tmp_path, WNIDS[:1])
    with pytest.raises(EmbeddingUnusable, match=f"ImageNet-R: .*first '{WNIDS[0]}/picture0.JPEG'"):
        evaluate(recipe(tmp_path), pair)


def test_captions_first_or_all(tmp_path: Path) -> None:
    rows = [(f"{i}.jpg", [f"a picture of {i}", f"number {i}"]) for i in range(4)]
    (tmp_path / "c.json").write_text(karpathy([*rows, ("absent.jpg", ["nothing"])]))
    for place, (name, _) in enumerate(rows):
        (tmp_path / name).write_bytes(jpeg(place))
    with pytest.raises(TooManyBadSamples, match="1 missing_image"):
        evaluate(recipe(tmp_path, "coco"), tower())
    both = {
        w: evaluate(recipe(tmp_path, "coco", captions=w, bad=0.5), tower())
        for w in ("first", "all")
    }
    assert [both[w].notes["captions"] for w in both] == [4, 8]
    assert [len(both[w].items) for w in both] == [8, 12]
    assert both["all"].metrics["image_to_text_r1"].chance == pytest.approx(25)
    assert both["all"].metrics["image_to_text_r10"].value == 100.0


def test_gate(tmp_path: Path) -> None:
    spec = TEACHERS["clip_b16"]
    teacher_gate(spec, 68.24, 68.34)
    for top1 in (68.23, 68.45, float("nan")):
        with pytest.raises(GateFailed, match=r"published are 68\.34 \+- 0\.1"):
            teacher_gate(spec, top1, 68.34)
    write_folders(tmp_path, WNIDS[:2])
    three = SUITE["imagenet_r"].replace(num_images=3)
    two = three.replace(num_images=2)
    with pytest.raises(ConfigError, match="no top-1 of tiny"):
        gate(recipe(tmp_path), evaluate(recipe(tmp_path), tower()))
    asked = recipe(tmp_path, published=50.0).replace(images=three)
    with pytest.raises(GateUndecided, match="2 images were scored"):
        gate(asked, evaluate(asked, tower()))
    asked = asked.replace(images=two)
    with pytest.raises(GateFailed, match=r"reaches .* published are 50.00"):
        gate(asked, evaluate(asked, tower()))
    with pytest.raises(ConfigError, match="one of retrieval"):
        recipe(tmp_path, "coco", published=1.0)


def test_published_values_belong_to_the_teachers() -> None:
    assert set(PUBLISHED) == set(TEACHERS)
    for role, values in PUBLISHED.items():
        assert values["imagenet"] == TEACHERS[role].facts.zero_shot_top1
        moved = TEACHERS[role].replace(weights="/models/copy")
        assert published_top1(moved, "imagenet_v2") == values["imagenet_v2"]
        assert published_top1(moved.replace(weights="random"), "imagenet") is None
    assert published_top1(tiny(weights="/x"), "imagenet") is None


def test_names_of_models(tmp_path: Path) -> None:
    assert resolve_clip("dfn_l14") == TEACHERS["dfn_l14"]
    for role, name in (
        ("clip_b16", "ViT-B-16-quickgelu/openai"),
        ("siglip_so400m", "ViT-SO400M-14-SigLIP-384/webli"),
    ):
        facts = {"name": "x", "facts": TEACHERS[role].facts, "width": TEACHERS[role].width}
        found = resolve_clip(name).replace(**facts, patch_px=TEACHERS[role].patch_px)
        assert found == TEACHERS[role].replace(name="x")
        assert published_top1(found, "imagenet") == TEACHERS[role].facts.zero_shot_top1
    with pytest.raises(UnknownName, match=r"'opnai'.* it has .*openai"):
        resolve_clip("ViT-B-16/opnai")
    with pytest.raises(ConfigError, match="bert-base-uncased"):
        resolve_clip("ViT-L-14-CLIPA/datacomp1b")
    with pytest.raises(ConfigError, match="xlm-roberta-base"):
        resolve_clip("xlm-roberta-base-ViT-B-32/laion5b_s13b_b90k")
    with pytest.raises(UnknownName, match="unknown model 'clip_b61'"):
        resolve_clip("clip_b61")
    spec = tiny()
    save_clip(tower(spec).model, spec, tmp_path / "model")
    assert resolve_clip(str(tmp_path / "model")).weights == str(tmp_path / "model")
    (tmp_path / "model" / "kdscale_tower.json").unlink()
    again = resolve_clip(str(tmp_path / "model"))
    assert (again.image_px, again.context_length, again.tokenizer) == (32, 16, "clip_bpe")
    moved = resolve_clip(f"ViT-B-16/{tmp_path / 'model'}")
    assert (moved.clip_config, moved.weights) == ("ViT-B-16", str(tmp_path / "model"))
    storage = Storage(str(tmp_path))
    stage = StageStore(storage, "distill", "ab" * 8)
    with storage.local_directory("stages", "distill", stage.key) as directory:
        save_clip(tower(spec).model, spec, Path(directory, "output", "model"))
    stage.finish({})
    assert resolve_clip("abab", storage).weights == f"stage:distill/{stage.key}"


def test_options_of_the_command(tmp_path: Path) -> None:
    assert parse_benchmarks(" coco,imagenet , coco,") == ["coco", "imagenet"]
    with pytest.raises(UnknownName, match="Did you mean imagenet_v2"):
        parse_benchmarks("imagenet-v2")
    with pytest.raises(ConfigError, match="names none"):
        parse_benchmarks(" ,")
    (tmp_path / "coco").mkdir()
    root = str(tmp_path)
    assert parse_places([root], ["coco"]) == {"coco": f"{root}/coco"}
    assert parse_places(["s3://b/d=1/*.tar"], ["coco"]) == {"coco": "s3://b/d=1/*.tar"}
    both = {"coco": f"{root}/coco", "imagenet": "/data/x"}
    assert parse_places([root, "imagenet=/data/x"], ["coco", "imagenet"]) == both
    with pytest.raises(ConfigError, match="where is imagenet"):
        parse_places([root], ["coco", "imagenet"])
    with pytest.raises(ConfigError, match="'coko' is none of coco"):
        parse_places(["coko=x"], ["coco"])


def test_command(tmp_path: Path) -> None:
    spec = tiny()
    save_clip(tower(spec).model, spec, tmp_path / "model")
    write_folders(tmp_path / "data" / "imagenet_v2", ["0", "10", "2"])
    write_folders(tmp_path / "data" / "flickr30k", ["."])
    (tmp_path / "data" / "flickr30k" / "c.tsv").write_text("picture0.JPEG\ta dog\n")
    command = ["zero-shot", str(tmp_path / "model"), "--data", str(tmp_path / "data")]
    command += ["--templates", "simple"]
    run = CliRunner().invoke
    found = run(app, [*command, "--benchmarks", "imagenet_v2, flickr30k,imagenet_v2", "--json"])
    assert found.exit_code == 0, found.output
    scores = json.loads(found.stdout)["benchmarks"]
    assert list(scores) == ["imagenet_v2", "flickr30k"]
    assert scores["imagenet_v2"]["n"] == 3
    assert scores["imagenet_v2"]["notes"] == {"classes": 1000, "distinct_classes": 998}
    assert scores["flickr30k"]["metrics"]["text_to_image_r1"]["value"] == 100.0
    shown = run(app, [*command, "--benchmarks", "flickr30k"])
    assert "1 images of 1000: not the set; captions 1, protocol all" in shown.output
    gated = run(app, [*command, "--benchmarks", "flickr30k", "--gate"])
    assert gated.exit_code == 2
    assert "say --published X" in " ".join(gated.output.split())
    wrong = run(app, [*command, "--benchmarks", "flickr30k", "--published", "50"])
    assert "--published is the top-1 of one set of classes" in " ".join(wrong.output.split())
    own = [*command, "--benchmarks", "imagenet_v2", "--gate"]
    for more, message in (
        ([], "no top-1 of tiny on imagenet_v2 is on record: say --published X"),
        (["--published", "50"], "holds 3 of the 10,000 images of imagenet_v2"),
        (["--published", "50", "--limit", "2"], "needs all 10,000 images of imagenet_v2"),
        (["--published", "50", "--precision", "fp16"], "fp16 on a CPU"),
    ):
        early = run(app, [*own, *more])
        assert early.exit_code == 2
        assert message in " ".join(early.output.split())
        assert "interval" not in early.output  # nothing was scored
    beyond = run(app, [*command, "--benchmarks", "imagenet_v2", "--limit", "10000"])
    assert "3 images of 10000: not the set" in " ".join(beyond.output.split())
    refused = run(app, [*command, "--benchmarks", "flickr30k", "--precision", "fp15"])
    assert refused.exit_code == 2
