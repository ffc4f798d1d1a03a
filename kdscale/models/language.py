"""Causal language models and their tokenizers, made ready for images.

Both families of the study leave this file with a padding token, an `<image>` token inside the
embedding table, and otherwise the vocabulary that they were trained with.
"""

from __future__ import annotations

import math
from importlib.util import find_spec
from pickle import UnpicklingError
from typing import Any, Literal, NamedTuple

import torch
from tokenizers import AddedToken
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from kdscale.core.config import Precision
from kdscale.core.types import ConfigError, WeightsError
from kdscale.core.vlm_config import LanguageModelSpec
from kdscale.models.preprocess import TOKENIZER_DIR

IMAGE = "<image>"
DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
ROW_MULTIPLE = 64


def load_language(
    spec: LanguageModelSpec,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Builds a language model and its tokenizer, fitted to each other.

    Args:
        spec: `weights` and `tokenizer` say where they come from.
        seed: Decides random weights, alone: the global random state is neither read nor moved.
        dtype: Of all parameters.
        attention: transformers' name of the attention implementation.

    Returns:
        The model on the CPU, and a tokenizer with `<image>` as a special token, padding with its
        end token where it had no padding token of its own. The embedding table keeps its size
        where `<image>` fits in (Qwen2), and else grows to a multiple of 64 (SmolLM).

    Raises:
        ConfigError: Random weights without a config or tokenizer.
        WeightsError: Model or tokenizer cannot be read, or have no end token.
    """
    tokenizer = load_tokenizer(spec)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = _load_model(spec, dtype, attention)
    fit_vocabulary(model, tokenizer)
    return model, tokenizer


def load_tokenizer(spec: LanguageModelSpec) -> PreTrainedTokenizerFast:
    """Reads the tokenizer of a language model and gives it `<image>` and a padding token.

    Raises:
        ConfigError: The spec names none.
        WeightsError: It cannot be read, or has no end token.
    """
    source = spec.tokenizer or (spec.weights if spec.weights != "random" else None)
    if source is None:
        raise ConfigError(
            f"language model {spec.name!r} has random weights and no tokenizer; set `tokenizer` "
            "to a hub id, a directory or 'mini_lm'"
        )
    path = str(TOKENIZER_DIR / source) if source == "mini_lm" else source
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise WeightsError(f"tokenizer {source!r} cannot be loaded: {error}") from error
    if tokenizer.eos_token_id is None:
        raise WeightsError(f"tokenizer {source!r} has no end token, which answers must end with")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    # Right for training; generation asks for the left side itself.
    tokenizer.padding_side = "right"
    tokenizer.add_tokens([AddedToken(IMAGE, special=True, normalized=False)], special_tokens=True)
    return tokenizer


def _load_model(spec: LanguageModelSpec, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """Builds the model, or reads its weights with the config beside them."""
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention}
    if spec.weights == "random":
        fields = dict(spec.config or {})
        if "model_type" not in fields:
            raise ConfigError(
                f"language model {spec.name!r} has random weights and no config; set `config` to "
                "a transformers config with its model_type"
            )
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        return AutoModelForCausalLM.from_config(config, **options)
    try:
        return AutoModelForCausalLM.from_pretrained(
            spec.weights, trust_remote_code=False, **options
        )
    except (OSError, ValueError, UnpicklingError) as error:
        raise WeightsError(
            f"weights {spec.weights!r} of {spec.name!r} cannot be loaded: {error}; set `weights` "
            "to a local directory in the hub's layout, or to 'random'"
        ) from error


def fit_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Makes a model's token ids and embedding table agree with a tokenizer, in place.

    New rows are the mean of the old ones, so that tokens which never occur stay improbable.
    """
    table: Any = model.get_input_embeddings()
    old_rows = table.weight.shape[0]
    if len(tokenizer) > old_rows:
        rows = math.ceil(len(tokenizer) / ROW_MULTIPLE) * ROW_MULTIPLE
        with torch.random.fork_rng(devices=[]):
            model.resize_token_embeddings(rows, mean_resizing=False)
        tables: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
        with torch.no_grad():
            for weight in (module.weight for module in tables):
                weight[old_rows:] = weight[:old_rows].float().mean(dim=0).to(weight.dtype)
    # The padding id stays out of the model's config: with it, a reloaded embedding table would
    # give its row no gradient, and that row is the end token's.
    model.config.eos_token_id = tokenizer.eos_token_id
    generation: Any = model.generation_config
    generation.eos_token_id = tokenizer.eos_token_id
    generation.pad_token_id = tokenizer.pad_token_id


class Attention(NamedTuple):
    """An attention implementation by transformers' name, and why it was chosen."""

    name: str
    reason: str


def attention_for(
    choice: Literal["auto", "sdpa", "flash_attention_2"],
    device: str | torch.device,
    precision: Precision = "bf16",
) -> Attention:
    """Chooses the language model's attention; the caller logs the reason.

    Raises:
        ConfigError: Flash attention was asked for and cannot run here.
    """
    obstacles = {
        f"the device is {torch.device(device).type}": torch.device(device).type != "cuda",
        "the package flash-attn is not installed": find_spec("flash_attn") is None,
        "it computes in fp16 and bf16 only": precision == "fp32",
    }
    against = "; ".join(reason for reason, holds in obstacles.items() if holds)
    if choice == "sdpa":
        return Attention("sdpa", "the recipe asks for it")
    if not against:
        return Attention("flash_attention_2", "GPU, package and precision allow it")
    if choice == "flash_attention_2":
        raise ConfigError(f"attention='flash_attention_2' cannot run here: {against}; use 'auto'")
    return Attention("sdpa", f"no flash attention 2: {against}")
