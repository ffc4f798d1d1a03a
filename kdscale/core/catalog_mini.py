"""The roles that recipes name, in miniature: the same family, small enough for two CPU cores.

The teachers differ as the real ones do: a base and a large CLIP tower, a SigLIP-like one with
more pixels, its own tokenizer and the sigmoid loss, and DFN-like ones trained on cleaner
captions. A miniature teacher has no weights to download: its entry is the recipe that trains it.
"""

from __future__ import annotations

from typing import Any

from kdscale.core.config import (
    OPENAI_MEAN,
    OPENAI_STD,
    DataSpec,
    Distill,
    MiniWorld,
    TowerFacts,
    TowerSpec,
    ZeroShotSpec,
)
from kdscale.core.vlm_config import Language, LanguageModelSpec, QuestionsSpec, SuiteSpec

BPE_VOCAB = 730
SP_VOCAB = 125
LANGUAGE_VOCAB = 768  # rows, a multiple of 64; the tokens are fewer
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
        facts=_facts(px, patch, (width, layers), (text_width, text_layers), embed_dim, siglip),
        mean=SIGLIP_MEAN if siglip else OPENAI_MEAN,
        std=SIGLIP_STD if siglip else OPENAI_STD,
        resize="squash" if siglip else "shortest",
    )


