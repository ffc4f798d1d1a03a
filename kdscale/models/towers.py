"""CLIP pairs from specs: build, read features, save.

open_clip builds every pair, so that weights load from and save to its hub layout. Inputs are
prepared in `kdscale.models.preprocess`; weights are found and checked in `kdscale.models.weights`.

Shape suffixes: B batch, C channels, H height, W width, T tokens, D embedding, K trunk width.
"""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import set_model_preprocess_cfg
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from safetensors.torch import save_file
from torch import Tensor, nn

import kdscale.models.mini_timm  # noqa: F401  # pyright: ignore[reportUnusedImport]
from kdscale.core.config import STAGE_WEIGHTS, TowerSpec
from kdscale.core.storage import Storage
from kdscale.core.trained import epoch_suffix, trained_by
from kdscale.core.types import ConfigError, WeightsError, unknown_name
from kdscale.models.preprocess import copy_tokenizer, eval_crop, normalise, tokenizer
from kdscale.models.weights import CONFIG_FILE, WEIGHTS_FILE, find_weights, load_weights

__all__ = [
    "SPEC_FILE",
    "build_clip",
    "count_parameters",
    "eval_crop",
    "freeze",
    "image_features",
    "load_tower",
    "normalise",
    "read_spec",
    "resolve_config",
    "save_clip",
    "tokenizer",
]

SPEC_FILE = "kdscale_tower.json"


def build_clip(
    spec: TowerSpec, *, seed: int = 0, drop_path: float = 0.0, logit_bias: float | None = None
) -> nn.Module:
    """Builds a CLIP pair in fp32 on the CPU, in training mode.

    Under `torch.device("meta")` random weights take no memory, for counting.

    Args:
        spec: The pair; `spec.weights` decides where the weights come from.
        seed: Decides random weights, alone: the global random state is neither read nor moved.
        drop_path: Largest drop-path rate of a timm image tower; 0 leaves what the config says in
            `vision_cfg.timm_drop_path`, or 0. timm's own defaults never apply.
        logit_bias: Initial bias of a sigmoid loss for a config without one (usually -10).

    Returns:
        open_clip's `CLIP` or `CustomTextCLIP`: `encode_image(pixels) -> (B, D)` and
        `encode_text(tokens) -> (B, D)`, both unnormalised; `logit_scale` holds the logarithm,
        ln(1/0.07) at first; `logit_bias` is None for towers of a softmax loss.

    Raises:
        ConfigError: The spec contradicts itself or its architecture.
        WeightsError: The weights are absent or belong to another architecture.
    """
    config = resolve_config(spec)
    _set_drop_path(config["vision_cfg"], drop_path)
    if logit_bias is not None:
        config.setdefault("init_logit_bias", logit_bias)
    source = find_weights(spec, config)
    # fork_rng covers the CPU generator, which is the only one that initialisation draws from.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = _instantiate(config)
        _fit_input_size(model.visual, spec.image_px)
    if source is not None:
        load_weights(model, source)
    set_model_preprocess_cfg(model, _preprocess_config(spec))
    return model


def load_tower(spec: TowerSpec, storage: Storage, seed: int = 0, **options: Any) -> nn.Module:
    """Builds a pair as `build_clip` does, taking weights that a stage trained from the store."""
    if not spec.weights.startswith(STAGE_WEIGHTS):
        return build_clip(spec, seed=seed, **options)
    kind, key, epoch = trained_by(spec.weights)
    name = f"model{epoch_suffix(epoch)}"
    with storage.local_directory("stages", kind, key, "output", name) as directory:
        return build_clip(spec.replace(weights=directory), seed=seed, **options)


