"""The roles that recipes name, in miniature: the same family, small enough for two CPU cores.

The teachers differ as the real ones do: a base and a large CLIP tower, a SigLIP-like one with
more pixels, its own tokenizer and the sigmoid loss, and DFN-like ones trained on cleaner
captions. A miniature teacher has no weights to download: its entry is the recipe that trains it.
"""

from __future__ import annotations

from typing import Any

from kdscale.core.config import DataSpec, Distill, MiniWorld, TowerSpec, ZeroShotSpec

BPE_VOCAB = 730
SP_VOCAB = 125
SIGLIP_MEAN = (0.5, 0.5, 0.5)
SIGLIP_STD = (0.5, 0.5, 0.5)
DATA_PX = 64


def text_config(width: int, layers: int, tokenizer: str = "mini_bpe") -> dict[str, Any]:
    """Returns an open_clip `text_cfg`.

    Args:
        width: Width of the transformer; heads are 32 wide.
        layers: Its depth.
        tokenizer: `mini_bpe` gives CLIP's causal tower, `mini_sp` SigLIP's bidirectional one.
    """
    config: dict[str, Any] = {
        "context_length": 24,
        "vocab_size": BPE_VOCAB,
        "width": width,
        "heads": width // 32,
        "layers": layers,
    }
    if tokenizer == "mini_sp":
        config |= {
            "vocab_size": SP_VOCAB,
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
            "norm_kwargs": {"eps": 1e-6},
        }
    return config


def vit(
    name: str,
    *,
    px: int,
    patch: int,
    width: int,
    layers: int,
    embed_dim: int,
    text_width: int,
    text_layers: int,
    tokenizer: str = "mini_bpe",
) -> TowerSpec:
    """Returns a pair whose image tower is open_clip's ViT.

    Args:
        name: What people call it.
        px: Side of the image.
        patch: Side of a patch.
        width: Width of the image tower; heads are 32 wide, or 16 where that does not divide it.
        layers: Depth of the image tower.
        embed_dim: Width of the shared space.
        text_width: Width of the text tower.
        text_layers: Depth of the text tower.
        tokenizer: `mini_bpe`, or `mini_sp` for a SigLIP-like pair.
    """
    vision = {"image_size": px, "patch_size": patch, "width": width, "layers": layers}
    tower: dict[str, Any] = {
        "embed_dim": embed_dim,
        "vision_cfg": {**vision, "head_width": 32 if width % 32 == 0 else 16},
        "text_cfg": text_config(text_width, text_layers, tokenizer),
    }
    siglip = tokenizer == "mini_sp"
    if siglip:
        tower["init_logit_bias"] = -10
        tower["custom_text"] = True
    return TowerSpec(
        name=name,
        clip_config=tower,
        image_px=px,
        tokenizer=tokenizer,
        context_length=24,
        embed_dim=embed_dim,
        width=width,
        patch_px=patch,
        **({"mean": SIGLIP_MEAN, "std": SIGLIP_STD, "resize": "squash"} if siglip else {}),
    )


def hierarchical(name: str, model_name: str, width: int) -> TowerSpec:
    """Returns a pair whose image tower is a timm trunk and a linear projection.

    Args:
        name: What people call it.
        model_name: A model that timm builds.
        width: Width of the trunk's last features.
    """
    return TowerSpec(
        name=name,
        clip_config={
            "embed_dim": 64,
            "vision_cfg": {
                "image_size": 64,
                "timm_model_name": model_name,
                "timm_model_pretrained": False,
                "timm_pool": "",
                "timm_proj": "linear",
                "timm_drop_path": 0.0,
            },
            "text_cfg": text_config(64, 2),
        },
        image_px=64,
        tokenizer="mini_bpe",
        context_length=24,
        embed_dim=64,
        width=width,
    )


def pretraining(tower: TowerSpec, data: DataSpec, **fields: Any) -> Distill:
    """Returns the recipe that trains a miniature teacher."""
    settings: dict[str, Any] = {
        "loss": "clip",
        "epochs": 3,
        "global_batch_size": 128,
        "lr": 2e-3,
        "warmup_steps": 40,
        "zero_shot": "imagenet",
    }
    return Distill(student=tower, data=data, **(settings | fields))


def world(name: str, seed: int, num_samples: int, **fields: Any) -> DataSpec:
    """Returns training data that are to be drawn."""
    drawn = MiniWorld(seed=seed, num_samples=num_samples, image_px=DATA_PX, **fields)
    return DataSpec(name=name, mini=drawn, num_samples=num_samples)


WEB = world("mini web pairs", 1, 8192, caption_noise=0.2)
FILTERED = world("mini filtered pairs", 2, 8192)
WEBLI = world("mini WebLI", 3, 8192, caption_noise=0.1)

SMALL_TEXT = {"text_width": 64, "text_layers": 2}
LARGE_TEXT = {"text_width": 96, "text_layers": 2}
BASE = {"px": 48, "patch": 16, "layers": 4, "embed_dim": 64, **SMALL_TEXT}
LARGE = {"px": 56, "patch": 14, "layers": 4, "embed_dim": 96, **LARGE_TEXT}

MINI_TEACHERS: dict[str, Distill] = {
    "clip_b16": pretraining(vit("mini CLIP B/16", width=96, **BASE), WEB, epochs=4),
    "clip_l14": pretraining(vit("mini CLIP L/14", width=128, **LARGE), WEB, epochs=5),
    "siglip_so400m": pretraining(
        vit(
            "mini SigLIP 60 px",
            px=60,
            patch=10,
            width=160,
            layers=3,
            embed_dim=144,
            text_width=128,
            text_layers=2,
            tokenizer="mini_sp",
        ),
        WEBLI,
        loss={"sigmoid": 1.0},
        epochs=4,
    ),
    "dfn_b16": pretraining(vit("mini DFN B/16", width=112, **BASE), FILTERED, epochs=4),
    "dfn_l14": pretraining(vit("mini DFN L/14", width=144, **LARGE), FILTERED, epochs=5),
}
MINI_STUDENTS: dict[str, TowerSpec] = {
    "vit_t16": vit("mini ViT-T/16", width=64, **BASE | {"layers": 3}),
    "mobilevit_s": hierarchical("mini MobileViT", "mobilevit_xxs", 320),
    "swin_t": hierarchical("Swin-T at 64 px", "swin_tiny_patch4_window7_224", 768),
    "convnext_t": hierarchical("mini ConvNeXt", "test_convnext2", 128),
}
MINI_DATA: dict[str, DataSpec] = {
    "cc12m": world("mini CC12M", 11, 8192, caption_noise=0.3),
    "bunny_laion_2m": world("mini LAION-2M", 12, 2048, caption_noise=0.2),
    "llava_pretrain_558k": world("mini LLaVA-Pretrain", 13, 512, caption_noise=0.0),
}
MINI_ZERO_SHOT: dict[str, ZeroShotSpec] = {
    "imagenet": ZeroShotSpec(
        name="mini held-out compositions",
        data=DataSpec(
            name="mini evaluation",
            mini=MiniWorld(split="eval", num_samples=2000, image_px=DATA_PX, seed=99),
            num_samples=2000,
            max_bad_fraction=0.0,
        ),
        classnames="mini",
        templates="mini",
    ),
}
# What a recipe at the paper's sizes (32 epochs, batch 4096, 2000 warm-up steps, lr 5e-4) becomes.
MINI_SIZES: dict[str, Any] = {
    "batch_divisor": 32,
    "epoch_divisor": 16,
    "warmup_divisor": 100,
    "lr_factor": 4.0,
}
