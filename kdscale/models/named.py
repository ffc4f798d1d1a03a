"""What a model's name on the command line means: one resolver for every command.

A CLIP pair becomes a `TowerSpec`, which the rest of kdscale builds; a model without a text tower
becomes an `ImageModelSpec`. Nothing is loaded here but configs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from open_clip.pretrained import get_pretrained_cfg

from kdscale.core.catalog import STUDENTS, TEACHERS
from kdscale.core.config import OPENAI_MEAN, OPENAI_STD, STAGE_WEIGHTS, TowerSpec
from kdscale.core.eval_config import ImageModelSpec
from kdscale.core.find import find_stage
from kdscale.core.storage import Storage
from kdscale.core.trained import epoch_suffix, missing_epochs, trained_weights
from kdscale.core.types import ConfigError, UnknownName, WeightsError
from kdscale.models.preprocess import HF_TOKENIZER_FILES, tokenizer
from kdscale.models.towers import SPEC_FILE, read_spec
from kdscale.models.weights import CONFIG_FILE, HUB_PREFIX

ROLES = TEACHERS | STUDENTS
STAGES = ("distill", "teacher")
MODEL_CONFIG = "config.json"
_KEY = re.compile("[0-9a-f]{2,16}(@[0-9]+)?")
_FORMS = (
    f"a role ({', '.join(ROLES)}), open_clip's ARCH/TAG (ViT-B-32/openai), a timm name, "
    "NAME/random for random weights, hf-hub:ORG/NAME, a directory in the hub's layout, or the key "
    "of a finished stage (with --storage)"
)

Named = TowerSpec | ImageModelSpec


def resolve(name: str, storage: Storage | None = None) -> Named:
    """Finds what a name stands for.

    Args:
        name: A role of the catalogue; open_clip's `ARCH/TAG`, or `ARCH/DIRECTORY` with local
            weights; a timm name, with or without a tag; either of them as `NAME/random`;
            `hf-hub:ORG/NAME`; a local directory that kdscale, open_clip, timm or transformers
            wrote; or the key of a finished `distill` or `teacher` stage, or its first digits
            (`stage:KIND/KEY`, too), with `@EPOCH` for a student that it kept. Tried in this
            order, directories after roles.
        storage: Where stages live; None knows none.

    Returns:
        A spec whose weights are named, not yet loaded.

    Raises:
        UnknownName: It is none of these.
        ConfigError: A model of a kind that cannot be used.
        WeightsError: A directory or hub repository without a usable config.
    """
    if name in ROLES:
        return ROLES[name]
    if Path(name).expanduser().is_dir():
        return _from_directory(Path(name).expanduser())
    if name.startswith(HUB_PREFIX):
        return _from_hub(name)
    arch, slash, tag = name.partition("/")
    if slash and arch in open_clip.list_models():
        return _from_open_clip(arch, tag)
    plain = name.removesuffix("/random")
    if timm.is_model(plain):
        weights = "pretrained" if plain == name else "random"
        return ImageModelSpec(name=plain, library="timm", model=plain, weights=weights)
    key = name.removeprefix(STAGE_WEIGHTS)
    if storage is not None and (key != name or _KEY.fullmatch(name)):
        return _from_stage(key.rpartition("/")[2], storage)
    raise UnknownName(f"unknown model {name!r}.{_near(name)} A model is {_FORMS}.")


def resolve_clip(name: str, storage: Storage | None = None) -> TowerSpec:
    """Finds the pair of towers that a name stands for.

    Args:
        name: As of `resolve`.
        storage: Likewise.

    Raises:
        ConfigError: It has no text tower, or one whose tokenizer is not known.
        UnknownName, WeightsError: As of `resolve`.
    """
    found = resolve(name, storage)
    if isinstance(found, ImageModelSpec):
        raise ConfigError(f"{name} reads images alone; a pair of image and text tower is needed")
    if found.tokenizer != "siglip":  # whose files may still have to be fetched
        tokenizer(found)
    return found


def _near(name: str) -> str:
    """Suggests known names like an unknown one."""
    known = [f"{arch}/{tag}" for arch, tag in open_clip.list_pretrained()]
    known += [*ROLES, *timm.list_models()]
    near = get_close_matches(name, known, n=3)
    return f" Did you mean {' or '.join(near)}?" if near else ""


def _from_stage(key: str, storage: Storage) -> TowerSpec:
    """The tower that a stage has trained, or one that it kept at an earlier epoch."""
    key, _, text = key.partition("@")
    epoch = int(text) if text else None
    stage = find_stage(storage, key, STAGES, "a tower")
    if epoch is not None and missing_epochs(stage, [epoch]):
        raise UnknownName(f"{stage.url()} has kept no student of epoch {epoch}")
    model = f"model{epoch_suffix(epoch)}"
    with storage.local_directory(*stage.parts, "output", model) as directory:
        spec = read_spec(directory)
    return spec.replace(weights=trained_weights(stage.kind, stage.key, epoch))


def _from_open_clip(arch: str, tag: str) -> TowerSpec:
    """One of open_clip's own architectures, with weights of a tag, a directory, or random ones."""
    directory = Path(tag).expanduser()
    if directory.is_dir():
        path = directory / CONFIG_FILE
        content = _read(path).get("preprocess_cfg", {}) if path.is_file() else {}
        return clip_spec(f"{arch}/{directory.name}", arch, content, str(directory))
    entry = get_pretrained_cfg(arch, tag)
    if tag != "random" and not entry:
        tags = open_clip.list_pretrained_tags_by_model(arch)
        raise UnknownName(
            f"open_clip has no weights {tag!r} for {arch}; it has {', '.join(tags) or 'none'}, "
            "and 'random' draws them"
        )
    if entry.get("quick_gelu") and f"{arch}-quickgelu" in open_clip.list_models():
        arch = f"{arch}-quickgelu"
    return clip_spec(f"{arch}/{tag}", arch, entry, tag)


