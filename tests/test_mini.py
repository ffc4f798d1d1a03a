"""The miniature world: what it draws, says, writes and how it is tokenised."""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import json
import re
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from PIL import Image

from kdscale.core import catalog_mini
from kdscale.core.config import DataSpec, MiniWorld, TowerSpec
from kdscale.core.storage import Storage
from kdscale.core.types import ConfigError
from kdscale.data.shards import read_good
from kdscale.mini import vocabulary
from kdscale.mini.build import encode_sample, write_world
from kdscale.mini.captions import caption, captions
from kdscale.mini.paint import render
from kdscale.mini.scenes import (
    CLASSNAMES,
    COLOURS,
    HELD_OUT,
    KINDS,
    SHAPES,
    TEMPLATES,
    draw,
)
from kdscale.stages.inputs import find_source

TRAIN = MiniWorld(seed=5, num_samples=60, samples_per_shard=25, image_px=64)
EVAL = TRAIN.replace(split="eval")


@pytest.fixture(scope="module")
def scenes():
    """Three thousand training scenes."""
    return [draw(TRAIN, index) for index in range(3000)]


def fingerprint(world: MiniWorld, indices: range) -> str:
    """A hash of images and captions."""
    total = hashlib.sha256()
    for index in indices:
        total.update(render(draw(world, index), 48).tobytes())
        total.update(repr(caption(world, index)).encode())
    return total.hexdigest()


