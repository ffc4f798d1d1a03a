"""One vector per image from any image tower, at its final layer or at all of its blocks.

| tap | at the final layer | at a block |
|---|---|---|
| `patch_mean` | mean of the spatial tokens after the final norm, where that acts on tokens | mean of its spatial tokens |
| `pooled` | class token after the norm, attention pool or global average; before any projection | its class token; without one, the mean of its tokens |
| `vlm` | mean of the tokens that a VLM's connector reads: a ViT's last but one block without its first token; a hierarchical network's last stage | the same tokens of that block |

Of a finished VLM every tap is the mean of the tokens that its projector gives out; it has one block.

`vlm` follows TinyLLaVA, which drops the first token of any ViT: CLIP's class token, and a real
patch of SigLIP, which has no class token. A block of a hierarchical network is one of its stages.

Shape suffixes: B batch, C channels, H height, W width, T tokens, K prefix tokens, D width.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import timm
import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from kdscale.core.config import STAGE_WEIGHTS, Layers, Tap, TowerSpec
from kdscale.core.eval_config import ImageModelSpec
from kdscale.core.storage import Storage
from kdscale.core.types import ConfigError, WeightsError
from kdscale.models.preprocess import eval_crop, normalise
from kdscale.models.towers import load_tower
from kdscale.models.weights import HUB_PREFIX

Rgb = np.ndarray[Any, np.dtype[np.uint8]]
Pixels = np.ndarray[Any, Any]
CONNECTOR_BLOCKS = 2  # what a connector reads is the output of one of the last two


@dataclass(frozen=True)
class Block:
    """What one block gives out: (B, T, D) spatial tokens, (B, K, D) tokens before them or None."""

    tokens: Tensor
    prefix: Tensor | None = None


@dataclass(frozen=True)
class States:
    """What a tower computes of a batch.

    Attributes:
        blocks: One or more, first to last, before the final norm.
        tokens: (B, T, D) final spatial tokens, after the final norm where it acts on tokens.
        pooled: (B, D) pooled vector before any projection.
        is_grid: A hierarchical network, whose blocks are stages.
    """

    blocks: Sequence[Block]
    tokens: Tensor
    pooled: Tensor
    is_grid: bool


@dataclass(frozen=True)
class ImageTower:
    """An image tower with its input processing.

    Attributes:
        model: The whole model, in evaluation mode, frozen.
        render: Prepares one image, (H, W, 3) uint8, on the CPU.
        normalise: Turns a stack of rendered images into the tower's input, on its device.
        states: Runs the tower on such an input, keeping so many of the last blocks, None for all.
    """

    name: str
    model: nn.Module
    render: Callable[[Rgb], Pixels]
    normalise: Callable[[Tensor], Tensor]
    states: Callable[[Tensor, int | None], States]

    def vectors(self, rendered: Tensor, tap: Tap, layers: Layers = "final") -> dict[str, Tensor]:
        """Computes one vector per image and layer.

        Args:
            rendered: (B, ...) stack of what `render` gave, on the model's device.
            tap: Which vector.
            layers: `final`, `all` blocks, or a number of evenly spaced ones.

        Returns:
            {layer: (B, D)}, in order: blocks, counted from 1, then `final`.
        """
        kept = CONNECTOR_BLOCKS if layers == "final" else None
        return tapped(self.states(self.normalise(rendered), kept), tap, layers)


def tapped(states: States, tap: Tap, layers: Layers = "final") -> dict[str, Tensor]:
    """Takes one vector per image and layer out of a tower's states; see `ImageTower.vectors`."""
    found = {
        f"block {place + 1}": _of_block(states.blocks[place], tap, states.is_grid)
        for place in _places(len(states.blocks), layers)
    }
    if tap == "patch_mean":
        final = states.tokens.mean(dim=1)
    elif tap == "pooled":
        final = states.pooled
    else:
        place = -1 if states.is_grid or len(states.blocks) == 1 else -2
        final = _of_block(states.blocks[place], tap, states.is_grid)
    return found | {"final": final}


def _places(num_blocks: int, layers: Layers) -> list[int]:
    """Chooses blocks."""
    if layers == "final":
        return []
    count = num_blocks if layers == "all" else min(layers, num_blocks)
    return sorted({round(place) for place in np.linspace(0, num_blocks - 1, count)})


