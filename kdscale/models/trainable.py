"""What a VLM recipe trains: freezing, adapters, and proof that nothing else moved."""

from __future__ import annotations

import hashlib
import re
from types import MethodType
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import LlavaForConditionalGeneration

from kdscale.core.types import WeightsError
from kdscale.core.vlm_config import Lora, VlmStage

LANGUAGE_PREFIX = "model.language_model."


def prepare_training(
    model: LlavaForConditionalGeneration, recipe: VlmStage
) -> LlavaForConditionalGeneration:
    """Freezes what a recipe does not train and adds its adapters, in place.

    Args:
        model: From `build_vlm`, or loaded.
        recipe: `trainable` and `lora` decide; `seed` initialises adapters.

    Returns:
        The model in training mode. Its tower stays in evaluation mode whatever `train()` says:
        batch norm would move its statistics.
    """
    body: Any = model.model
    model.requires_grad_(False)
    if recipe.lora is not None:
        _inject(model, recipe.lora, recipe.seed)
    if recipe.trainable == "projector+llm":
        body.language_model.requires_grad_(True)
        model.lm_head.requires_grad_(True)
    body.multi_modal_projector.requires_grad_(True)
    body.vision_tower.train = MethodType(_stay_eval, body.vision_tower)
    return model.train()


def _stay_eval(module: nn.Module, mode: bool = True) -> nn.Module:
    """Stands where a frozen tower's `train` was."""
    return nn.Module.train(module, False)


def _inject(model: nn.Module, lora: Lora, seed: int) -> None:
    """Adds adapters to every linear layer of the language model's body, in the layers' dtype."""
    kinds = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if name.startswith(LANGUAGE_PREFIX) and isinstance(module, nn.Linear)
    }
    # Towers have layers of the same names, so the path belongs to the pattern.
    pattern = f"{re.escape(LANGUAGE_PREFIX)}.*\\.({'|'.join(sorted(kinds))})"
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        bias="none",
        target_modules=pattern,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        inject_adapter_in_model(config, model)
    # ZeRO-3 cannot flatten parameters of mixed dtypes.
    for module in model.modules():
        if isinstance(module, LoraLayer):
            base: Any = module.get_base_layer()
            dtype: torch.dtype = base.weight.dtype
            factors: list[nn.Module] = [module.lora_A, module.lora_B]
            for factor in factors:
                factor.to(dtype)


def merge(model: LlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
    """Adds adapters to the weights that they adapt and takes them out, in place.

    Returns:
        A plain model, also where there were no adapters.

    Raises:
        WeightsError: An adapter holds values that are not finite.
    """
    for name, module in list(model.named_modules()):
        if not isinstance(module, LoraLayer):
            continue
        try:
            module.merge(safe_merge=True)
        except ValueError as error:
            raise WeightsError(f"adapter {name} cannot be merged: {error}") from error
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
    return model


def trainable_names(model: nn.Module) -> set[str]:
    """Returns the names of the parameters that take gradients."""
    return {name for name, value in model.named_parameters() if value.requires_grad}


def parameter_groups(model: nn.Module, recipe: VlmStage) -> list[dict[str, Any]]:
    """Returns the optimizer's parameter groups: learning rate, and decay of matrices alone.

    The projector has a learning rate of its own where the recipe says so.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, value in model.named_parameters():
        if not value.requires_grad:
            continue
        own = recipe.projector_lr is not None and "multi_modal_projector" in name
        lr = recipe.projector_lr if own and recipe.projector_lr else recipe.lr
        decay = recipe.weight_decay if value.ndim > 1 else 0.0
        groups.setdefault((lr, decay), []).append(value)
    return [
        {"params": values, "lr": lr, "weight_decay": decay}
        for (lr, decay), values in groups.items()
    ]


def fingerprints(model: nn.Module) -> dict[str, str]:
    """Returns a digest of each parameter and buffer, for `changed_parameters`."""
    return {
        name: hashlib.blake2b(
            value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(),
            digest_size=16,
        ).hexdigest()
        for name, value in [*model.named_parameters(), *model.named_buffers()]
    }


def changed_parameters(before: dict[str, str], model: nn.Module) -> set[str]:
    """Returns the names of parameters and buffers that are no longer bit-identical.

    After some steps it equals `trainable_names(model)`. One is too few where the learning rate
    warms up from 0, and for adapters: their first factor moves only once the second is not 0.

    Args:
        before: `fingerprints` of the same model.
        model: The model now.
    """
    now = fingerprints(model)
    return {name for name in before.keys() | now.keys() if before.get(name) != now.get(name)}
