"""Towers: true sizes, weights in and out, what each tower reads and what is read from it."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from kdscale.core.catalog import DATA, LANGUAGE_MODELS, STUDENTS, TEACHERS, ZERO_SHOT
from kdscale.core.config import Distill, TowerSpec
from kdscale.core.types import ConfigError, UnknownName, WeightsError
from kdscale.models import preprocess, towers, weights
from kdscale.models.towers import (
    count_parameters,
    eval_crop,
    freeze,
    image_features,
    normalise,
    read_spec,
    save_clip,
    tokenizer,
)
from kdscale.sweep.cost import Work, flops

build_clip: Any = towers.build_clip
TEXT = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
ALL = STUDENTS | TEACHERS
# Distinct architectures: the DFN teachers are CLIP's.
BUILDS = [name for name in ALL if not name.startswith("dfn")]


def small_spec(vision: dict[str, Any] | None = None, **fields: Any) -> TowerSpec:
    """A pair that builds in milliseconds."""
    vision = vision or {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    config = {"embed_dim": 24, "vision_cfg": {"image_size": 32, **vision}, "text_cfg": TEXT}
    defaults = {
        "name": "small",
        "clip_config": config | fields.pop("config", {}),
        "image_px": 32,
        "context_length": 8,
        "embed_dim": 24,
        "width": 32,
        "patch_px": 8,
    }
    return TowerSpec(**(defaults | fields))


def timm_spec(model_name: str, width: int, px: int = 64, **vision: Any) -> TowerSpec:
    """A small pair around a timm trunk."""
    vision = {"timm_model_name": model_name, "timm_pool": "", "timm_proj": "linear", **vision}
    return small_spec(vision | {"image_size": px}, image_px=px, width=width, patch_px=None)


@cache
def meta_build(name: str) -> Any:
    """Builds a tower of the catalogue without memory, frozen, for counting."""
    with torch.device("meta"):
        return build_clip(ALL[name].replace(weights="random")).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    """A smooth picture with some texture, landscape, odd sizes."""
    y, x = np.mgrid[0:171, 0:299] / 37.0
    noise = np.random.default_rng(0).normal(0, 20, (171, 299, 3))
    waves = np.stack([np.sin(x), np.cos(y + x), np.sin(x * y)], axis=-1) * 90 + 128
    return np.clip(waves + noise, 0, 255).astype(np.uint8)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes any attempt to open a connection fail."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("tried to reach the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("name", BUILDS)
def test_true_size(name: str) -> None:
    """Parameter counts and feature shapes are the catalogue's."""
    spec = ALL[name]
    model = meta_build(name)
    counts = count_parameters(model)
    assert counts["image"] / 1e6 == pytest.approx(spec.facts.image_mparams, abs=0.1)
    assert counts["text"] / 1e6 == pytest.approx(spec.facts.text_mparams, abs=0.1)
    assert counts["scale"] == (2 if spec.tokenizer == "siglip" else 1)
    pixels = torch.zeros(1, 3, spec.image_px, spec.image_px, device="meta")
    shapes = {key: tuple(value.shape) for key, value in image_features(model, pixels).items()}
    assert shapes["embedding"] == (1, spec.embed_dim)
    assert shapes["pooled"] == shapes["patch_mean"] == (1, spec.width)