def _of_block(block: Block, tap: Tap, is_grid: bool) -> Tensor:
    """The vector of one block."""
    if tap == "pooled" and block.prefix is not None:
        return block.prefix[:, 0]
    if tap != "vlm" or is_grid:
        return block.tokens.mean(dim=1)
    whole = block.tokens
    if block.prefix is not None:
        whole = torch.cat([block.prefix, whole], dim=1)
    return whole[:, 1:].mean(dim=1)


def load_tower_of(
    spec: TowerSpec | ImageModelSpec, storage: Storage | None = None, seed: int = 0
) -> ImageTower:
    """Loads an image tower with its input processing, on the CPU.

    Args:
        spec: From `kdscale.models.named.resolve`, or one's own.
        storage: Where a stage's weights are.
        seed: Draws random weights.

    Raises:
        ConfigError: A tower whose tokens are not known how to read.
        WeightsError: The weights are absent or do not fit.
    """
    if isinstance(spec, TowerSpec):
        tower = _from_pair(spec, storage or Storage("."), seed)
    elif spec.library == "timm":
        tower = _from_timm(spec, seed)
    elif spec.library == "vlm":
        tower = _from_vlm(spec, storage or Storage("."))
    else:
        tower = _from_transformers(spec)
    tower.model.eval().requires_grad_(False)
    return tower


def _from_pair(spec: TowerSpec, storage: Storage, seed: int) -> ImageTower:
    """The image tower of a CLIP pair."""
    visual: Any = getattr(load_tower(spec, storage, seed=seed), "visual", None)
    if isinstance(visual, VisionTransformer):
        states = partial(vit_states, visual)
    elif isinstance(visual, TimmModel):
        states = partial(timm_states, visual.trunk)
    else:
        raise ConfigError(f"no taps for image towers of type {type(visual).__name__}")
    prepare, inputs = partial(eval_crop, spec=spec), partial(normalise, spec=spec)
    return ImageTower(spec.name, visual, prepare, inputs, states)


def vit_states(visual: Any, pixels_BCHW: Tensor, kept: int | None) -> States:
    """States of open_clip's ViT."""
    if visual.attn_pool is not None or visual.pool_type not in ("tok", "avg"):
        raise ConfigError("taps need a ViT that pools its class token or its average")
    embedded = visual._embeds(pixels_BCHW)
    hidden, blocks = visual.transformer.forward_intermediates(embedded, indices=kept)
    pooled_BD, tokens_BTD = visual._pool(hidden)
    found = [Block(block[:, 1:], block[:, :1]) for block in blocks]
    return States(found, tokens_BTD, pooled_BD, is_grid=False)


def _from_timm(spec: ImageModelSpec, seed: int) -> ImageTower:
    """A timm model with the evaluation transform of its weights."""
    name = spec.model or spec.weights
    if spec.model is None and not name.startswith(HUB_PREFIX):
        name = f"local-dir:{Path(name).expanduser()}"
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            model = timm.create_model(name, pretrained=spec.weights != "random")
    except Exception as error:
        raise WeightsError(
            f"timm cannot load {spec.name} ({type(error).__name__}: {error}); give a local "
            f"directory in the hub's layout, or {spec.name}/random"
        ) from error
    transform: Any = create_transform(**resolve_model_data_config(model), is_training=False)

    def render(rgb: Rgb) -> Pixels:
        """Returns the pixels of an image."""
        return transform(Image.fromarray(rgb)).numpy()

    return ImageTower(spec.name, model, render, lambda pixels: pixels, partial(timm_states, model))


def timm_states(trunk: Any, pixels_BCHW: Tensor, kept: int | None) -> States:
    """States of a timm model, by timm's own account of its blocks or stages."""
    if not hasattr(trunk, "forward_intermediates"):
        raise ConfigError(f"timm's {type(trunk).__name__} does not give out its stages; no taps")
    prefixes = int(getattr(trunk, "num_prefix_tokens", 0))
    options: dict[str, Any] = {"return_prefix_tokens": True} if prefixes else {}
    hidden, found = trunk.forward_intermediates(pixels_BCHW, indices=kept, **options)
    blocks = [
        Block(_rows(item[0]), item[1]) if isinstance(item, tuple) else Block(_rows(item))
        for item in found
    ]
    pooled_BD = trunk.forward_head(hidden, pre_logits=True)
    is_grid = hidden.ndim == 4
    if is_grid and str(getattr(trunk, "output_fmt", "NCHW")) == "NHWC":
        tokens_BTD = hidden.flatten(1, 2)
    else:
        tokens_BTD = _rows(hidden) if is_grid else hidden[:, prefixes:]
    return States(blocks, tokens_BTD, pooled_BD, is_grid)


