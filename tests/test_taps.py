"""Vectors of image towers against hand computations, and what models' names mean."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import ConvNeXt, SwinTransformer, VisionTransformer
from torch import Tensor
from transformers import CLIPImageProcessor, SiglipVisionConfig, SiglipVisionModel
from worlds import PX, vit

from kdscale.core.catalog import TEACHERS
from kdscale.core.config import TowerSpec
from kdscale.core.eval_config import ImageModelSpec
from kdscale.core.storage import Storage
from kdscale.core.types import ConfigError, KdscaleError, UnknownName, WeightsError
from kdscale.models import towers
from kdscale.models.hf_towers import vision_model
from kdscale.models.named import resolve
from kdscale.models.taps import load_tower_of, tapped, timm_states, transformers_states, vit_states
from kdscale.models.towers import image_features, save_clip

build_clip: Any = towers.build_clip
VIT = {"img_size": PX, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.randn(2, 3, PX, PX, generator=torch.Generator().manual_seed(0))


def outputs(modules: Any, run: Any) -> list[Tensor]:
    """What modules give out while something runs."""
    found: list[Tensor] = []
    hooks = [m.register_forward_hook(lambda *call: found.append(call[2])) for m in modules]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return found


def check(states: Any, pixels: Tensor, expected: dict[str, list[Tensor]]) -> None:
    """Compares every layer of every tap, and the final one by itself."""
    with torch.no_grad():
        for tap, layers in expected.items():
            whole: Any = tapped(states(pixels, None), tap, "all")  # pyright: ignore[reportArgumentType]
            assert list(whole)[-1] == "final"
            torch.testing.assert_close(list(whole.values()), layers, atol=1e-6, rtol=1e-5)
            final = tapped(states(pixels, 2), tap)["final"]  # pyright: ignore[reportArgumentType]
            torch.testing.assert_close(final, layers[-1], atol=1e-6, rtol=1e-5)


def test_clip(pixels: Tensor) -> None:
    """The tower as open_clip's and as transformers', the class token left out."""
    spec = vit()
    model = build_clip(spec).eval()
    visual = model.visual
    blocks = outputs(visual.transformer.resblocks, lambda: visual(pixels))
    with torch.no_grad():
        normed = visual.ln_post(blocks[-1])
    expected = {
        "patch_mean": [*(b[:, 1:].mean(1) for b in blocks), normed[:, 1:].mean(1)],
        "pooled": [*(b[:, 0] for b in blocks), normed[:, 0]],
        "vlm": [*(b[:, 1:].mean(1) for b in blocks), blocks[-2][:, 1:].mean(1)],
    }
    check(partial(vit_states, visual), pixels, expected)
    check(partial(transformers_states, vision_model(model, spec)), pixels, expected)
    with torch.no_grad():
        trained = image_features(model, pixels)
    for tap in ("patch_mean", "pooled"):
        torch.testing.assert_close(trained[tap], expected[tap][-1])


def test_siglip(pixels: Tensor) -> None:
    """No class token: `vlm` drops a real patch."""
    trunk: Any = VisionTransformer(**VIT, class_token=False, global_pool="map", num_classes=0)  # pyright: ignore
    trunk.eval()
    blocks = outputs(trunk.blocks, lambda: trunk(pixels))
    assert blocks[0].shape == (2, 16, 32)
    with torch.no_grad():
        normed, pooled = trunk.norm(blocks[-1]), trunk(pixels)
    means = [b.mean(1) for b in blocks]
    expected = {
        "patch_mean": [*means, normed.mean(1)],
        "pooled": [*means, pooled],
        "vlm": [*(b[:, 1:].mean(1) for b in blocks), blocks[-2][:, 1:].mean(1)],
    }
    check(partial(timm_states, trunk), pixels, expected)


def test_siglip_of_transformers(pixels: Tensor) -> None:
    config = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=PX,
        patch_size=8,
    )
    model = SiglipVisionModel(config).eval()
    with torch.no_grad():
        out = model(pixels, output_hidden_states=True)
        normed = model.post_layernorm(out.hidden_states[-1])
    blocks = out.hidden_states[1:]
    means = [b.mean(1) for b in blocks]
    expected = {
        "patch_mean": [*means, normed.mean(1)],
        "pooled": [*means, out.pooler_output],
        "vlm": [*(b[:, 1:].mean(1) for b in blocks), blocks[-2][:, 1:].mean(1)],
    }
    check(partial(transformers_states, model), pixels, expected)


def test_registers_stay_with_the_patches_of_a_connector(pixels: Tensor) -> None:
    trunk: Any = VisionTransformer(**VIT, reg_tokens=2, num_classes=0)  # pyright: ignore
    blocks = outputs(trunk.eval().blocks, lambda: trunk(pixels))
    with torch.no_grad():
        normed = trunk.norm(blocks[-1])
    expected = {
        "patch_mean": [*(b[:, 3:].mean(1) for b in blocks), normed[:, 3:].mean(1)],
        "vlm": [*(b[:, 1:].mean(1) for b in blocks), blocks[-2][:, 1:].mean(1)],
    }
    check(partial(timm_states, trunk), pixels, expected)


def hierarchical(kind: str) -> tuple[Any, Any]:
    """A small trunk and the modules whose outputs are its stages."""
    if kind == "swin":
        trunk: Any = SwinTransformer(
            img_size=PX,
            patch_size=4,
            embed_dim=16,
            depths=(1, 1),
            num_heads=(2, 2),
            window_size=4,
            num_classes=0,
        )
        return trunk.eval(), trunk.layers
    if kind == "convnext":
        trunk = ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 12, 16, 20), num_classes=0)
        return trunk.eval(), trunk.stages
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        trunk = timm.create_model("mobilevit_xxs", num_classes=0)
    return trunk.eval(), [trunk.get_submodule(info["module"]) for info in trunk.feature_info]


@pytest.mark.parametrize("kind", ["swin", "convnext", "mobilevit"])
def test_hierarchical(kind: str, pixels: Tensor) -> None:
    """A connector reads all tokens of the last stage, before a norm that follows it."""
    trunk, stages = hierarchical(kind)
    with torch.no_grad():
        hidden = trunk.forward_features(pixels)
        pooled = trunk(pixels)
    axes = (1, 2) if kind == "swin" else (2, 3)
    means = [s.mean(axes) for s in outputs(stages, lambda: trunk.forward_features(pixels))]
    final = hidden.mean(axes)
    if kind == "mobilevit":
        means[-1] = final  # its last convolution belongs to the last stage
    expected = {
        "patch_mean": [*means, final],
        "pooled": [*means, pooled],
        "vlm": [*means, means[-1]],
    }
    check(partial(timm_states, trunk), pixels, expected)


def test_evenly_spaced_blocks(pixels: Tensor) -> None:
    trunk = VisionTransformer(**(VIT | {"depth": 9}), num_classes=0)  # pyright: ignore
    states = timm_states(trunk, pixels, None)
    assert list(tapped(states, "pooled", 3)) == ["block 1", "block 5", "block 9", "final"]
    assert len(tapped(states, "pooled", 40)) == 10
    assert list(tapped(states, "vlm")) == ["final"]


# Names.


def test_roles_tags_and_timm_names() -> None:
    assert resolve("clip_l14") is TEACHERS["clip_l14"]
    pair: Any = resolve("ViT-B-16/openai")
    role = TEACHERS["clip_b16"]
    assert pair.replace(name=role.name, facts=role.facts) == role  # with QuickGELU
    siglip: Any = resolve("ViT-SO400M-14-SigLIP-384/webli")
    role = TEACHERS["siglip_so400m"]
    assert siglip.replace(name=role.name, facts=role.facts) == role
    mobile: Any = resolve("MobileCLIP-S1/datacompdr")
    assert (mobile.interpolation, mobile.patch_px) == ("bilinear", None)
    expected = ImageModelSpec(name="resnet10t", library="timm", model="resnet10t", weights="random")
    assert resolve("resnet10t/random") == expected


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("ViT-B-16/opena", UnknownName, "it has .*openai"),
        ("clip_l15", UnknownName, r"Did you mean .*clip_l14.* A model is a role \("),
        ("EMPTY", WeightsError, "holds no model: found nothing, expected kdscale_tower.json"),
        ("abcd", KdscaleError, "no stage in .* has a key that begins with abcd"),
    ],
)
def test_unknown_names(name: str, kind: type[Exception], message: str, tmp_path: Path) -> None:
    name = str(tmp_path) if name == "EMPTY" else name
    with pytest.raises(kind, match=message):
        resolve(name, Storage(str(tmp_path)))


def image() -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 255, (40, 56, 3), np.uint8)


def final(spec: Any, storage: Storage | None = None) -> Tensor:
    """A model's vector of one image, from pixels on."""
    tower = load_tower_of(spec, storage)
    with torch.no_grad():
        rendered = torch.from_numpy(np.stack([tower.render(image())]))
        return tower.vectors(rendered, "pooled")["final"]


