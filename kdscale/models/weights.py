"""Where a tower's weights are, and whether they belong to its architecture.

Four ways in, one way through: an open_clip tag or a hub id resolves to files in the hub's cache,
a local directory in the hub's layout is used as it lies, a checkpoint file (an absolute path) has
nothing beside it that tells its architecture, and all of them are checked and loaded by the same
code. `random` means that there is nothing to load.

Checkpoint files are what open_clip's trainer and CLIP-KD's write (`state_dict` beside the
optimizer's state, names with `module.` in front) and bare state dicts, as `.pt` or `.safetensors`;
nothing but tensors is unpickled. timm 0.9 moved Swin's `downsample` from the end of a stage to the
beginning of the next one and no longer stores the indices of its windows: older files are read as
the newer ones. A file does not say which GELU a ViT was trained with: the architecture decides.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_clip.factory import load_state_dict
from open_clip.model import CLIPTextCfg, CLIPVisionCfg, convert_to_custom_text_state_dict
from open_clip.pretrained import (
    download_pretrained,
    download_pretrained_from_hf,
    get_pretrained_cfg,
    list_pretrained,
    list_pretrained_tags_by_model,
)
from torch import Tensor, nn

from kdscale.core.config import TowerSpec
from kdscale.core.keys import weights_file
from kdscale.core.types import WeightsError

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
OTHER_WEIGHTS_FILES = ("open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
HUB_PREFIX = "hf-hub:"
# Differences here do not change what the weights compute.
FREE_FIELDS = {
    "timm_model_pretrained",
    "timm_drop",
    "timm_drop_path",
    "patch_dropout",
    "output_tokens",
    "hf_model_pretrained",
    "hf_tokenizer_name",
    "tokenizer_mode",
    "tokenizer_kwargs",
}


@dataclass(frozen=True, kw_only=True)
class WeightsSource:
    """A checkpoint file and how to name it in messages."""

    path: str
    origin: str


def is_directory_name(weights: str) -> bool:
    """Tells whether a `weights` value means something local rather than a tag."""
    return not weights.startswith(HUB_PREFIX) and ("/" in weights or Path(weights).is_dir())


def hub_id(spec: TowerSpec) -> str | None:
    """Returns the hub repository that a spec's weights come from, None for local or random ones."""
    if spec.weights.startswith(HUB_PREFIX):
        return spec.weights.removeprefix(HUB_PREFIX)
    if spec.weights == "random" or is_directory_name(spec.weights):
        return None
    entry = get_pretrained_cfg(str(spec.clip_config), spec.weights)
    return str(entry.get("hf_hub", "")).rstrip("/") or None


def find_weights(spec: TowerSpec, config: dict[str, Any]) -> WeightsSource | None:
    """Finds the checkpoint of a spec and checks that it was made for the config.

    Args:
        spec: The pair.
        config: Its open_clip config (`kdscale.models.towers.resolve_config`).

    Returns:
        The file, or None for random weights.

    Raises:
        WeightsError: Nothing is there, or it was trained as another architecture.
    """
    if spec.weights == "random":
        return None
    if spec.weights.startswith(HUB_PREFIX):
        return _from_hub(spec, config)
    file = weights_file(spec.weights)
    if file is not None:
        return WeightsSource(path=str(file), origin=str(file))
    if is_directory_name(spec.weights):
        return _from_directory(Path(spec.weights).expanduser(), config)
    return _from_tag(spec, config)