def check_work(name: str) -> None:
    """Compares counted operations with the catalogue's."""
    spec = ALL[name]
    tokens = torch.zeros(1, spec.context_length, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as image_flops:
        meta_build(name).encode_image(
            torch.zeros(1, 3, spec.image_px, spec.image_px, device="meta")
        )
    with FlopCounterMode(display=False) as text_flops:
        meta_build(name).encode_text(tokens)
    assert image_flops.get_total_flops() / 1e9 == pytest.approx(spec.facts.image_gflop, rel=0.1)
    assert text_flops.get_total_flops() / 1e9 == pytest.approx(spec.facts.text_gflop, rel=0.1)


@pytest.mark.parametrize("name", ["vit_t16", "vit_s16", "mobilevit_s", "swin_t", "convnext_t"])
def test_work_of_students(name: str) -> None:
    check_work(name)


@pytest.mark.parametrize("name", ["vit_t16", "swin_t"])
def test_a_plan_counts_the_work_of_a_training_step(name: str) -> None:
    """Of the others torch counts the weight gradients of depthwise convolutions as dense ones."""
    spec = ALL[name]
    recipe = Distill(student=spec, loss="clip", global_batch_size=2)
    planned = flops(Work(recipe=recipe, num_samples=2, total_steps=1))
    model = copy.deepcopy(meta_build(name)).train().requires_grad_(True)
    pixels = torch.zeros(2, 3, spec.image_px, spec.image_px, device="meta")
    tokens = torch.zeros(2, spec.context_length, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counted:
        (model.encode_image(pixels).sum() + model.encode_text(tokens).sum()).backward()
    assert planned == pytest.approx(counted.get_total_flops(), rel=0.1)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["clip_b16", "clip_l14", "siglip_so400m"])
def test_work_of_teachers(name: str) -> None:
    check_work(name)


def grid_of(name: str) -> tuple[int, ...]:
    """Number and width of the last layer's spatial tokens of a true-size tower."""
    visual = meta_build(name).visual
    if not hasattr(visual, "trunk"):
        return visual.grid_size[0] * visual.grid_size[1], visual.conv1.out_channels
    px = ALL[name].image_px
    hidden = visual.trunk.forward_features(torch.zeros(1, 3, px, px, device="meta"))
    if hidden.ndim == 4:
        hidden = hidden.flatten(1, 2) if name == "swin_t" else hidden.flatten(2).mT
    return tuple(hidden.shape[1:])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit_t16", (196, 192)),
        ("mobilevit_s", (49, 640)),
        ("swin_t", (49, 768)),
        ("convnext_t", (49, 768)),
        ("clip_b16", (196, 768)),
        ("clip_l14", (256, 1024)),
        ("siglip_so400m", (729, 1152)),
    ],
)
def test_patch_grid(name: str, expected: tuple[int, int]) -> None:
    """Tokens and width that the vision-language connector will see."""
    assert grid_of(name) == expected


def test_vit_t16_is_clip_kd_s() -> None:
    visual = meta_build("vit_t16").visual
    block = visual.transformer.resblocks[0]
    assert (block.attn.num_heads, len(visual.transformer.resblocks)) == (3, 12)


def test_catalogue() -> None:
    assert set(TEACHERS) == {"clip_b16", "clip_l14", "siglip_so400m", "dfn_b16", "dfn_l14"}
    for size in ("b16", "l14"):
        clip, dfn = TEACHERS[f"clip_{size}"], TEACHERS[f"dfn_{size}"]
        changed = {"name": "", "weights": "random", "facts": clip.facts}
        assert clip.replace(**changed) == dfn.replace(**changed)
        assert clip.facts.replace(zero_shot_top1=None) == dfn.facts.replace(zero_shot_top1=None)
    assert {"vit_t16", "mobilevit_s", "swin_t", "convnext_t"} <= set(STUDENTS)
    assert set(LANGUAGE_MODELS) == {"qwen2_0_5b", "smollm_360m"}
    assert DATA["cc12m"].num_samples == 10_968_539
    assert all(data.urls is None for data in DATA.values())
    assert ZERO_SHOT["imagenet"].templates == "openai"
    assert all(spec.weights == "random" for spec in STUDENTS.values())


def test_random_weights_depend_on_the_seed_alone() -> None:
    spec = timm_spec("resnet10t", 512)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = build_clip(spec, seed=3).state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    again, other = build_clip(spec, seed=3).state_dict(), build_clip(spec, seed=4).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["visual.head.proj.weight"], other["visual.head.proj.weight"])


def test_scale_and_bias() -> None:
    plain = build_clip(small_spec())
    assert plain.logit_scale.item() == pytest.approx(np.log(1 / 0.07))
    assert plain.logit_bias is None
    assert build_clip(small_spec(), logit_bias=-10.0).logit_bias.item() == -10.0
    siglip = small_spec(config={"init_logit_bias": -10, "custom_text": True})
    assert build_clip(siglip).logit_bias.item() == -10.0


