"""The roles that recipes name, at the paper's scale: towers, language models and data.

One table per kind, plain data: nothing here imports torch. Every value can be replaced field by
field (`TEACHERS["clip_b16"].replace(weights="/models/clip_b16")`) or by a spec of one's own.

Parameter counts and GFLOP (2 per multiply-add) are of this code's own build; `zero_shot_top1` is
the accuracy that open_clip publishes for the weights on the ImageNet validation set. A teacher
that misses it by more than 0.1 points is loaded or preprocessed wrongly.
"""

from __future__ import annotations

from typing import Any

from kdscale.core.config import DataSpec, TowerFacts, TowerSpec, ZeroShotSpec
from kdscale.core.vlm_config import LanguageModelSpec

SIGLIP_MEAN = (0.5, 0.5, 0.5)
SIGLIP_STD = (0.5, 0.5, 0.5)


# `openai` and `dfn2b` weights need QuickGELU, hence the `-quickgelu` configs. The tags stand for
# hub repositories: timm/vit_*_clip_224.openai, apple/DFN2B-CLIP-ViT-*, timm/ViT-SO400M-*.
TEACHERS: dict[str, TowerSpec] = {
    "clip_b16": TowerSpec(
        name="CLIP ViT-B/16",
        clip_config="ViT-B-16-quickgelu",
        weights="openai",
        embed_dim=512,
        width=768,
        patch_px=16,
        facts=TowerFacts(
            image_mparams=86.19,
            text_mparams=63.43,
            image_gflop=35.13,
            text_gflop=5.96,
            zero_shot_top1=68.34,
        ),
    ),
    "clip_l14": TowerSpec(
        name="CLIP ViT-L/14",
        clip_config="ViT-L-14-quickgelu",
        weights="openai",
        embed_dim=768,
        width=1024,
        patch_px=14,
        facts=TowerFacts(
            image_mparams=303.97,
            text_mparams=123.65,
            image_gflop=162.03,
            text_gflop=13.30,
            zero_shot_top1=75.54,
        ),
    ),
    "siglip_so400m": TowerSpec(
        name="SigLIP SO400M/14 384 px",
        clip_config="ViT-SO400M-14-SigLIP-384",
        weights="webli",
        image_px=384,
        mean=SIGLIP_MEAN,
        std=SIGLIP_STD,
        resize="squash",
        tokenizer="siglip",
        context_length=64,
        embed_dim=1152,
        width=1152,
        patch_px=14,
        facts=TowerFacts(
            image_mparams=428.23,
            text_mparams=449.73,
            image_gflop=670.35,
            text_gflop=53.13,
            zero_shot_top1=83.08,
        ),
    ),
    "dfn_b16": TowerSpec(
        name="DFN ViT-B/16",
        clip_config="ViT-B-16-quickgelu",
        weights="dfn2b",
        embed_dim=512,
        width=768,
        patch_px=16,
        facts=TowerFacts(
            image_mparams=86.19,
            text_mparams=63.43,
            image_gflop=35.13,
            text_gflop=5.96,
            zero_shot_top1=76.24,
        ),
    ),
    "dfn_l14": TowerSpec(
        name="DFN ViT-L/14",
        clip_config="ViT-L-14-quickgelu",
        weights="dfn2b",
        embed_dim=768,
        width=1024,
        patch_px=14,
        facts=TowerFacts(
            image_mparams=303.97,
            text_mparams=123.65,
            image_gflop=162.03,
            text_gflop=13.30,
            zero_shot_top1=81.41,
        ),
    ),
}


def student_config(vision_cfg: dict[str, Any]) -> dict[str, Any]:
    """Returns an open_clip config: the given image tower beside CLIP-KD's student text tower.

    Args:
        vision_cfg: open_clip's `vision_cfg`, without `image_size` (224).
    """
    return {
        "embed_dim": 512,
        "vision_cfg": {"image_size": 224, **vision_cfg},
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": 384,
            "heads": 6,
            "layers": 12,
        },
    }


def timm_config(model_name: str) -> dict[str, Any]:
    """Returns the config of a student whose image tower is a timm trunk plus a linear projection.

    Drop path is written out because timm's own default is not 0 everywhere (Swin: 0.1).

    Args:
        model_name: A model that timm builds.
    """
    return student_config(
        {
            "timm_model_name": model_name,
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "linear",
            "timm_drop_path": 0.0,
        }
    )


def _facts(image_mparams: float, image_gflop: float) -> TowerFacts:
    """Facts of a student; the text tower is the same for all."""
    return TowerFacts(
        image_mparams=image_mparams, image_gflop=image_gflop, text_mparams=40.49, text_gflop=3.38
    )


