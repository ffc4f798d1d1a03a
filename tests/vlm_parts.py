"""Towers, language models and tokenizers of the study, small enough to build in milliseconds."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerFast

from kdscale.core.config import TowerSpec
from kdscale.core.vlm_config import LanguageModelSpec

TEXT = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
END = "<|endoftext|>"
# The format of the study's templates, in few words.
CHAT = (
    "{% for m in messages %}{{ 'USER: ' if m.role == 'user' else 'ASSISTANT: ' }}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{{ '<image>\n' if c.type == 'image' else c.text }}{% endfor %}{% endif %}"
    "{{ ' ' if m.role == 'user' else '<|endoftext|>' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@cache
def register_small_trunks() -> None:
    """Adds a small SigLIP and a small Swin to timm's registry, in the modules of the large ones."""

    def swin_for_tests(pretrained: bool = False, **options: Any) -> SwinTransformer:
        model = SwinTransformer(
            embed_dim=16,
            depths=(1, 1, 2, 1),
            num_heads=(1, 2, 4, 8),
            **_without_pretraining({"window_size": 7} | options),
        )
        model.default_cfg = {}
        return model

    def vit_tiny_siglip_for_tests(pretrained: bool = False, **options: Any) -> VisionTransformer:
        model = VisionTransformer(
            img_size=32,
            patch_size=8,
            embed_dim=32,
            depth=3,
            num_heads=2,
            mlp_ratio=2.5,
            class_token=False,
            act_layer="gelu_tanh",
            **(_without_pretraining(options) | {"global_pool": "map", "num_classes": 0}),
        )
        model.default_cfg = {}
        return model

    for module, function in (
        ("vision_transformer", vit_tiny_siglip_for_tests),
        ("swin_transformer", swin_for_tests),
    ):
        function.__module__ = f"timm.models.{module}"
        timm.models.register_model(function)


def _without_pretraining(options: dict[str, Any]) -> dict[str, Any]:
    """Drops what timm's builder would consume."""
    dropped = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
    return {name: value for name, value in options.items() if name not in dropped}


def tower(name: str, **fields: Any) -> TowerSpec:
    """Gives a small tower of the real one's kind."""
    vit = {"layers": 3, "head_width": 16, "patch_size": 8, "image_size": 32}
    trunk = {"timm_pool": "", "timm_proj": "linear", "timm_drop_path": 0.0, "image_size": 64}
    visions: dict[str, tuple[dict[str, Any], int, int | None]] = {
        "clip_b16": ({**vit, "width": 48}, 48, 8),
        "vit_t16": ({**vit, "width": 32}, 32, 8),
        "siglip_so400m": (
            {
                "image_size": 32,
                "timm_model_name": "vit_tiny_siglip_for_tests",
                "timm_pool": "map",
                "timm_proj": "none",
            },
            32,
            8,
        ),
        "mobilevit_s": ({**trunk, "timm_model_name": "mobilevit_xxs"}, 320, None),
        "swin_t": ({**trunk, "timm_model_name": "swin_for_tests"}, 128, None),
        "convnext_t": ({**trunk, "timm_model_name": "test_convnext2"}, 128, None),
    }
    vision, width, patch_px = visions[name]
    register_small_trunks()
    if name == "siglip_so400m":
        fields = {"resize": "squash", "mean": (0.5,) * 3, "std": (0.5,) * 3, **fields}
    config: dict[str, Any] = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": TEXT}
    config["quick_gelu"] = name == "clip_b16"
    config["custom_text"] = name == "siglip_so400m"
    defaults = {
        "name": name,
        "clip_config": config,
        "image_px": vision["image_size"],
        "context_length": 8,
        "embed_dim": 32,
        "width": width,
        "patch_px": patch_px,
    }
    return TowerSpec(**(defaults | fields))


TOWERS = ("clip_b16", "siglip_so400m", "vit_t16", "mobilevit_s", "swin_t", "convnext_t")
_BODY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def language(name: str, folder: Path) -> LanguageModelSpec:
    """Gives a small language model of a family, with its tokenizer's files in a folder.

    As with the real ones, `<image>` fits into the Qwen2 table and not into the Llama one.
    """
    family, rows = {"qwen2_0_5b": ("qwen2", 320), "smollm_360m": ("llama", 257)}[name]
    save_bytes_tokenizer(folder / "bytes")
    return LanguageModelSpec(
        name=name,
        config={"model_type": family, "vocab_size": rows, **_BODY},
        tokenizer=str(folder / "bytes"),
        hidden=32,
        context_length=512,
        mparams=0.03,
    )


LANGUAGES = ("qwen2_0_5b", "smollm_360m")


def save_bytes_tokenizer(directory: Path) -> None:
    """Writes a tokenizer whose tokens are bytes: 0 is the end token, there is no padding."""
    if directory.is_dir():
        return
    symbols = [END, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(symbols)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, bos_token=END)
    fast.chat_template = "shipped with the weights"
    fast.save_pretrained(directory)


def batch(model: Any, spec: TowerSpec, images: int = 2) -> dict[str, torch.Tensor]:
    """Makes inputs: a row of image tokens and words per image, or words alone."""
    generator = torch.Generator().manual_seed(5)
    rows = max(images, 1)
    ids = torch.randint(1, 250, (rows, 12), generator=generator)
    found: dict[str, torch.Tensor] = {}
    if images:
        shape = (images, 3, spec.image_px, spec.image_px)
        found["pixel_values"] = torch.randn(shape, generator=generator)
        fill = torch.full((images, model.config.image_seq_length), model.config.image_token_id)
        ids = torch.cat([ids[:, :3], fill, ids[:, 3:]], dim=1)
    labels = ids.masked_fill(ids == model.config.image_token_id, -100)
    labels[:, :3] = -100
    return found | {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