def test_directories_and_stages(tmp_path: Path) -> None:
    """kdscale's, open_clip's, timm's and transformers' layouts, and a finished stage."""
    spec, root = vit(), Storage(str(tmp_path))
    model = build_clip(spec, seed=7).eval()
    parts = ("stages", "distill", "0123456789abcdef")
    here = tmp_path.joinpath(*parts, "output", "model")
    save_clip(model, spec, here)
    root.write(b"", *parts, "DONE")
    by_key: Any = resolve("0123", root)
    assert by_key.weights == "stage:distill/0123456789abcdef"
    assert resolve("stage:distill/0123456789abcdef", root) == by_key
    expected = final(resolve(str(here)))
    assert torch.equal(final(by_key, root), expected)
    (here / "kdscale_tower.json").unlink()
    plain: Any = resolve(str(here))
    assert isinstance(plain, TowerSpec)
    assert plain.width == 32
    assert torch.equal(final(plain), expected)
    theirs = vision_model(model, spec)
    theirs.save_pretrained(tmp_path / "hf")
    size = {"shortest_edge": PX}
    CLIPImageProcessor(size=size, crop_size={"height": PX, "width": PX}).save_pretrained(
        tmp_path / "hf"
    )
    found: Any = resolve(str(tmp_path / "hf"))
    assert found.library == "transformers"
    torch.testing.assert_close(final(found), expected, atol=0.02, rtol=0.02)
    trunk = timm.create_model("resnet10t", num_classes=3)
    (tmp_path / "timm").mkdir()
    save_file(trunk.state_dict(), tmp_path / "timm" / "model.safetensors")
    config = {"architecture": "resnet10t", "num_classes": 3, "pretrained_cfg": {"num_classes": 3}}
    (tmp_path / "timm" / "config.json").write_text(json.dumps(config))
    assert final(resolve(str(tmp_path / "timm"))).shape == (1, 512)


def test_towers_without_taps() -> None:
    with pytest.raises(ConfigError, match="ModifiedResNet"):
        load_tower_of(resolve("RN50/random"))