def test_same_scene_in_another_process():
    script = (
        "from kdscale.core.config import MiniWorld\n"
        "from kdscale.mini.paint import render\nfrom kdscale.mini.scenes import draw\n"
        "w = MiniWorld(seed=5)\n"
        "print([int(render(draw(w, i), 48).sum()) for i in range(8)])\n"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    ours = [int(render(draw(MiniWorld(seed=5), i), 48).sum()) for i in range(8)]
    assert json.loads(found.stdout) == ours, found.stderr


def test_scenes_depend_on_seed_split_and_index_only():
    same = TRAIN.replace(num_samples=9, image_px=32, samples_per_shard=3, caption_noise=0.5)
    assert [draw(same, i) for i in range(20)] == [draw(TRAIN, i) for i in range(20)]
    prints = {
        fingerprint(world, indices)
        for world in (TRAIN, EVAL, TRAIN.replace(seed=6))
        for indices in (range(5), range(5, 10))
    }
    assert len(prints) == 6


def test_render_has_the_asked_size():
    for px in (24, 48, 96):
        image = render(draw(TRAIN, 3), px)
        assert image.shape == (px, px, 3)
        assert image.dtype == np.uint8


@pytest.mark.parametrize("colour", COLOURS)
def test_things_have_the_colour_that_is_said(colour):
    ours = [i for i, (name, _) in enumerate(HELD_OUT) if name == colour]
    for label in ours:
        scene = draw(EVAL, label)
        thing = scene.things[0]
        image = render(scene, 64).astype(int)
        nearest = np.abs(image - np.array(thing.rgb)).max(axis=-1) < 40
        assert nearest.mean() > 0.03, (scene, nearest.mean())


def test_held_out_compositions_never_occur_in_training(scenes):
    held_out = set(HELD_OUT)
    drawn = Counter(
        (thing["colour"], thing["shape"]) for scene in scenes for thing in scene.facts()["objects"]
    )
    assert not held_out & set(drawn)
    assert {colour for colour, _ in drawn} == set(COLOURS)
    assert {shape for _, shape in drawn} == set(SHAPES)
    assert len(drawn) == len(SHAPES) * len(COLOURS) - len(held_out)
    said = " ".join(text for scene in scenes for text in captions(scene))
    assert not any(re.search(rf"\b{name}", said) for name in CLASSNAMES)


def test_each_colour_and_shape_has_partners():
    partners = Counter(colour for colour, _ in HELD_OUT), Counter(s for _, s in HELD_OUT)
    assert set(partners[0].values()) == set(partners[1].values()) == {4}
    assert len(CLASSNAMES) == len(set(CLASSNAMES)) == 40


def test_kinds_occur_at_their_rates(scenes):
    counts = Counter(scene.kind for scene in scenes)
    assert sum(KINDS.values()) == pytest.approx(1.0)
    for kind, share in KINDS.items():
        assert counts[kind] / len(scenes) == pytest.approx(share, abs=0.03)


def test_eval_shows_one_held_out_object():
    for index in range(200):
        scene = draw(EVAL, index)
        assert scene.kind == "single"
        assert scene.label is not None
        assert CLASSNAMES[scene.label] == scene.things[0].name
    labels = Counter(draw(EVAL, index).label for index in range(200))
    assert set(labels.values()) == {5}


def test_captions_agree_with_facts(scenes):
    for scene in scenes[:600]:
        facts = scene.facts()
        plain = captions(scene)[0]
        for thing in facts["objects"][:2]:
            assert f"{thing['colour']} {thing['shape']}" in plain
        if facts["kind"] == "pair":
            first, second = facts["objects"]
            boxes = [thing["box"] for thing in (first, second)]
            middles = [(box[0] + box[2], box[1] + box[3]) for box in boxes]
            (x0, y0), (x1, y1) = middles
            holds = {"left of": x0 < x1, "right of": x0 > x1, "above": y0 < y1, "below": y0 > y1}
            assert holds[facts["relation"]], plain
        if facts["kind"] == "sign":
            assert plain.endswith(facts["text"])
        if facts["kind"] == "chart":
            tallest = max(facts["bars"], key=lambda bar: bar["height"])
            assert plain.endswith(tallest["colour"])


def test_things_of_a_scene_do_not_overlap_and_lie_inside(scenes):
    for scene in scenes[:600]:
        for thing in scene.things:
            assert thing.radius - 0.02 < min(thing.x, thing.y, 1 - thing.x, 1 - thing.y)
        for one, other in itertools.combinations(scene.things, 2):
            distance = max(abs(one.x - other.x), abs(one.y - other.y))
            assert distance > 0.9 * (one.radius + other.radius), scene


def test_caption_noise_has_its_rate():
    for rate in (0.0, 0.3):
        world = TRAIN.replace(caption_noise=rate)
        found = [caption(world, index) for index in range(2000)]
        wrong = sum(other is not None for _, other in found)
        assert wrong / 2000 == pytest.approx(rate, abs=0.03)
        for index, (text, other) in enumerate(found[:300]):
            described = index if other is None else other
            assert text in captions(draw(world, described))


def test_shards_have_the_real_layout(tmp_path: Path):
    seen: list[tuple[int, int]] = []
    paths = write_world(
        EVAL, str(tmp_path), processes=1, progress=lambda done, total: seen.append((done, total))
    )
    assert [Path(path).name for path in paths] == ["00000.tar", "00001.tar", "00002.tar"]
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [Path(p).name for p in paths]
    with tarfile.open(paths[1]) as tar:
        members = tar.getmembers()
        assert [m.name for m in members[:4]] == [
            "000010000.jpg", "000010000.txt", "000010000.json", "000010001.jpg",
        ]  # fmt: skip
        assert {m.mtime for m in members} == {0}
        assert len(members) == 25 * 3
        contents = {m.name: tar.extractfile(m).read() for m in members[:3]}  # pyright: ignore
    record = json.loads(contents["000010000.json"])
    assert record["label"] == 25
    assert record["class"] == CLASSNAMES[25]
    assert record["key"] == "000010000"
    assert record["caption"] == contents["000010000.txt"].decode()
    assert record["facts"]["objects"][0]["shape"] == HELD_OUT[25][1]
    image = Image.open(io.BytesIO(contents["000010000.jpg"]))
    assert (image.mode, min(image.size)) == ("RGB", 64)


def test_shards_are_the_same_bytes_again(tmp_path: Path):
    once = write_world(TRAIN, str(tmp_path / "a"), processes=1)
    again = write_world(TRAIN, str(tmp_path / "b"), processes=2)
    assert [Path(p).read_bytes() for p in once] == [Path(p).read_bytes() for p in again]
    write_world(TRAIN, str(tmp_path / "a"), processes=1)
    assert Path(once[0]).read_bytes() == Path(again[0]).read_bytes()


def test_noisy_records_say_whose_caption_they_carry():
    world = TRAIN.replace(caption_noise=1.0)
    record = json.loads(encode_sample(world, 4, "x")["json"])
    assert record["caption_of"] != 4
    assert record["caption"] in captions(draw(world, record["caption_of"]))
    assert "label" not in record


def test_too_large_shards_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="four digits"):
        write_world(TRAIN.replace(samples_per_shard=10_001), str(tmp_path))


def test_a_script_without_a_guard_is_told_to_have_one(tmp_path: Path) -> None:
    script = tmp_path / "study.py"
    script.write_text(
        "from kdscale.core.config import MiniWorld\n"
        "from kdscale.mini.build import write_world\n"
        f"write_world(MiniWorld(num_samples=4, samples_per_shard=2), {str(tmp_path)!r})\n"
    )
    found = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert found.returncode
    assert "if __name__ == '__main__':" in found.stderr.splitlines()[-1]


def mini_tokenizers() -> tuple[SimpleTokenizer, HFTokenizer]:
    """Both tokenizers, as towers load them."""
    length = 24
    bpe = SimpleTokenizer(
        bpe_path=str(vocabulary.DIRECTORY / "bpe_mini.txt.gz"), context_length=length
    )
    directory = str(vocabulary.DIRECTORY / "sp_mini")
    pieces = HFTokenizer(
        directory, context_length=length, clean="canonicalize", local_files_only=True
    )
    return bpe, pieces


def test_shipped_tokenizers_are_what_the_maker_makes():
    shipped = gzip.decompress((vocabulary.DIRECTORY / "bpe_mini.txt.gz").read_bytes())
    assert shipped.decode() == vocabulary.bpe_text()
    for name, text in vocabulary.sentencepiece_files().items():
        assert (vocabulary.DIRECTORY / "sp_mini" / name).read_text(encoding="utf-8") == text