def _from_directory(directory: Path, config: dict[str, Any]) -> WeightsSource:
    """Finds the weights of a local directory in the hub's layout."""
    expected = f"{CONFIG_FILE} and {WEIGHTS_FILE}"
    if directory.is_file():
        raise WeightsError(f"{directory} is a file: name it by its absolute path, or by Pretrained")
    if not directory.is_dir():
        raise WeightsError(
            f"weights directory {directory} does not exist; expected {expected} in it"
        )
    present = sorted(path.name for path in directory.iterdir())
    if not (directory / CONFIG_FILE).is_file():
        raise WeightsError(
            f"{directory} has no {CONFIG_FILE}; found {present}, expected {expected}"
        )
    names = [name for name in (WEIGHTS_FILE, *OTHER_WEIGHTS_FILES) if name in present]
    if not names:
        raise WeightsError(
            f"{directory} has no {WEIGHTS_FILE}; found {present}, expected {expected}"
        )
    _check_config(_read_config(directory / CONFIG_FILE), config, str(directory))
    return WeightsSource(path=str(directory / names[0]), origin=str(directory))


def _from_hub(spec: TowerSpec, config: dict[str, Any]) -> WeightsSource:
    """Finds the weights of a hub repository in the cache, or fetches them."""
    repository = spec.weights.removeprefix(HUB_PREFIX)
    trained = _known_quick_gelu(repository)
    if trained is not None:
        _check_quick_gelu(trained, config, spec.weights)
    try:
        config_path = download_pretrained_from_hf(repository, filename=CONFIG_FILE)
        path = download_pretrained_from_hf(repository)
    except Exception as error:
        raise _unreachable(spec, error) from error
    theirs = _read_config(Path(config_path))
    if trained is not None:
        theirs["quick_gelu"] = trained
    _check_config(theirs, config, spec.weights)
    return WeightsSource(path=path, origin=spec.weights)


def _known_quick_gelu(repository: str) -> bool | None:
    """What open_clip's table says of a hub repository's activation; None if it is not listed."""
    for name, tag in list_pretrained():
        entry = get_pretrained_cfg(name, tag)
        if str(entry.get("hf_hub", "")).rstrip("/") == repository:
            return bool(entry.get("quick_gelu"))
    return None


def _from_tag(spec: TowerSpec, config: dict[str, Any]) -> WeightsSource:
    """Finds the weights of an open_clip tag in the cache, or fetches them."""
    name = spec.clip_config
    if not isinstance(name, str):
        raise WeightsError(
            f"weights {spec.weights!r} of {spec.name!r}: no such directory, and a tag needs an "
            "architecture's name as clip_config; give a directory, a hub id or 'random'"
        )
    plain = name.removesuffix("-quickgelu")
    entry = get_pretrained_cfg(name, spec.weights) or get_pretrained_cfg(plain, spec.weights)
    if not entry:
        tags = ", ".join(list_pretrained_tags_by_model(name)) or "none"
        raise WeightsError(
            f"weights {spec.weights!r}: no such directory, and no tag of {name} (tags: {tags})"
        )
    _check_quick_gelu(bool(entry.get("quick_gelu")), config, f"{name} {spec.weights}")
    try:
        path = download_pretrained(entry)
    except Exception as error:
        raise _unreachable(spec, error) from error
    return WeightsSource(path=path, origin=f"{name} {spec.weights}")


def _unreachable(spec: TowerSpec, error: Exception) -> WeightsError:
    """The error for weights that are neither cached nor to be had."""
    return WeightsError(
        f"weights {spec.weights!r} of {spec.name!r} are not in the cache and could not be fetched "
        f"({type(error).__name__}: {error}); set `weights` to a local directory with "
        f"{CONFIG_FILE} and {WEIGHTS_FILE}, or to 'random'"
    )


def _check_quick_gelu(trained: bool, config: dict[str, Any], origin: str) -> None:
    """Refuses weights that were trained with the other activation: they load, and are worse."""
    built = bool(config.get("quick_gelu", False))
    if trained != built:
        words = {True: "QuickGELU", False: "GELU"}
        hint = "a '-quickgelu' config" if trained else "the config without '-quickgelu'"
        raise WeightsError(
            f"{origin}: trained with {words[trained]}, but clip_config builds {words[built]}; "
            f"use {hint} (or quick_gelu={trained} in a config dict)"
        )


