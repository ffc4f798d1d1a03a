"""CLIP pairs by name: what a person types becomes a `TowerSpec`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from open_clip.pretrained import (
    download_pretrained_from_hf,
    get_pretrained_cfg,
    list_pretrained_tags_by_model,
)

from kdscale.core.catalog import STUDENTS, TEACHERS
from kdscale.core.config import STAGE_WEIGHTS, TowerSpec
from kdscale.core.find import find_stage
from kdscale.core.storage import Storage
from kdscale.core.types import ConfigError, WeightsError, unknown_name
from kdscale.models.towers import SPEC_FILE, read_spec
from kdscale.models.weights import CONFIG_FILE, HUB_PREFIX

KINDS = ("distill", "teacher")


def resolve_clip(name: str, storage: Storage | None = None) -> TowerSpec:
    """Returns the CLIP pair that a name means; the first reading that fits is taken.

    Args:
        name: A role of the catalogue (`clip_b16`); a directory of weights; `ARCH/TAG` of
            open_clip (`ViT-B-16/datacomp_xl_s13b_b90k`) or `ARCH/DIRECTORY`
            (`ViT-B-16//models/mine`); a hub id (`hf-hub:org/model`, or `org/model`); a finished
            distill or teacher stage's key or its first digits.
        storage: Where stages live; None knows none.

    Raises:
        UnknownName: No such tag or stage.
        WeightsError: A directory or repository that holds no CLIP pair.
        ConfigError: A pair that this code cannot feed as its authors did.
    """
    if name in TEACHERS or name in STUDENTS:
        return (TEACHERS | STUDENTS)[name]
    if Path(name).expanduser().is_dir():
        return _from_directory(Path(name).expanduser())
    head, slash, rest = name.partition("/")
    if slash and open_clip.get_model_config(head) is not None:
        return _from_architecture(name, head, rest)
    if slash or name.startswith(HUB_PREFIX):
        return _from_hub(name.removeprefix(HUB_PREFIX))
    if storage is None:
        raise unknown_name("model", name, TEACHERS | STUDENTS)
    stage = find_stage(storage, name.removeprefix(STAGE_WEIGHTS), KINDS, "a CLIP pair")
    with storage.local_directory(*stage.parts, "output", "model") as directory:
        spec = read_spec(directory)
    return spec.replace(weights=f"{STAGE_WEIGHTS}{stage.kind}/{stage.key}")


def _from_directory(directory: Path) -> TowerSpec:
    """Reads what `save_clip` or open_clip wrote beside the weights."""
    if (directory / SPEC_FILE).is_file():
        return read_spec(directory)
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise WeightsError(f"{directory} has neither {SPEC_FILE} nor {CONFIG_FILE}; name ARCH/DIR")
    return _described(path, str(directory), directory.name)


def _from_hub(repository: str) -> TowerSpec:
    """Reads a repository's description from the hub's cache, or fetches it."""
    try:
        path = download_pretrained_from_hf(repository, filename=CONFIG_FILE)
    except Exception as error:
        raise WeightsError(
            f"no open_clip model {repository} in the hub's cache and none can be fetched: "
            f"{type(error).__name__}: {error}"
        ) from error
    return _described(Path(path), f"{HUB_PREFIX}{repository}", repository)


def _described(path: Path, weights: str, name: str) -> TowerSpec:
    """Makes a spec of an `open_clip_config.json`."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        config, inputs = document["model_cfg"], document.get("preprocess_cfg", {})
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{path} is not open_clip's description: {error!r}") from error
    return _spec(name, config, config, inputs, weights)


def _from_architecture(name: str, architecture: str, weights: str) -> TowerSpec:
    """Makes a spec of an architecture that open_clip knows, with a tag's or local weights."""
    config = open_clip.get_model_config(architecture)
    assert config is not None
    directory = Path(weights).expanduser()
    if directory.is_dir():
        path = directory / CONFIG_FILE
        inputs = json.loads(path.read_text()).get("preprocess_cfg", {}) if path.is_file() else {}
        return _spec(name, architecture, config, inputs, str(directory))
    tags = list_pretrained_tags_by_model(architecture)
    if weights != "random" and weights not in tags:
        raise unknown_name(f"weights of {architecture}", weights, [*tags, "random", "a directory"])
    inputs = get_pretrained_cfg(architecture, weights) if weights in tags else {}
    return _spec(name, architecture, config, inputs, weights)


def _spec(
    name: str, architecture: Any, config: dict[str, Any], inputs: dict[str, Any], weights: str
) -> TowerSpec:
    """Puts together architecture, inputs and weights."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    fields: dict[str, Any] = {key: inputs[key] for key in ("mean", "std") if inputs.get(key)}
    resize = inputs.get("resize_mode") or "shortest"
    interpolation = inputs.get("interpolation") or "bicubic"
    if resize not in ("shortest", "squash") or interpolation not in ("bicubic", "random"):
        raise ConfigError(
            f"{name} reads images resized by {resize!r}, {interpolation!r}; only 'shortest' and "
            "'squash' with 'bicubic' are built here"
        )
    return TowerSpec(
        name=name,
        clip_config=architecture,
        weights=weights,
        image_px=_side(vision.get("image_size", 224), name),
        resize=resize,
        tokenizer=_tokenizer(text, weights, name),
        context_length=text.get("context_length", 77),
        embed_dim=config["embed_dim"],
        width=_width(vision),
        patch_px=None if "timm_model_name" in vision else vision.get("patch_size", 16),
        **fields,
    )


def _side(size: Any, name: str) -> int:
    """Returns the side of a square image."""
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ConfigError(f"{name} reads images of {size}; only square ones are built here")
    return sides.pop()


def _width(vision: dict[str, Any]) -> int:
    """Returns the width of the image trunk; timm's is read off a model without memory."""
    if "timm_model_name" not in vision:
        return vision.get("width", 768)
    with torch.device("meta"):
        trunk: Any = timm.create_model(vision["timm_model_name"], pretrained=False, num_classes=0)
    return int(trunk.num_features)


def _tokenizer(text: dict[str, Any], weights: str, name: str) -> str:
    """Returns the tokenizer of a text tower.

    Raises:
        ConfigError: One that this code does not have, and would replace silently otherwise.
    """
    options = text.get("tokenizer_kwargs") or {}
    if text.get("hf_tokenizer_name") is None and not options:
        return "clip_bpe"
    if text.get("hf_tokenizer_name") and options == {"clean": "canonicalize"}:
        return weights if Path(weights).is_dir() else "siglip"
    raise ConfigError(
        f"{name} reads text through {text.get('hf_tokenizer_name')!r} with {options}; CLIP's and "
        "SigLIP's tokenizers are built here"
    )