def _from_directory(directory: Path) -> Named:
    """A local directory, by the config that lies in it."""
    if (directory / SPEC_FILE).is_file():
        return read_spec(directory)
    if (directory / CONFIG_FILE).is_file():
        return _from_clip_config(_read(directory / CONFIG_FILE), directory.name, str(directory))
    if (directory / MODEL_CONFIG).is_file():
        config = _read(directory / MODEL_CONFIG)
        return _image_model(config, directory.name, str(directory))
    found = ", ".join(sorted(path.name for path in directory.iterdir())[:8])
    raise WeightsError(
        f"{directory} holds no model: found {found or 'nothing'}, expected {SPEC_FILE}, "
        f"{CONFIG_FILE} or {MODEL_CONFIG}"
    )


def _from_hub(name: str) -> Named:
    """A hub repository, by its config."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repository = name.removeprefix(HUB_PREFIX)
    for file in (CONFIG_FILE, MODEL_CONFIG):
        try:
            config = _read(Path(hf_hub_download(repository, file)))
        except Exception as error:
            if isinstance(error, EntryNotFoundError) and not isinstance(
                error, LocalEntryNotFoundError
            ):
                continue
            raise WeightsError(
                f"{name} is not in the cache and could not be fetched ({type(error).__name__}: "
                f"{error}); give a local directory in the hub's layout"
            ) from error
        if file == CONFIG_FILE:
            return _from_clip_config(config, repository, name)
        return _image_model(config, repository, name)
    raise WeightsError(f"{name} has neither {CONFIG_FILE} nor {MODEL_CONFIG}")


def _read(path: Path) -> dict[str, Any]:
    """Reads a JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{path} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{path} holds no JSON object")
    return value


def _from_clip_config(content: Mapping[str, Any], name: str, weights: str) -> TowerSpec:
    """A pair in open_clip's hub layout."""
    if not isinstance(content.get("model_cfg"), dict):
        raise WeightsError(f"the {CONFIG_FILE} of {weights} has no 'model_cfg'")
    return clip_spec(name, content["model_cfg"], content.get("preprocess_cfg", {}), weights)


def _image_model(config: Mapping[str, Any], name: str, weights: str) -> ImageModelSpec:
    """A model without text tower in the hub layout of timm or of transformers."""
    if "architecture" in config:
        return ImageModelSpec(name=name, library="timm", weights=weights)
    if "model_type" in config:
        return ImageModelSpec(name=name, library="transformers", weights=weights)
    raise WeightsError(f"the {MODEL_CONFIG} of {weights} names neither architecture nor model_type")


def clip_spec(
    name: str, clip_config: str | dict[str, Any], preprocess: Mapping[str, Any], weights: str
) -> TowerSpec:
    """Describes a pair by open_clip's configs.

    Args:
        name: What people call it.
        clip_config: An architecture that open_clip knows, or a whole `model_cfg`.
        preprocess: `mean`, `std`, `interpolation` and `resize_mode`, where they differ from
            CLIP's.
        weights: As of `TowerSpec`.

    Raises:
        ConfigError: The pair reads images in a way that kdscale cannot prepare.
    """
    config: Any = clip_config
    if isinstance(clip_config, str):
        config = open_clip.get_model_config(clip_config)
    vision, text = config["vision_cfg"], config["text_cfg"]
    width, patch_px = _trunk(vision)
    resize = preprocess.get("resize_mode", "shortest")
    if resize not in ("shortest", "squash"):
        raise ConfigError(f"{name} resizes by {resize!r}; kdscale knows 'shortest' and 'squash'")
    mean: Any = preprocess.get("mean") or OPENAI_MEAN
    std: Any = preprocess.get("std") or OPENAI_STD
    return TowerSpec(
        name=name,
        clip_config=clip_config,
        weights=weights,
        image_px=_side(vision.get("image_size", 224), name),
        mean=mean,
        std=std,
        resize=resize,
        interpolation=preprocess.get("interpolation", "bicubic"),
        tokenizer=_tokenizer(text, weights),
        context_length=text.get("context_length", 77),
        embed_dim=config["embed_dim"],
        width=width,
        patch_px=patch_px,
    )


def _trunk(vision: Mapping[str, Any]) -> tuple[int, int | None]:
    """Width of an image tower, and side of its patches where it has any."""
    if "timm_model_name" not in vision:
        return vision.get("width", 768), vision.get("patch_size", 16)
    with torch.device("meta"):
        trunk: Any = timm.create_model(vision["timm_model_name"], num_classes=0)
    is_vit = timm.models.is_model_in_modules(vision["timm_model_name"], ["vision_transformer"])
    return trunk.num_features, trunk.patch_embed.patch_size[0] if is_vit else None


def _side(size: Any, name: str) -> int:
    """The side of a square input."""
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) > 1:
        raise ConfigError(f"{name} reads images of {size} pixels; kdscale knows squares")
    return sides.pop()


def _tokenizer(text: Mapping[str, Any], weights: str) -> str:
    """Names the tokenizer of a text tower; what kdscale does not know fails where text is read."""
    theirs = str(text.get("hf_tokenizer_name") or "")
    if not theirs:
        return "clip_bpe"
    folder = Path(weights).expanduser()
    if any((folder / file).is_file() for file in HF_TOKENIZER_FILES):
        return str(folder)
    return "siglip" if "SigLIP" in theirs and text.get("vocab_size") == 32_000 else theirs