def _read_config(path: Path) -> dict[str, Any]:
    """Reads `model_cfg` of an open_clip config file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content["model_cfg"]
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"{path} is not an open_clip config with a 'model_cfg': {error!r}"
        ) from error


def _check_config(theirs: Mapping[str, Any], ours: dict[str, Any], origin: str) -> None:
    """Compares two configs in the fields that change what the weights compute."""
    _check_quick_gelu(bool(theirs.get("quick_gelu", False)), ours, origin)
    ours = json.loads(json.dumps(ours))
    there: dict[str, Any] = {"embed_dim": theirs.get("embed_dim")}
    here: dict[str, Any] = {"embed_dim": ours["embed_dim"]}
    for section, defaults in (("vision_cfg", CLIPVisionCfg), ("text_cfg", CLIPTextCfg)):
        for fields, config in ((there, theirs), (here, ours)):
            values = vars(defaults()) | dict(config.get(section, {}))
            kept = {name: value for name, value in values.items() if name not in FREE_FIELDS}
            fields.update({f"{section}.{name}": value for name, value in kept.items()})
    wrong = [
        f"{name} is {there.get(name)!r} there and {here.get(name)!r} here"
        for name in sorted(set(there) | set(here))
        if there.get(name) != here.get(name)
    ]
    if wrong:
        raise WeightsError(f"{origin} holds another architecture: {'; '.join(wrong)}")


def load_weights(model: nn.Module, source: WeightsSource) -> None:
    """Loads a checkpoint, every tensor at its exact shape (no interpolation of positions).

    Args:
        model: The pair to fill, in place.
        source: From `find_weights`.

    Raises:
        WeightsError: The file is unreadable, or names or shapes differ from the model's.
    """
    try:
        read: Any = load_state_dict(source.path, device="cpu", weights_only=True)
    except Exception as error:
        raise WeightsError(
            f"{source.path} cannot be read: {type(error).__name__}: {error}"
        ) from error
    if not all(isinstance(value, Tensor) for value in read.values()):
        found = _some("entries", list(map(str, read)))
        raise WeightsError(f"{source.path} is no model's checkpoint: its {found} are no tensors")
    own = model.state_dict()
    read = _as_today(read)
    if "positional_embedding" in read and "positional_embedding" not in own:
        read = convert_to_custom_text_state_dict(read)
    state: dict[str, Tensor] = dict(read)
    state.pop("text.transformer.embeddings.position_ids", None)
    for name in ("logit_scale", "logit_bias"):
        if name in state and name in own and state[name].numel() == 1:
            state[name] = state[name].reshape(own[name].shape)
    _check_tensors(state, own, source.origin)
    model.load_state_dict(state, strict=True)


def _as_today(read: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames what timm before 0.9 called otherwise in a Swin, and drops its window indices."""
    stage = re.compile(r"^(visual\.trunk\.layers\.)(\d+)(\.downsample\.)")
    is_old = any(name.startswith("visual.trunk.layers.0.downsample.") for name in read)
    indices = ("relative_position_index", "attn_mask")
    return {
        stage.sub(lambda m: f"{m[1]}{int(m[2]) + is_old}{m[3]}", name): value
        for name, value in read.items()
        if not (name.startswith("visual.trunk.") and name.endswith(indices))
    }


def _check_tensors(state: Mapping[str, Tensor], own: Mapping[str, Tensor], origin: str) -> None:
    """Compares names and shapes, and says what differs."""
    missing = sorted(set(own) - set(state))
    extra = sorted(set(state) - set(own))
    reshaped = [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if not (missing or extra or reshaped):
        return
    parts = [_some("wrong shapes", reshaped), _some("missing", missing), _some("unexpected", extra)]
    raise WeightsError(f"{origin} does not fit the architecture: {'; '.join(filter(None, parts))}")


def _some(label: str, items: list[str]) -> str:
    """The first few items of a list, with their number."""
    if not items:
        return ""
    more = ", ..." if len(items) > 4 else ""
    return f"{len(items)} {label} ({', '.join(items[:4])}{more})"