def freeze(model: nn.Module) -> nn.Module:
    """Sets a pair that only teaches to evaluation; it is called under `torch.no_grad`.

    On a CPU its weights keep `requires_grad`: without it torch 2.11 has a slow path for inputs that
    are not contiguous, which open_clip's attention makes. In bf16 a forward pass of CLIP L/14 takes
    52 s on two cores that way and 0.6 s this way; in fp32 both are as fast.
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    return model.eval().requires_grad_(on_cpu)


def resolve_config(spec: TowerSpec) -> dict[str, Any]:
    """Returns a copy of the spec's open_clip config, checked against the spec.

    Raises:
        UnknownName: open_clip knows no such architecture.
        ConfigError: The config and the spec disagree on size, width or context.
    """
    if isinstance(spec.clip_config, str):
        config = open_clip.get_model_config(spec.clip_config)
        if config is None:
            raise unknown_name("open_clip architecture", spec.clip_config, open_clip.list_models())
    else:
        config = deepcopy(spec.clip_config)
    missing = {"embed_dim", "vision_cfg", "text_cfg"} - set(config)
    if missing:
        raise ConfigError(f"clip_config of {spec.name!r} lacks {', '.join(sorted(missing))}")
    if "multimodal_cfg" in config:
        raise ConfigError(f"{spec.name!r} is a captioning model; only CLIP pairs are supported")
    _check_agreement(spec, config)
    config["vision_cfg"]["timm_model_pretrained"] = False
    config["text_cfg"]["hf_model_pretrained"] = False
    return config


def _check_agreement(spec: TowerSpec, config: dict[str, Any]) -> None:
    """Compares the fields that a spec repeats from its config."""
    vision = config["vision_cfg"]
    pairs: list[tuple[str, object, object]] = [
        ("embed_dim", spec.embed_dim, config["embed_dim"]),
        ("image_px", spec.image_px, vision.get("image_size", 224)),
        ("context_length", spec.context_length, config["text_cfg"].get("context_length", 77)),
    ]
    if "timm_model_name" not in vision:
        pairs.append(("width", spec.width, vision.get("width", 768)))
        pairs.append(("patch_px", spec.patch_px, vision.get("patch_size", 16)))
    wrong = [
        f"{name} is {ours!r}, its config says {theirs!r}"
        for name, ours, theirs in pairs
        if ours != theirs
    ]
    if wrong:
        raise ConfigError(f"tower {spec.name!r}: {'; '.join(wrong)}; make the two agree")


def _set_drop_path(vision_cfg: dict[str, Any], drop_path: float) -> None:
    """Writes the effective drop-path rate into the config of a timm tower."""
    if "timm_model_name" in vision_cfg:
        vision_cfg["timm_drop_path"] = drop_path or vision_cfg.get("timm_drop_path") or 0.0
    elif drop_path > 0:
        raise ConfigError("open_clip's own ViT has no drop path; use drop_path=0 for this student")


def _instantiate(config: dict[str, Any]) -> open_clip.CLIP | open_clip.CustomTextCLIP:
    """Constructs the class that open_clip chooses for such a config."""
    arguments = deepcopy(config)
    custom_text = arguments.pop("custom_text", False) or "hf_model_name" in config["text_cfg"]
    return (open_clip.CustomTextCLIP if custom_text else open_clip.CLIP)(**arguments)


def _fit_input_size(visual: nn.Module, image_px: int) -> None:
    """Resizes timm trunks whose layout depends on the image size and is not yet the spec's."""
    if not isinstance(visual, TimmModel) or not hasattr(visual.trunk, "set_input_size"):
        return
    current = getattr(getattr(visual.trunk, "patch_embed", None), "img_size", None)
    if current is not None and tuple(current) != (image_px, image_px):
        visual.set_input_size(image_px)


def _preprocess_config(spec: TowerSpec) -> dict[str, Any]:
    """The spec's evaluation transform in open_clip's words."""
    return {
        "size": (spec.image_px, spec.image_px),
        "mode": "RGB",
        "mean": spec.mean,
        "std": spec.std,
        "interpolation": spec.interpolation,
        "resize_mode": spec.resize,
        "fill_color": 0,
    }


def image_features(model: nn.Module, pixels_BCHW: Tensor) -> dict[str, Tensor]:
    """Computes the vectors of an image that losses, CKA and retrieval read.

    Args:
        model: A pair from `build_clip`.
        pixels_BCHW: Normalised pixels, floating point.

    Returns:
        `embedding` (B, D), as `encode_image` gives it, unnormalised; `pooled` (B, K), before the
        projection: the normed class token, the attention pool (SigLIP, where it is the embedding
        too) or the global average; `patch_mean` (B, K), the mean of the last layer's spatial
        tokens without class token, after the trunk's final norm where that norm acts on tokens
        (ViTs, Swin) and before it where it acts on the pooled vector (ConvNeXt).
    """
    visual: Any = model.visual
    if isinstance(visual, VisionTransformer):
        embedding_BD, pooled_BK, tokens_BTK = _vit_outputs(visual, pixels_BCHW)
    elif isinstance(visual, TimmModel):
        embedding_BD, pooled_BK, tokens_BTK = _timm_outputs(visual, pixels_BCHW)
    else:
        raise ConfigError(f"no feature taps for image towers of type {type(visual).__name__}")
    return {
        "embedding": embedding_BD,
        "pooled": pooled_BK,
        "patch_mean": tokens_BTK.mean(dim=1),
    }