def _rows(grid: Tensor) -> Tensor:
    """Turns (B, D, H, W) into (B, T, D)."""
    return grid.flatten(2).transpose(1, 2)


def _from_transformers(spec: ImageModelSpec) -> ImageTower:
    """The vision model of a transformers checkpoint with the processor beside it."""
    from transformers import AutoImageProcessor, AutoModel

    source = spec.weights.removeprefix(HUB_PREFIX)
    try:
        loaded: Any = AutoModel.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
        processor = AutoImageProcessor.from_pretrained(
            source, backend="pil", trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError, UnpicklingError) as error:
        raise WeightsError(
            f"transformers cannot load {spec.name} from {source} with its image processor "
            f"({type(error).__name__}: {error})"
        ) from error
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if any(not name.startswith("pooler.") for name in missing):
        raise WeightsError(f"{source} lacks weights of {type(model).__name__}: {missing[:4]}")
    if missing:  # a classifier's checkpoint has no pooler, and a random one means nothing
        model.pooler = None
    vision = getattr(model, "vision_model", model)

    def render(rgb: Rgb) -> Pixels:
        """Returns the pixels of an image."""
        return processor(images=Image.fromarray(rgb), return_tensors="np")["pixel_values"][0]

    states = partial(transformers_states, vision)
    if hasattr(vision, "timm_model"):
        states = partial(timm_states, vision.timm_model)
    return ImageTower(spec.name, vision, render, lambda pixels: pixels, states)


def transformers_states(vision: Any, pixels_BCHW: Tensor, kept: int | None) -> States:
    """States of a transformers vision model that gives out its hidden states."""
    out = vision(pixel_values=pixels_BCHW, output_hidden_states=True)
    hidden = getattr(out, "hidden_states", None)
    last = getattr(out, "last_hidden_state", None)
    if not hidden or last is None:
        raise ConfigError(f"transformers' {type(vision).__name__} gives out no hidden states")
    is_grid = last.ndim == 4 or len({tuple(state.shape) for state in hidden}) > 1
    hidden = hidden[1:][-(kept or 0) :]
    if is_grid:
        found = [Block(_rows(state) if state.ndim == 4 else state) for state in hidden]
        tokens_BTD = _rows(last) if last.ndim == 4 else last
        pooled = getattr(out, "pooler_output", None)
        pooled_BD = tokens_BTD.mean(dim=1) if pooled is None else pooled.flatten(1)
        return States(found, tokens_BTD, pooled_BD, is_grid)
    side = vision.config.patch_size
    prefixes = last.shape[1] - (pixels_BCHW.shape[2] // side) * (pixels_BCHW.shape[3] // side)
    # CLIP's model leaves its final norm to the class token alone; open_clip's norms all tokens.
    norm = getattr(vision, "post_layernorm", None)
    normed = (
        norm(last) if norm is not None and vision.config.model_type.startswith("clip") else last
    )
    pooled = getattr(out, "pooler_output", None)
    if pooled is None:
        pooled = normed[:, 0] if prefixes else normed.mean(dim=1)
    found = [
        Block(state[:, prefixes:], state[:, :prefixes] if prefixes else None) for state in hidden
    ]
    return States(found, normed[:, prefixes:], pooled, is_grid)


def _from_vlm(spec: ImageModelSpec, storage: Storage) -> ImageTower:
    """Tower and projector of a VLM that a stage has trained; its language model is dropped."""
    from kdscale.models.vlm import load_vlm

    with storage.local_directory(
        "stages", *spec.weights.removeprefix(STAGE_WEIGHTS).split("/"), "output", "model"
    ) as directory:
        loaded, processor = load_vlm(directory)
    body: Any = loaded.model
    body.language_model = nn.Identity()
    prepare: Any = processor.image_processor

    def render(rgb: Rgb) -> Pixels:
        """Returns the pixels of an image."""
        return prepare(images=Image.fromarray(rgb), return_tensors="np")["pixel_values"][0]

    return ImageTower(spec.name, body, render, lambda pixels: pixels, partial(vlm_states, body))


def vlm_states(body: Any, pixels_BCHW: Tensor, _: int | None) -> States:
    """What a VLM's projector gives its language model."""
    features = body.get_image_features(
        pixels_BCHW,
        vision_feature_layer=body.config.vision_feature_layer,
        vision_feature_select_strategy=body.config.vision_feature_select_strategy,
    )
    tokens_BTD = torch.stack(tuple(features.pooler_output))
    return States([Block(tokens_BTD)], tokens_BTD, tokens_BTD.mean(dim=1), is_grid=True)