def test_a_frozen_pair_computes_in_bf16_as_fast_as_one_in_training() -> None:
    vision = {"image_size": 32, "patch_size": 2, "width": 512, "layers": 1, "head_width": 64}
    model = build_clip(small_spec(vision, width=512, patch_px=2)).eval()
    pixels = torch.rand(4, 3, 32, 32)

    def seconds() -> float:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            began = time.process_time()
            model.encode_image(pixels)
            return time.process_time() - began

    training = min(seconds() for _ in range(3))
    freeze(model)
    assert min(seconds() for _ in range(3)) < 5 * training


def test_drop_path_is_zero_unless_asked() -> None:
    def rates(model: Any) -> float:
        return max((m.drop_prob for m in model.modules() if hasattr(m, "drop_prob")), default=0.0)

    swin = STUDENTS["swin_t"].clip_config
    assert isinstance(swin, dict)
    bare = {k: v for k, v in swin["vision_cfg"].items() if k != "timm_drop_path"}
    spec = STUDENTS["swin_t"].replace(clip_config=swin | {"vision_cfg": bare})
    with torch.device("meta"):
        assert rates(build_clip(spec)) == 0.0
        assert rates(build_clip(spec, drop_path=0.2)) == pytest.approx(0.2)
    configured = timm_spec("convnext_atto", 320, timm_drop_path=0.3)
    assert rates(build_clip(configured)) == pytest.approx(0.3)
    with pytest.raises(ConfigError, match="no drop path"):
        build_clip(small_spec(), drop_path=0.1)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (small_spec(image_px=64), "image_px is 64, its config says 32"),
        (small_spec(width=16), "width is 16"),
        (small_spec(embed_dim=8), "embed_dim is 8"),
        (small_spec(clip_config={"embed_dim": 24}), "lacks text_cfg, vision_cfg"),
    ],
)
def test_contradictions_are_named(spec: TowerSpec, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_clip(spec)


def test_unknown_architecture_suggests() -> None:
    with pytest.raises(UnknownName, match="ViT-B-16"):
        build_clip(small_spec(clip_config="ViT-B-61"))


# Feature taps.


def test_vit_taps() -> None:
    model = build_clip(small_spec()).eval()
    pixels = torch.randn(2, 3, 32, 32)
    seen: list[torch.Tensor] = []
    model.visual.ln_post.register_forward_hook(lambda *call: seen.append(call[2]))
    with torch.no_grad():
        out = image_features(model, pixels)
        torch.testing.assert_close(out["embedding"], model.encode_image(pixels))
    assert seen[0].shape == (2, 17, 32)
    torch.testing.assert_close(out["pooled"], seen[0][:, 0])
    torch.testing.assert_close(out["patch_mean"], seen[0][:, 1:].mean(1))
    torch.testing.assert_close(out["embedding"], out["pooled"] @ model.visual.proj)


@pytest.mark.parametrize(
    ("model_name", "width"),
    [("resnet10t", 512), ("mobilevit_xxs", 320), ("convnext_atto", 320), ("efficientnet_b0", 1280)],
)
def test_grid_taps(model_name: str, width: int) -> None:
    model = build_clip(timm_spec(model_name, width)).eval()
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        out = image_features(model, pixels)
        grid = model.visual.trunk.forward_features(pixels)
        torch.testing.assert_close(out["embedding"], model.encode_image(pixels))
        assert grid.shape[:2] == (2, width)
        torch.testing.assert_close(out["patch_mean"], grid.mean((2, 3)))
        pooled = out["patch_mean"]
        if "convnext" in model_name:
            pooled = model.visual.trunk.head.norm(pooled[:, :, None, None])[:, :, 0, 0]
        torch.testing.assert_close(out["pooled"], pooled, atol=1e-5, rtol=1e-4)


def test_channels_last_taps_at_another_size() -> None:
    """Swin keeps its grid in (H, W, C) and is laid out for the spec's image size."""
    model = build_clip(timm_spec("swin_tiny_patch4_window7_224", 768)).eval()
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        out = image_features(model, pixels)
        grid = model.visual.trunk.forward_features(pixels)
        torch.testing.assert_close(out["embedding"], model.encode_image(pixels))
    assert grid.shape == (2, 2, 2, 768)
    torch.testing.assert_close(out["patch_mean"], grid.mean((1, 2)))
    torch.testing.assert_close(out["pooled"], out["patch_mean"])


def test_class_token_is_left_out_of_timm_vits() -> None:
    model = build_clip(timm_spec("vit_tiny_patch16_224", 192)).eval()
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        out = image_features(model, pixels)
        hidden = model.visual.trunk.forward_features(pixels)
    assert hidden.shape == (2, 17, 192)
    torch.testing.assert_close(out["patch_mean"], hidden[:, 1:].mean(1))


# Weights.


@pytest.mark.parametrize(
    "spec",
    [
        small_spec(),
        small_spec(config={"init_logit_bias": -10, "custom_text": True}),
        timm_spec("resnet10t", 512),
    ],
    ids=["vit", "siglip-like", "timm"],
)
def test_save_and_load(spec: TowerSpec, tmp_path: Path, offline: None) -> None:
    """One directory serves this library and plain open_clip."""
    model = build_clip(spec, seed=1).eval()
    save_clip(model, spec, tmp_path)
    ours = build_clip(spec.replace(weights=str(tmp_path)), seed=2).eval()
    theirs: Any = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    pixels, tokens = torch.randn(2, 3, spec.image_px, spec.image_px), torch.arange(16).view(2, 8)
    with torch.no_grad():
        for other in (ours, theirs):
            assert torch.equal(model.encode_image(pixels), other.encode_image(pixels))
            assert torch.equal(model.encode_text(tokens), other.encode_text(tokens))
            assert torch.equal(model.logit_scale, other.logit_scale)
    assert theirs.visual.preprocess_cfg["size"] == (spec.image_px, spec.image_px)
    again = read_spec(tmp_path)
    assert again.weights == str(tmp_path)
    assert again.replace(clip_config=spec.clip_config, weights="random") == spec
    build_clip(again)


def test_an_added_bias_is_saved(tmp_path: Path) -> None:
    spec = small_spec()
    save_clip(build_clip(spec, logit_bias=-10.0), spec, tmp_path)
    assert build_clip(read_spec(tmp_path)).logit_bias.item() == -10.0


def test_absent_weights_say_what_is_there(tmp_path: Path) -> None:
    spec = small_spec(weights=str(tmp_path / "nowhere"))
    with pytest.raises(WeightsError, match="does not exist"):
        build_clip(spec)
    (tmp_path / "note.txt").write_text("hello")
    with pytest.raises(WeightsError, match=r"no open_clip_config.json; found \['note.txt'\]"):
        build_clip(spec.replace(weights=str(tmp_path)))
    save_clip(build_clip(small_spec()), small_spec(), tmp_path)
    (tmp_path / weights.WEIGHTS_FILE).unlink()
    with pytest.raises(WeightsError, match=r"no open_clip_model\.safetensors"):
        build_clip(spec.replace(weights=str(tmp_path)))
    with pytest.raises(WeightsError, match=r"has no kdscale_tower.json"):
        read_spec(tmp_path / "nowhere")


def test_unfit_weights_say_what_differs(tmp_path: Path) -> None:
    spec = small_spec()
    save_clip(build_clip(spec), spec, tmp_path)
    loaded = spec.replace(weights=str(tmp_path))
    heads = small_spec({"layers": 2, "width": 32, "head_width": 8, "patch_size": 8})
    with pytest.raises(WeightsError, match="head_width is 16 there and 8 here"):
        build_clip(heads.replace(weights=str(tmp_path)))
    path = tmp_path / weights.WEIGHTS_FILE
    state = load_file(path)
    changed = state | {"visual.proj": torch.zeros(3, 3), "surplus": torch.zeros(1)}
    del changed["ln_final.bias"]
    save_file(changed, path)
    with pytest.raises(WeightsError) as caught:
        build_clip(loaded)
    text = str(caught.value)
    assert "visual.proj is (3, 3), expected (32, 24)" in text
    assert "missing (ln_final.bias)" in text
    assert "unexpected (surplus)" in text
    path.write_bytes(b"not safetensors")
    with pytest.raises(WeightsError, match="cannot be read"):
        build_clip(loaded)


@pytest.mark.parametrize(
    ("architecture", "tag"),
    [("ViT-B-16", "openai"), ("ViT-B-16", "dfn2b"), ("ViT-B-16-quickgelu", "laion2b_s34b_b88k")],
)
def test_activation_must_match_the_tag(architecture: str, tag: str) -> None:
    spec = TEACHERS["clip_b16"].replace(clip_config=architecture, weights=tag)
    with pytest.raises(WeightsError, match="QuickGELU"):
        build_clip(spec)


def test_activation_must_match_the_hub_and_the_directory(tmp_path: Path) -> None:
    hub = TEACHERS["dfn_b16"].replace(
        clip_config="ViT-B-16", weights="hf-hub:apple/DFN2B-CLIP-ViT-B-16"
    )
    with pytest.raises(WeightsError, match="trained with QuickGELU"):
        build_clip(hub)
    quick = small_spec(config={"quick_gelu": True})
    save_clip(build_clip(quick), quick, tmp_path)
    with pytest.raises(WeightsError, match="trained with QuickGELU"):
        build_clip(small_spec(weights=str(tmp_path)))
    activation = (
        build_clip(quick.replace(weights=str(tmp_path))).visual.transformer.resblocks[0].mlp
    )
    assert type(activation.gelu).__name__ == "QuickGELU"


@pytest.mark.parametrize("name", ["clip_b16", "clip_l14"])
def test_teachers_are_quick_gelu(name: str) -> None:
    block = meta_build(name).visual.transformer.resblocks[0]
    assert type(block.mlp.gelu).__name__ == "QuickGELU"


def test_hub_ids_go_through_the_same_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = small_spec()
    model = build_clip(spec, seed=7)
    save_clip(model, spec, tmp_path)

    def fake(repository: str, filename: str = weights.WEIGHTS_FILE) -> str:
        assert repository == "lab/small"
        return str(tmp_path / filename)

    monkeypatch.setattr(weights, "download_pretrained_from_hf", fake)
    loaded = build_clip(spec.replace(weights="hf-hub:lab/small"))
    assert torch.equal(loaded.visual.proj, model.visual.proj)


def test_unreachable_and_unknown_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise OSError("offline")

    monkeypatch.setattr(weights, "download_pretrained", refuse)
    with pytest.raises(WeightsError, match="set `weights` to a local directory"):
        build_clip(TEACHERS["dfn_l14"])
    with pytest.raises(WeightsError, match="no tag of ViT-B-16-quickgelu"):
        build_clip(TEACHERS["clip_b16"].replace(weights="dfn3b"))
    with pytest.raises(WeightsError, match="needs an architecture's name"):
        build_clip(small_spec(weights="openai"))


# Inputs.


@pytest.mark.parametrize("resize", ["shortest", "squash"])
@pytest.mark.parametrize("px", [64, 224, 384])
def test_eval_transform_is_open_clip_s(photo: np.ndarray, resize: str, px: int) -> None:
    """At evaluation, pixels are those of the towers' own transform."""
    spec = small_spec(image_px=px, resize=resize)
    reference: Any = image_transform_v2(
        PreprocessCfg(size=px, mean=spec.mean, std=spec.std, resize_mode=resize), is_train=False
    )
    for rgb in (photo, photo.transpose(1, 0, 2).copy(), photo[:150, :150]):
        crop = eval_crop(rgb, spec)
        assert crop.shape == (px, px, 3)
        assert crop.dtype == np.uint8
        pixels = normalise(torch.from_numpy(crop.copy())[None], spec)
        torch.testing.assert_close(pixels[0], reference(Image.fromarray(rgb)))


def test_normalise_reads_both_layouts() -> None:
    spec = small_spec()
    batch = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    expected = (batch.permute(0, 3, 1, 2) / 255.0 - torch.tensor(spec.mean).view(3, 1, 1)) / (
        torch.tensor(spec.std).view(3, 1, 1)
    )
    torch.testing.assert_close(normalise(batch, spec), expected)
    torch.testing.assert_close(normalise(batch.permute(0, 3, 1, 2), spec), expected)
    with pytest.raises(ConfigError, match="reads 32x32"):
        normalise(batch[:, :16], spec)
    with pytest.raises(ConfigError, match="uint8"):
        normalise(batch.float(), spec)


def test_clip_bpe_is_open_clip_s() -> None:
    texts = ["A photo of a dog.", "", "word " * 100]
    found = tokenizer(STUDENTS["vit_t16"])
    expected = open_clip.get_tokenizer("ViT-B-16")(texts)
    assert torch.equal(found(texts), expected)
    copy = pickle.loads(pickle.dumps(found))
    assert torch.equal(copy(texts), expected)
    assert len(pickle.dumps(found)) < 1000


@pytest.fixture(scope="module")
def sentencepiece_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A unigram tokenizer in the hub's layout."""
    from tokenizers import Tokenizer
    from tokenizers.models import Unigram
    from tokenizers.pre_tokenizers import Metaspace
    from tokenizers.processors import TemplateProcessing

    letters = [(letter, -4.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    words = [("▁a", -2.0), ("▁dog", -2.0), ("▁", -3.0)]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *words, *letters]
    built = Tokenizer(Unigram(vocabulary, unk_id=2))
    built.pre_tokenizer = Metaspace()
    built.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    directory = tmp_path_factory.mktemp("sp")
    built.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "</s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def test_local_sentencepiece(sentencepiece_directory: Path, tmp_path: Path, offline: None) -> None:
    """Directories serve as tokenizers, without the network, from many threads, and are saved."""
    spec = small_spec(tokenizer=str(sentencepiece_directory))
    found = tokenizer(spec)
    ids = found(["A DOG!", "a dog", "a"])
    assert ids.shape == (3, 8)
    assert ids.dtype == torch.int64
    assert ids[0].tolist() == ids[1].tolist() == [3, 4, 1, 1, 1, 1, 1, 1]
    batches = [["a dog"] * (1 + i % 3) + ["a " * i] for i in range(64)]
    expected = [found(batch) for batch in batches]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(pickle.loads(pickle.dumps(found)), batches))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    save_clip(build_clip(spec), spec, tmp_path)
    theirs = open_clip.get_tokenizer(f"local-dir:{tmp_path}")
    assert torch.equal(theirs(["A DOG!", "a dog", "a"]), ids)
    siglip = spec.replace(tokenizer="siglip", weights=str(tmp_path))
    assert torch.equal(tokenizer(siglip)(["a dog"]), ids[1:2])


def test_siglip_stand_in(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, offline: None
) -> None:
    monkeypatch.setattr(preprocess, "_in_cache", lambda _: False)
    preprocess._warn_folded.cache_clear()
    spec = TEACHERS["siglip_so400m"].replace(weights="random")
    with caplog.at_level(logging.WARNING):
        ids = tokenizer(spec)(["A photo of a dog.", "a PHOTO of a dog"])
        tokenizer(spec)
    assert ids.shape == (2, 64)
    assert ids.max() < 32_000
    assert torch.equal(ids[0], ids[1])
    assert [
        record.message for record in caplog.records if "folded" in record.message
    ].__len__() == 1


def test_unusable_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown tokenizer 'clip_bep'"):
        tokenizer(small_spec(tokenizer="clip_bep"))
    with pytest.raises(WeightsError, match=r"found nothing, expected one of tokenizer\.json"):
        tokenizer(small_spec(tokenizer="siglip", weights=str(tmp_path)))


@pytest.mark.parametrize("name", ["mini_bpe", "mini_sp"])
def test_miniature_tokenizers(name: str, offline: None) -> None:
    path = preprocess.MINI_BPE if name == "mini_bpe" else preprocess.MINI_SP
    if not path.exists():
        pytest.skip(f"{path} is not there yet")
    spec = small_spec(tokenizer=name, context_length=16)
    ids = tokenizer(spec)(["a red circle above a blue square", ""])
    assert ids.shape == (2, 16)
    assert not torch.equal(ids[0], ids[1])


@pytest.mark.parity
@pytest.mark.parametrize("name", BUILDS)
def test_true_size_forward(name: str) -> None:
    """Every distinct architecture, with real memory and real numbers."""
    spec = ALL[name].replace(weights="random")
    model = build_clip(spec).eval()
    pixels = torch.randn(1, 3, spec.image_px, spec.image_px)
    with torch.no_grad():
        out = image_features(model, pixels)
        text = model.encode_text(tokenizer(spec)(["a photo of a dog"]))
        torch.testing.assert_close(
            out["embedding"], model.encode_image(pixels), rtol=1e-3, atol=1e-4
        )
    assert out["embedding"].shape == text.shape == (1, spec.embed_dim)
    assert all(bool(value.isfinite().all()) for value in (*out.values(), text))