def test_tokenizers_round_trip(scenes):
    bpe, pieces = mini_tokenizers()
    assert bpe.vocab_size <= catalog_mini.BPE_VOCAB  # rows of the towers' token tables
    assert len(pieces.tokenizer) <= catalog_mini.SP_VOCAB
    texts = [text for scene in scenes[:700] for text in captions(scene)][:2000]
    texts += [template.format(name) for name in CLASSNAMES for template in TEMPLATES]
    assert len(texts) > 2000
    bpe_BT, pieces_BT = bpe(texts), pieces(texts)
    ends = (bpe_BT == bpe.eot_token_id).float()
    assert bool((ends.sum(dim=1) == 1).all())
    assert int(ends.argmax(dim=1).max()) < 23
    assert bool((bpe_BT[:, 0] == bpe.sot_token_id).all())
    assert bpe.eot_token_id == bpe.vocab_size - 1, "CLIP pools at the largest id"
    unknown, end = pieces.tokenizer.unk_token_id, pieces.tokenizer.eos_token_id
    assert not bool((pieces_BT == unknown).any())
    assert bool((pieces_BT[:, -2:] == end).all())
    for text, bpe_T, pieces_T in zip(texts[:300], bpe_BT, pieces_BT, strict=False):
        inner = [int(i) for i in bpe_T if int(i) not in (0, bpe.sot_token_id, bpe.eot_token_id)]
        assert re.sub(r" (?=[.,])", "", bpe.decode(inner).strip()) == text.lower()
        plain = re.sub(r"[.,]", "", text).lower()
        assert pieces.tokenizer.decode(pieces_T, skip_special_tokens=True) == plain


def test_new_words_are_spelt():
    bpe, pieces = mini_tokenizers()
    assert bpe.decode(bpe.encode("zebra café 7")).strip() == "zebra café 7"
    assert not bool((pieces(["zebra quilt 7"]) == pieces.tokenizer.unk_token_id).any())


def test_no_two_teachers_are_alike():
    kinds = set()
    for recipe in catalog_mini.MINI_TEACHERS.values():
        assert isinstance(recipe.student, TowerSpec)
        tower = recipe.student
        loss = "sigmoid" if isinstance(recipe.loss, dict) else recipe.loss
        kinds.add((tower.width, tower.patch_px, tower.image_px, tower.tokenizer, loss))
    assert len(kinds) == len(catalog_mini.MINI_TEACHERS) == 5


def test_the_family_is_ordered_like_the_real_one():
    towers = {role: recipe.student for role, recipe in catalog_mini.MINI_TEACHERS.items()}
    dims = {role: tower.embed_dim for role, tower in towers.items() if isinstance(tower, TowerSpec)}
    student = catalog_mini.MINI_STUDENTS["vit_t16"].embed_dim
    assert dims["clip_b16"] == dims["dfn_b16"] == student
    assert student < dims["clip_l14"] == dims["dfn_l14"] < dims["siglip_so400m"]
    assert {spec.embed_dim for spec in catalog_mini.MINI_STUDENTS.values()} == {student}


def test_data_roles_are_different_worlds():
    data = [recipe.data for recipe in catalog_mini.MINI_TEACHERS.values()]
    worlds = {role: spec.mini for role, spec in catalog_mini.MINI_DATA.items() if spec.mini}
    larger = {role for role in worlds if role.startswith("cc12m_")}
    seeds = {world.seed for world in worlds.values()}
    assert len(seeds) == len(worlds.keys() - larger) == 5
    for role in larger:  # CC12M and more
        assert worlds[role].seed == worlds["cc12m"].seed
        assert worlds[role].num_samples > worlds["cc12m"].num_samples
    trained_on = {spec.mini.seed for spec in data if not isinstance(spec, str) and spec.mini}
    assert not seeds & trained_on
    benchmark = catalog_mini.MINI_ZERO_SHOT["imagenet"].data.mini
    assert benchmark is not None
    assert benchmark.split == "eval"
    assert benchmark.num_samples >= 2000


@pytest.mark.parametrize("world", [TRAIN, EVAL], ids=["train", "eval"])
def test_a_drawn_world_moves_with_its_storage(tmp_path: Path, world: MiniWorld):
    spec = DataSpec(name="small", mini=world.replace(num_samples=8, image_px=32))
    drawn = find_source(spec, Storage(str(tmp_path / "here"))).manifest()
    (tmp_path / "here").rename(tmp_path / "there")
    there = Storage(str(tmp_path / "there"))
    moved = find_source(spec, there).manifest(lambda text: pytest.fail(text))
    assert moved.hash == drawn.hash
    entry = moved.shards[0]
    assert entry.path.startswith(f"{tmp_path}/there/")
    assert len(list(read_good(entry.path, there.fs, entry))) == 8


def test_catalogue_is_light():
    script = "import sys, kdscale.core.catalog_mini; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.stdout.strip() == "False", found.stderr