def _vit_outputs(visual: Any, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Embedding, pooled vector and tokens of open_clip's ViT."""
    if visual.attn_pool is not None or visual.pool_type not in ("tok", "avg"):
        raise ConfigError("feature taps need a ViT that pools its class token or its average")
    hidden = visual.transformer(visual._embeds(pixels_BCHW))
    pooled_BK, tokens_BTK = visual._pool(hidden)
    embedding_BD = pooled_BK if visual.proj is None else pooled_BK @ visual.proj
    return embedding_BD, pooled_BK, tokens_BTK


def _timm_outputs(visual: Any, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Embedding, pooled vector and tokens of a timm trunk, whatever its layout."""
    trunk = visual.trunk
    hidden = trunk.forward_features(pixels_BCHW)
    pooled_BK = trunk.forward_head(hidden)
    if hidden.ndim == 3:
        tokens_BTK = hidden[:, getattr(trunk, "num_prefix_tokens", 0) :]
    elif str(getattr(trunk, "output_fmt", "NCHW")) == "NHWC":
        tokens_BTK = hidden.flatten(1, 2)
    else:
        tokens_BTK = hidden.flatten(2).transpose(1, 2)
    return visual.head(pooled_BK), pooled_BK, tokens_BTK


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Counts the parameters of `image`, `text` and `scale` (logit scale and bias)."""
    counts = {"image": 0, "text": 0, "scale": 0}
    for name, parameter in model.named_parameters():
        part = "image" if name.startswith("visual.") else "text"
        part = "scale" if name in ("logit_scale", "logit_bias") else part
        counts[part] += parameter.numel()
    return counts


def save_clip(model: nn.Module, spec: TowerSpec, directory: str | Path) -> None:
    """Writes a pair in open_clip's hub layout: `open_clip.create_model("local-dir:...")` loads it.

    The directory receives the weights (safetensors), open_clip's config, the spec, and the
    tokenizer's files where the tokenizer is of the Hugging Face kind.

    Args:
        model: A pair from `build_clip(spec)`, not wrapped.
        spec: What it is; its `weights` field is not kept.
        directory: Created if absent; files of the same names are replaced.
    """
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    config = resolve_config(spec)
    if getattr(model, "logit_bias", None) is not None:
        config.setdefault("init_logit_bias", -10.0)
    for section, key in (
        ("vision_cfg", "timm_model_pretrained"),
        ("text_cfg", "hf_model_pretrained"),
    ):
        config[section].pop(key)
    tensors = {
        name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()
    }
    save_file(tensors, target / WEIGHTS_FILE, metadata={"format": "pt"})
    _write_json(
        target / SPEC_FILE,
        spec.replace(clip_config=config, weights="random").model_dump(mode="json"),
    )
    if copy_tokenizer(spec, target):
        config["text_cfg"].setdefault("hf_tokenizer_name", target.name)
        config["text_cfg"]["tokenizer_kwargs"] = {"clean": "canonicalize"}
    _write_json(
        target / CONFIG_FILE, {"model_cfg": config, "preprocess_cfg": _preprocess_config(spec)}
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes indented JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_spec(directory: str | Path) -> TowerSpec:
    """Reads the spec that `save_clip` wrote, with `weights` pointing at the directory.

    Raises:
        WeightsError: The directory holds no such file, or it is not a tower's spec.
    """
    path = Path(directory) / SPEC_FILE
    if not path.is_file():
        raise WeightsError(
            f"{directory} has no {SPEC_FILE}; save_clip writes one beside the weights"
        )
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return TowerSpec(**{**fields, "weights": str(directory)})
    except (ConfigError, ValueError) as error:
        raise WeightsError(f"{path} does not describe a tower: {error}") from error