def _facts(
    px: int,
    patch: int,
    image: tuple[int, int],
    text: tuple[int, int],
    embed_dim: int,
    siglip: bool,
) -> TowerFacts:
    """Counts parameters and work from the dimensions; biases and gains are left out."""
    grid, vocab = (px // patch) ** 2, SP_VOCAB if siglip else BPE_VOCAB
    pixels = 3 * patch * patch * image[0]
    heads = [width * embed_dim for width, _ in (image, text)]
    mparams = [12 * width * width * layers / 1e6 for width, layers in (image, text)]
    context = text_config(text[0], text[1])["context_length"]
    return TowerFacts(
        image_mparams=mparams[0] + (pixels + (grid + 2) * image[0] + heads[0]) / 1e6,
        text_mparams=mparams[1] + ((vocab + context) * text[0] + heads[1]) / 1e6,
        image_gflop=_gflop(grid + 1, *image) + 2e-9 * (grid * pixels + heads[0]),
        text_gflop=_gflop(context, *text) + 2e-9 * heads[1],
    )


def _gflop(tokens: int, width: int, layers: int) -> float:
    """Returns a transformer's forward work: 12 w^2 weights a token, and attention."""
    return 2e-9 * layers * tokens * (12 * width * width + 2 * tokens * width)


def hierarchical(name: str, model_name: str, width: int, mparams: float, gflop: float) -> TowerSpec:
    """Returns a pair whose image tower is a timm trunk and a linear projection.

    Args:
        name: What people call it.
        model_name: A model that timm builds.
        width: Width of the trunk's last features.
        mparams: Measured parameters of the image tower, in millions.
        gflop: Measured forward work of the image tower.
    """
    text = _facts(16, 16, (64, 1), (64, 2), 64, siglip=False)
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
        facts=text.replace(image_mparams=mparams, image_gflop=gflop),
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

SMALL_TEXT: dict[str, Any] = {"text_width": 64, "text_layers": 2}
LARGE_TEXT: dict[str, Any] = {"text_width": 96, "text_layers": 2}
BASE: dict[str, Any] = {"px": 48, "patch": 16, "layers": 4, "embed_dim": 64, **SMALL_TEXT}
TINY: dict[str, Any] = {**BASE, "layers": 3}
LARGE: dict[str, Any] = {"px": 42, "patch": 14, "layers": 4, "embed_dim": 96, **LARGE_TEXT}

MINI_TEACHERS: dict[str, Distill] = {
    "clip_b16": pretraining(vit("mini CLIP B/16", width=96, **BASE), WEB, epochs=2),
    "clip_l14": pretraining(vit("mini CLIP L/14", width=160, **LARGE), WEB, epochs=5, lr=1.5e-3),
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
    "dfn_b16": pretraining(vit("mini DFN B/16", width=112, **BASE), FILTERED, epochs=2),
    "dfn_l14": pretraining(vit("mini DFN L/14", width=192, **LARGE), FILTERED, epochs=5, lr=1.5e-3),
}
MINI_STUDENTS: dict[str, TowerSpec] = {
    "vit_t16": vit("mini ViT-T/16", width=64, **TINY),
    "vit_s16": vit("mini ViT-S/16", width=96, **TINY),
    "vit_b16": vit("mini ViT-B/16", width=128, **TINY),
    "mobilevit_s": hierarchical("mini MobileViT", "mobilevit_xxs", 320, 0.972, 0.0418),
    "swin_t": hierarchical("mini Swin", "swin_mini_patch4_window7_64", 192, 1.297, 0.0311),
    "convnext_t": hierarchical("mini ConvNeXt", "test_convnext2", 128, 0.357, 0.0162),
}
MINI_DATA: dict[str, DataSpec] = {
    "cc12m": world("mini CC12M", 11, 8192, caption_noise=0.3),
    # The same captions and as many more as the other set has.
    "cc12m_bunny": world("mini CC12M + LAION-2M", 11, 8192 + 2048, caption_noise=0.3),
    "cc12m_llava": world("mini CC12M + LLaVA-Pretrain", 11, 8192 + 512, caption_noise=0.3),
    "bunny_laion_2m": world("mini LAION-2M", 12, 2048, caption_noise=0.2, content="pretrain"),
    "llava_pretrain_558k": world("mini LLaVA-Pretrain", 13, 512, content="pretrain"),
    "llava_mix_665k": world("mini LLaVA mix", 14, 8192, content="instruct"),
    "bunny_695k": world("mini Bunny mix", 15, 8192, content="instruct"),
}
_LANGUAGE: dict[str, Any] = {
    "vocab_size": LANGUAGE_VOCAB,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "initializer_range": 0.1,  # with the usual 0.02 a model this narrow learns far slower
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_TEXT = (
    MiniWorld(content="instruct", num_samples=4096, image_px=DATA_PX, seed=16),
    MiniWorld(content="captions", num_samples=4096, image_px=DATA_PX, seed=17),
)
_LANGUAGE_SPECS: dict[str, LanguageModelSpec] = {
    "qwen2_0_5b": LanguageModelSpec(
        name="mini Qwen2",
        config={
            **_LANGUAGE,
            "model_type": "qwen2",
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 384,
        },
        tokenizer="mini_lm",
        hidden=128,
        context_length=512,
        mparams=0.887,
    ),
    "smollm_360m": LanguageModelSpec(
        name="mini SmolLM",
        config={
            **_LANGUAGE,
            "model_type": "llama",
            "hidden_size": 120,
            "num_hidden_layers": 5,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "intermediate_size": 320,
        },
        tokenizer="mini_lm",
        hidden=120,
        context_length=512,
        mparams=0.861,
    ),
}
MINI_LANGUAGE_MODELS: dict[str, Language] = {
    role: Language(llm=spec, data=_TEXT, num_steps=128) for role, spec in _LANGUAGE_SPECS.items()
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
    "epoch_divisor": 32,
    "warmup_divisor": 100,
    "lr_factor": 4.0,
}
_ASKED = MiniWorld(split="eval", content="instruct", num_samples=2800, image_px=DATA_PX, seed=98)
MINI_QUESTIONS: dict[str, QuestionsSpec] = {
    "scenes": QuestionsSpec(
        name="mini questions",
        mini=_ASKED,
        max_new_tokens=8,
    ),
}
MINI_SUITES: dict[str, SuiteSpec] = {
    "paper16": SuiteSpec(name="paper16 in miniature", mini=_ASKED, num_items=192, batch_size=32)
}
_VLM_SIZES: dict[str, Any] = {
    "precision": "fp32",
    "global_batch_size": 32,
    "micro_batch_size": 32,
    "group_size": 32,
    "max_length": 512,
}
MINI_VLM_SIZES: dict[str, dict[str, Any]] = {
    "pretrain": {"fields": {**_VLM_SIZES, "epochs": 2}, "lr_factor": 2.0},
    "finetune": {
        "fields": {**_VLM_SIZES, "max_steps": 192},  # of the 256 that its 8,192 samples make
        "lr_factor": 100.0,
        "lora_lr_factor": 10.0,
        "lora_divisor": 8,
    },
}
