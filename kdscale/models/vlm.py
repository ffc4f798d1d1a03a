"""Vision-language models: a tower, a projector and a language model, as transformers' own Llava.

Shape suffixes: B batch, C channels, H height, W width, T tokens, D trunk width.
"""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from kdscale.core.config import TowerSpec
from kdscale.core.types import ConfigError, WeightsError
from kdscale.core.vlm_config import VlmStage
from kdscale.models.hf_towers import (
    Strategy,
    family,
    feature_rule,
    image_processor,
    num_image_tokens,
    stride_px,
)
from kdscale.models.language import IMAGE, Attention, attention_for, load_language, load_tokenizer
from kdscale.models.preprocess import normalise
from kdscale.models.trainable import (
    changed_parameters,
    fingerprints,
    merge,
    parameter_groups,
    prepare_training,
    trainable_names,
)

__all__ = [
    "PROJECTOR_FILE",
    "Attention",
    "accept_features",
    "attention_for",
    "build_vlm",
    "changed_parameters",
    "fingerprints",
    "load_language",
    "load_projector",
    "load_tokenizer",
    "load_vlm",
    "merge",
    "normalise_pixels",
    "parameter_groups",
    "prepare_training",
    "save_projector",
    "save_vlm",
    "tower_features",
    "trainable_names",
]

PROJECTOR_FILE = "projector.safetensors"