STUDENTS: dict[str, TowerSpec] = {
    "vit_t16": TowerSpec(
        name="ViT-T/16",
        clip_config=student_config(
            {"layers": 12, "width": 192, "head_width": 64, "patch_size": 16}
        ),
        width=192,
        patch_px=16,
        facts=_facts(5.62, 2.51),
    ),
    # The next sizes of the same tower, beside the same text tower: what if the student were larger?
    "vit_s16": TowerSpec(
        name="ViT-S/16",
        clip_config=student_config(
            {"layers": 12, "width": 384, "head_width": 64, "patch_size": 16}
        ),
        width=384,
        patch_px=16,
        facts=_facts(21.86, 9.20),
    ),
    "vit_b16": TowerSpec(
        name="ViT-B/16",
        clip_config=student_config(
            {"layers": 12, "width": 768, "head_width": 64, "patch_size": 16}
        ),
        width=768,
        patch_px=16,
        facts=_facts(86.19, 35.13),
    ),
    "mobilevit_s": TowerSpec(
        name="MobileViT-S",
        clip_config=timm_config("mobilevit_s"),
        width=640,
        facts=_facts(5.27, 3.04),
    ),
    "swin_t": TowerSpec(
        name="Swin-T",
        clip_config=timm_config("swin_tiny_patch4_window7_224"),
        width=768,
        facts=_facts(27.91, 8.98),
    ),
    "convnext_t": TowerSpec(
        name="ConvNeXt-T",
        clip_config=timm_config("convnext_tiny"),
        width=768,
        facts=_facts(28.21, 8.91),
    ),
    # CLIP-KD's further students. Its MobileNetV3 is left out: timm now counts the features before
    # that trunk's last convolution, and open_clip's linear projection no longer fits.
    "efficientnet_b0": TowerSpec(
        name="EfficientNet-B0",
        clip_config=timm_config("efficientnet_b0"),
        width=1280,
        facts=_facts(4.66, 0.77),
    ),
    "resnet18": TowerSpec(
        name="ResNet-18",
        clip_config=timm_config("resnet18"),
        width=512,
        facts=_facts(11.44, 3.63),
    ),
}

# The configs are those of the published models and serve random weights of true size; weights from
# the hub bring their own.
LANGUAGE_MODELS: dict[str, LanguageModelSpec] = {
    "qwen2_0_5b": LanguageModelSpec(
        name="Qwen2-0.5B",
        weights="Qwen/Qwen2-0.5B",
        config={
            "model_type": "qwen2",
            "vocab_size": 151_936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "max_position_embeddings": 131_072,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "bos_token_id": 151_643,
            "eos_token_id": 151_643,
        },
        hidden=896,
        context_length=131072,
        mparams=494.03,
    ),
    "smollm_360m": LanguageModelSpec(
        name="SmolLM-360M",
        weights="HuggingFaceTB/SmolLM-360M",
        config={
            "model_type": "llama",
            "vocab_size": 49_152,
            "hidden_size": 960,
            "intermediate_size": 2560,
            "num_hidden_layers": 32,
            "num_attention_heads": 15,
            "num_key_value_heads": 5,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
        hidden=960,
        context_length=2048,
        mparams=361.82,
    ),
}

# Paths are the user's: `DATA["cc12m"].replace(urls=".../cc12m-train-{0000..2175}.tar")`. The
# counts serve plans until a manifest says better. open_clip's tars of CC12M hold 10,968,539 pairs;
# the paper speaks of 9M, so its download had lost more links.
DATA: dict[str, DataSpec] = {
    "cc12m": DataSpec(name="CC12M", num_samples=10_968_539),
    # Mixes, made by `kdscale data mix`.
    "cc12m_bunny": DataSpec(name="CC12M + Bunny LAION-2M", num_samples=12_968_539),
    "cc12m_llava": DataSpec(name="CC12M + LLaVA-Pretrain", num_samples=11_526_667),
    "bunny_laion_2m": DataSpec(name="Bunny LAION-2M", num_samples=2_000_000),
    "llava_pretrain_558k": DataSpec(name="LLaVA-Pretrain 558k", num_samples=558_128),
    "llava_mix_665k": DataSpec(name="LLaVA-1.5 mix 665k", num_samples=665_298),
    "bunny_695k": DataSpec(name="Bunny 695k", num_samples=695_000),
}

ZERO_SHOT: dict[str, ZeroShotSpec] = {
    "imagenet": ZeroShotSpec(
        name="ImageNet-1k validation",
        data=DataSpec(name="imagenet_val", num_samples=50_000, max_bad_fraction=0.0),
        classnames="imagenet",
        templates="openai",
    ),
}
