"""Image towers of CLIP pairs as the vision models of transformers' Llava.

A ViT becomes `CLIPVisionModel` and a SigLIP trunk `SiglipVisionModel`, both stock classes; a
hierarchical timm trunk becomes `TokenTimmModel`. Every tensor must find its place: a missing or
left-over one is an error.

Shape suffixes: B batch, C channels, H height, W width, T tokens, D trunk width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import timm
import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import QuickGELU, ResidualAttentionBlock, VisionTransformer
from PIL import Image
from timm.layers.activations import GELUTanh
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from kdscale.core.config import TowerSpec
from kdscale.core.types import ConfigError, WeightsError
from kdscale.core.vlm_config import HierarchicalTokens, ImageMode, SiglipTokens
from kdscale.models.token_timm import TokenTimmConfig, TokenTimmModel
from kdscale.models.towers import resolve_config

Strategy = Literal["default", "full"]
Family = Literal["clip", "siglip", "hierarchical"]
M = TypeVar("M", bound=PreTrainedModel)
STAGES: dict[HierarchicalTokens, tuple[int, int]] = {"last": (-1, 32), "stage3": (-2, 16)}


def family(spec: TowerSpec) -> Family:
    """Tells how a tower becomes a vision model, by its architecture alone.

    Returns:
        `clip`: open_clip's own ViT, with a class token; `siglip`: a timm ViT without one;
        `hierarchical`: any other timm trunk.
    """
    name = resolve_config(spec)["vision_cfg"].get("timm_model_name")
    if not name:
        return "clip"
    return (
        "siglip"
        if timm.models.is_model_in_modules(name, ["vision_transformer"])
        else "hierarchical"
    )


def feature_rule(kind: Family, siglip_tokens: SiglipTokens = "all") -> tuple[int, Strategy]:
    """Returns Llava's `vision_feature_layer` and `vision_feature_select_strategy`.

    Args:
        kind: From `family`.
        siglip_tokens: `drop_first` drops SigLIP's first patch, as TinyLLaVA does.
    """
    if kind == "hierarchical":
        return -1, "full"
    drops_first = kind == "clip" or siglip_tokens == "drop_first"
    return -2, "default" if drops_first else "full"


def stride_px(spec: TowerSpec, hierarchical_tokens: HierarchicalTokens = "last") -> int:
    """Returns the side of the square of pixels that one token stands for.

    Raises:
        ConfigError: A ViT's spec does not say.
    """
    if family(spec) == "hierarchical":
        return STAGES[hierarchical_tokens][1]
    if spec.patch_px is None:
        raise ConfigError(f"tower {spec.name!r} is a ViT; its spec must give patch_px")
    return spec.patch_px


def num_image_tokens(
    spec: TowerSpec,
    siglip_tokens: SiglipTokens = "all",
    hierarchical_tokens: HierarchicalTokens = "last",
) -> int:
    """Returns the number of tokens that an image takes in the language model's sequence."""
    grid = spec.image_px // stride_px(spec, hierarchical_tokens)
    dropped = family(spec) == "siglip" and siglip_tokens == "drop_first"
    return grid * grid - int(dropped)


def image_processor(spec: TowerSpec, image_mode: ImageMode = "square") -> LlavaImageProcessorPil:
    """Returns the processor that gives a tower its pixels outside of kdscale.

    Always the class of Llava, for SigLIP too: serving engines ask it for a `crop_size`.

    Args:
        spec: Gives size, resizing, mean and standard deviation.
        image_mode: `pad` first makes the image square with borders of the mean's colour.
    """
    square = {"height": spec.image_px, "width": spec.image_px}
    return LlavaImageProcessorPil(
        size=square if spec.resize == "squash" else {"shortest_edge": spec.image_px},
        crop_size=square,
        do_center_crop=spec.resize != "squash",
        do_pad=image_mode == "pad",
        resample=Image.Resampling[spec.interpolation.upper()],
        image_mean=list(spec.mean),
        image_std=list(spec.std),
    )


