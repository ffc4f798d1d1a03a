"""The VLM recipes by name: what TinyLLaVA Factory and Bunny do, then and now.

`tinyllava` and `bunny` follow the paper's tables 6 to 10 and, where it is silent, the released
code of that time (TinyLLaVA Factory 53f12c7, Bunny 08273ac): no gradient clipping, means of
micro-batch means, a dropped SigLIP patch in TinyLLaVA. The `_modern` variants take what today's
libraries do by default.

Departures from the paper's text: its template "Plain" for Bunny's fine-tuning asserts one image
and two messages and cannot run on conversations, so `bunny` stands there; the fine-tuning data
of Bunny are the upstream default `bunny_695k.json`.
"""

from __future__ import annotations

from typing import Any

from kdscale.core.vlm_config import Lora

Settings = dict[str, Any]

# Per GPU x accumulation x 4 GPUs of the paper; megabatches span its 4 GPUs without accumulation.
TINYLLAVA: tuple[Settings, Settings] = (
    {
        "data": "llava_pretrain_558k",
        "template": "pretrain",
        "trainable": "projector",
        "siglip_tokens": "drop_first",
        "lr": 1e-3,
        "global_batch_size": 256,
        "micro_batch_size": 16,
        "precision": "fp16",
        "zero_stage": 2,
    },
    {
        "data": "llava_mix_665k",
        "template": "qwen2_base",
        "trainable": "projector+llm",
        "siglip_tokens": "drop_first",
        "lr": 2e-5,
        "global_batch_size": 128,
        "micro_batch_size": 8,
        "length_grouping": True,
        "group_size": 32,
        "precision": "bf16",
        "zero_stage": 3,
    },
)
BUNNY: tuple[Settings, Settings] = (
    {
        "data": "bunny_laion_2m",
        "template": "plain",
        "trainable": "projector",
        "lr": 5e-4,
        "global_batch_size": 128,
        "micro_batch_size": 8,
        "precision": "bf16",
        "zero_stage": 2,
    },
    {
        "data": "bunny_695k",
        "template": "bunny",
        "trainable": "projector+lora",
        "lora": Lora(),
        "image_mode": "pad",
        "lr": 2e-4,
        "projector_lr": 2e-5,
        "global_batch_size": 128,
        "micro_batch_size": 8,
        "precision": "bf16",
        "zero_stage": 3,
    },
)
_TODAY: Settings = {
    "grad_clip": 1.0,
    "loss_norm": "update",
    "siglip_tokens": "all",
    "precision": "bf16",
}


def _modern(recipe: tuple[Settings, Settings]) -> tuple[Settings, Settings]:
    """Returns a recipe with today's defaults."""
    return recipe[0] | _TODAY, recipe[1] | _TODAY


VLM_RECIPES: dict[str, tuple[Settings, Settings]] = {
    "tinyllava": TINYLLAVA,
    "bunny": BUNNY,
    "tinyllava_modern": _modern(TINYLLAVA),
    "bunny_modern": _modern(BUNNY),
}