def build_vlm(
    vision: PreTrainedModel,
    language: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    recipe: VlmStage,
    tower: TowerSpec,
    *,
    chat_template: str,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Joins a tower and a language model by a new projector.

    Args:
        vision: From `kdscale.models.hf_towers.vision_model`; becomes part of the result.
        language: From `load_language`; becomes part of the result.
        tokenizer: The language model's; its chat template is overwritten.
        recipe: Gives the feature and image settings and the seed of the projector.
        tower: What `vision` is.
        chat_template: The recipe's template in Jinja (`kdscale.data.instruct.chat_template`).

    Returns:
        The model in the language model's dtype, and the processor that feeds it outside kdscale.
        The projector starts as `torch.nn.Linear` does, which is how upstream started it.
    """
    config = _llava_config(vision, language, tokenizer, recipe, tower)
    parts: Any = language
    dtype = parts.dtype
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.seed)
        projector = LlavaMultiModalProjector(config).to(dtype)
    # Buffers that no checkpoint holds come along with the parts, so nothing stays on "meta".
    body: Any = model.model
    body.vision_tower = vision.requires_grad_(False).eval()
    body.vision_tower.to(dtype)
    body.multi_modal_projector = projector
    body.language_model = parts.base_model
    model.lm_head = parts.get_output_embeddings()
    model.config.vision_config, model.config.text_config = vision.config, language.config
    # Greedy, whatever sampling the language model's own settings ask for: answers are compared.
    ends = language.generation_config
    model.generation_config = GenerationConfig(
        bos_token_id=ends.bos_token_id,
        eos_token_id=ends.eos_token_id,
        pad_token_id=ends.pad_token_id,
    )
    model.tie_weights()
    accept_features(model)
    return model, _processor(tokenizer, recipe, tower, chat_template)


def _llava_config(
    vision: PreTrainedModel,
    language: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    recipe: VlmStage,
    tower: TowerSpec,
) -> LlavaConfig:
    """The joint config."""
    layer, strategy = feature_rule(family(tower), recipe.siglip_tokens)
    return LlavaConfig(
        vision_config=vision.config,
        text_config=language.config,
        image_token_index=tokenizer.get_vocab()[IMAGE],
        image_seq_length=num_image_tokens(tower, recipe.siglip_tokens, recipe.hierarchical_tokens),
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        projector_hidden_act="gelu",
        tie_word_embeddings=bool(language.config.tie_word_embeddings),
    )


def _processor(
    tokenizer: PreTrainedTokenizerFast, recipe: VlmStage, tower: TowerSpec, chat_template: str
) -> LlavaProcessor:
    """The processor, whose count of image tokens is the model's."""
    kind = family(tower)
    tokenizer.chat_template = chat_template
    return LlavaProcessor(
        image_processor=image_processor(tower, recipe.image_mode),
        tokenizer=tokenizer,
        patch_size=stride_px(tower, recipe.hierarchical_tokens),
        vision_feature_select_strategy=feature_rule(kind, recipe.siglip_tokens)[1],
        chat_template=chat_template,
        num_additional_image_tokens=int(kind == "clip"),
    )


def normalise_pixels(pixels: Tensor, spec: TowerSpec) -> Tensor:
    """Turns a batch's `pixel_values` into the model's input, on the device that they are on.

    Args:
        pixels: (B, H, W, C) uint8, or (B, T, D) features that were computed before.
        spec: The tower.

    Returns:
        (B, C, H, W) fp32, or the features as they came.
    """
    return pixels if pixels.ndim == 3 else normalise(pixels, spec)


def tower_features(
    vision: PreTrainedModel, pixels_BCHW: Tensor, rule: tuple[int, Strategy]
) -> Tensor:
    """Computes what the projector reads of images; a feature cache holds exactly this.

    Args:
        vision: A vision model.
        pixels_BCHW: Normalised pixels.
        rule: From `kdscale.models.hf_towers.feature_rule`.

    Returns:
        (B, T, D).
    """
    layer, strategy = rule
    hidden = vision(pixels_BCHW, output_hidden_states=True).hidden_states[layer]
    return hidden[:, 1:] if strategy == "default" else hidden


def accept_features(model: LlavaForConditionalGeneration) -> None:
    """Lets three-dimensional `pixel_values` stand for the tower's features, in place.

    They then go straight to the projector, inside the model's forward pass. Saved models do not
    keep this.
    """
    if not any(hook is _take_features for hook in model.model._forward_pre_hooks.values()):
        model.model.register_forward_pre_hook(_take_features, with_kwargs=True)


def _take_features(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Projects features that were computed before."""
    features = kwargs.get("pixel_values")
    if features is None or features.ndim != 3:
        return None
    projector = module.multi_modal_projector
    projected = projector(features.to(projector.linear_1.weight.dtype))
    image = BaseModelOutputWithPooling(pooler_output=tuple(projected))  # type: ignore[arg-type]
    return args, kwargs | {"pixel_values": None, "mm_encoder_outputs": {"image": image}}


def save_projector(model: LlavaForConditionalGeneration, directory: str | Path) -> None:
    """Writes the projector alone."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    state = model.model.multi_modal_projector.state_dict()
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    save_file(tensors, Path(directory) / PROJECTOR_FILE, metadata={"format": "pt"})


def load_projector(model: LlavaForConditionalGeneration, directory: str | Path) -> None:
    """Fills a model's projector with what `save_projector` wrote.

    Raises:
        WeightsError: There is none, or it was trained for another tower or language model.
    """
    path = Path(directory) / PROJECTOR_FILE
    if not path.is_file():
        raise WeightsError(f"no {PROJECTOR_FILE} in {directory}; projector pretraining writes one")
    try:
        model.model.multi_modal_projector.load_state_dict(load_file(path))
    except RuntimeError as error:
        raise WeightsError(f"{path} belongs to another tower or language model: {error}") from error


def save_vlm(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, directory: str | Path
) -> None:
    """Writes model and processor in the hub's layout; adapters must have been merged.

    A part that came from a directory of this machine is not named by it: what is written depends
    on no path. Names on the hub stay.
    """
    if any(isinstance(module, LoraLayer) for module in model.modules()):
        raise ConfigError("this model still has adapters; merge it first")
    parts: list[Any] = [model.config.text_config, model.config.vision_config]
    for part in parts:
        if part.name_or_path and Path(part.name_or_path).is_dir():
            part.name_or_path = ""
    model.save_pretrained(directory)
    processor.save_pretrained(directory)


def load_vlm(
    directory: str | Path,
    *,
    dtype: torch.dtype | Literal["auto"] = torch.float32,
    attention: str = "sdpa",
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Reads what `save_vlm` wrote, in evaluation mode on the CPU.

    Args:
        directory: Where it is.
        dtype: Of all parameters; `auto` keeps the stored one.
        attention: transformers' name of the language model's attention implementation.

    Raises:
        WeightsError: It is not there, or a tensor is missing or left over.
    """
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            directory,
            dtype=dtype,
            attn_implementation={"text_config": attention},
            output_loading_info=True,
            trust_remote_code=False,
        )
        processor = AutoProcessor.from_pretrained(directory, backend="pil", trust_remote_code=False)
    except (OSError, ValueError, UnpicklingError) as error:
        raise WeightsError(f"{directory} holds no vision-language model: {error}") from error
    model, found = loaded
    wrong = {name: values for name, values in found.items() if values}
    if wrong:
        raise WeightsError(f"{directory} does not fit its config: {wrong}")
    accept_features(model)
    return model.eval(), processor