def vision_model(
    clip: nn.Module, spec: TowerSpec, hierarchical_tokens: HierarchicalTokens = "last"
) -> PreTrainedModel:
    """Converts the image tower of a pair.

    Args:
        clip: A pair from `kdscale.models.towers`; only read.
        spec: What it is.
        hierarchical_tokens: Which feature map of a hierarchical trunk gives the tokens.

    Returns:
        A frozen model in evaluation mode, fp32, on the CPU. Its hidden states are those of the
        pair's tower; a hierarchical trunk's lack the final norm where it acts after the last map.

    Raises:
        ConfigError: The architecture has parts that the target class lacks.
        WeightsError: A tensor is missing or left over.
    """
    visual: Any = getattr(clip, "visual", None)
    # Constructors draw random weights, which must not move the global random state.
    with torch.random.fork_rng(devices=[]):
        if isinstance(visual, VisionTransformer):
            model = _clip_model(visual, spec)
        elif not isinstance(visual, TimmModel):
            raise ConfigError(
                f"no vision model for image towers of type {type(visual).__name__}; "
                "give open_clip's ViT or a timm trunk"
            )
        elif family(spec) == "siglip":
            model = _siglip_model(visual.trunk, spec)
        else:
            model = _token_model(visual.trunk, spec, hierarchical_tokens)
    return model.requires_grad_(False).eval()


def _clip_model(visual: Any, spec: TowerSpec) -> CLIPVisionModel:
    """A ViT with class token."""
    blocks = list(visual.transformer.resblocks)
    first: Any = blocks[0]
    plain = (
        {type(block) for block in blocks} == {ResidualAttentionBlock}
        and isinstance(first.ls_1, nn.Identity)
        and isinstance(visual.ln_pre, nn.LayerNorm)
        and isinstance(visual.ln_post, nn.LayerNorm)
        and visual.attn_pool is None
        and visual.pool_type == "tok"
    )
    if not plain:
        raise ConfigError(
            f"tower {spec.name!r} differs from CLIP's ViT (layer scale, other norms, another "
            "pool); CLIPVisionModel cannot hold it"
        )
    config = CLIPVisionConfig(
        hidden_size=visual.conv1.out_channels,
        intermediate_size=first.mlp.c_fc.out_features,
        num_hidden_layers=len(blocks),
        num_attention_heads=first.attn.num_heads,
        image_size=spec.image_px,
        patch_size=visual.conv1.kernel_size[0],
        hidden_act=_activation(first.mlp.gelu, spec),
        layer_norm_eps=visual.ln_pre.eps,
        projection_dim=spec.embed_dim,
    )
    return _filled(CLIPVisionModel(config), _clip_state(visual.state_dict()), spec)


_CLIP_NAMES = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre": "pre_layrnorm",
    "ln_post": "post_layernorm",
}
_CLIP_BLOCK_NAMES = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def _clip_state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames open_clip's tensors; the projection to the shared space stays behind."""
    state: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name == "proj":
            continue
        if not name.startswith("transformer.resblocks."):
            state[_renamed(name, _CLIP_NAMES)] = value
            continue
        layer, part = name.removeprefix("transformer.resblocks.").split(".", 1)
        prefix = f"encoder.layers.{layer}."
        if part.startswith("attn.in_proj_"):
            kind = part.removeprefix("attn.in_proj_")
            state |= _split_qkv(f"{prefix}self_attn.", kind, value)
        else:
            state[prefix + _renamed(part, _CLIP_BLOCK_NAMES)] = value
    return state


def _renamed(name: str, table: Mapping[str, str]) -> str:
    """Replaces the beginning of a tensor's name; an unknown one stays and is refused later."""
    for old, new in table.items():
        if name == old or name.startswith(f"{old}."):
            return new + name[len(old) :]
    return name


def _split_qkv(prefix: str, kind: str, value: Tensor) -> dict[str, Tensor]:
    """Splits a fused projection."""
    parts = zip(("q", "k", "v"), value.chunk(3), strict=True)
    return {f"{prefix}{letter}_proj.{kind}": part for letter, part in parts}


def _siglip_model(trunk: Any, spec: TowerSpec) -> SiglipVisionModel:
    """A timm ViT without class token, with or without attention pool."""
    block, pool = trunk.blocks[0], trunk.attn_pool
    plain = (
        trunk.num_prefix_tokens == 0
        and isinstance(trunk.norm_pre, nn.Identity)
        and isinstance(trunk.norm, nn.LayerNorm)
        and isinstance(getattr(block, "ls1", None), nn.Identity)
        and isinstance(block.attn.q_norm, nn.Identity)
    )
    if not plain:
        raise ConfigError(
            f"tower {spec.name!r} differs from SigLIP's ViT (class token, layer scale, other "
            "norms); SiglipVisionModel cannot hold it"
        )
    config = SiglipVisionConfig(
        hidden_size=trunk.embed_dim,
        intermediate_size=block.mlp.fc1.out_features,
        num_hidden_layers=len(trunk.blocks),
        num_attention_heads=block.attn.num_heads,
        image_size=spec.image_px,
        patch_size=trunk.patch_embed.proj.kernel_size[0],
        hidden_act=_activation(block.mlp.act, spec),
        layer_norm_eps=trunk.norm.eps,
        vision_use_head=pool is not None,
    )
    return _filled(SiglipVisionModel(config), _siglip_state(trunk.state_dict()), spec)


_SIGLIP_NAMES = {
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm": "post_layernorm",
    "attn_pool.latent": "head.probe",
    "attn_pool.proj": "head.attention.out_proj",
    "attn_pool.norm": "head.layernorm",
    "attn_pool.mlp": "head.mlp",
}
_SIGLIP_BLOCK_NAMES = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
}


def _siglip_state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames timm's tensors."""
    state: dict[str, Tensor] = {}
    for name, value in tensors.items():
        kind = name.rsplit(".", 1)[-1]
        if name == "pos_embed":
            state["embeddings.position_embedding.weight"] = value[0]
        elif name.startswith("attn_pool.q."):
            fused = torch.cat([value, tensors[f"attn_pool.kv.{kind}"]])
            state[f"head.attention.in_proj_{kind}"] = fused
        elif name.startswith("blocks."):
            layer, part = name.removeprefix("blocks.").split(".", 1)
            prefix = f"encoder.layers.{layer}."
            if part.startswith("attn.qkv."):
                state |= _split_qkv(f"{prefix}self_attn.", kind, value)
            else:
                state[prefix + _renamed(part, _SIGLIP_BLOCK_NAMES)] = value
        elif not name.startswith("attn_pool.kv."):
            state[_renamed(name, _SIGLIP_NAMES)] = value
    return state


def _token_model(trunk: Any, spec: TowerSpec, tokens: HierarchicalTokens) -> TokenTimmModel:
    """Any other timm trunk."""
    stage, stride = STAGES[tokens]
    info = trunk.feature_info[stage]
    if info["reduction"] != stride or spec.image_px % stride:
        raise ConfigError(
            f"tower {spec.name!r}: {tokens!r} tokens need a stage of stride {stride} that divides "
            f"{spec.image_px} px, this one has stride {info['reduction']}"
        )
    config = TokenTimmConfig(
        architecture=resolve_config(spec)["vision_cfg"]["timm_model_name"],
        model_args=_model_args(trunk, spec),
        do_pooling=False,
        hidden_size=info["num_chs"],
        image_size=spec.image_px,
        patch_size=stride,
        stage=stage,
    )
    state = {f"timm_model.{name}": value for name, value in trunk.state_dict().items()}
    return _filled(TokenTimmModel(config), state, spec)


def _model_args(trunk: Any, spec: TowerSpec) -> dict[str, Any]:
    """What timm needs to build the trunk again; drop path is 0, its own default is not."""
    arguments: dict[str, Any] = {"drop_path_rate": 0.0}
    built_px = getattr(getattr(trunk, "patch_embed", None), "img_size", None)
    if built_px is not None and hasattr(trunk, "layers"):  # Swin: windows shrink with the image
        window = trunk.layers[0].blocks[0].window_size
        arguments |= {"img_size": spec.image_px, "window_size": list(window)}
    return arguments


def _activation(module: nn.Module, spec: TowerSpec) -> str:
    """transformers' name of an activation."""
    if isinstance(module, QuickGELU):
        return "quick_gelu"
    if isinstance(module, GELUTanh) or getattr(module, "approximate", None) == "tanh":
        return "gelu_pytorch_tanh"
    if isinstance(module, nn.GELU):
        return "gelu"
    raise ConfigError(f"tower {spec.name!r}: no activation like {type(module).__name__}")


def _filled(model: M, state: Mapping[str, Tensor], spec: TowerSpec) -> M:
    """Loads tensors that must match a model's exactly."""
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in state.items()}
    if own != given:
        missing = sorted(name for name in own if own[name] != given.get(name))
        extra = sorted(set(given) - set(own))
        raise WeightsError(
            f"tower {spec.name!r} does not fit {type(model).__name__}: missing or misshapen "
            f"{missing[:4]}, left over {extra[:4]} ({len(missing)} and {len(extra)} in all)"
        )
    model.load_state_dict(dict(state), strict=True)
    return model
