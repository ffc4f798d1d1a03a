"""A Swin small enough for the miniature world: timm names none below Swin-T's 28 million.

Its code is timm's; only widths and depths are small. timm finds it by name once this is imported.
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.swin_transformer import SwinTransformer, checkpoint_filter_fn

# timm's decorator looks for this name in the model's module.
default_cfgs = generate_default_cfgs(
    {
        "swin_mini_patch4_window7_64.none": {
            "url": "",
            "num_classes": 1000,
            "input_size": (3, 64, 64),
            "pool_size": (2, 2),
            "first_conv": "patch_embed.proj",
            "classifier": "head.fc",
        }
    }
)


@register_model
def swin_mini_patch4_window7_64(pretrained: bool = False, **kwargs: Any) -> SwinTransformer:
    """Builds Swin-T's stages at a quarter of the width, with two blocks each."""
    sizes = {
        "patch_size": 4,
        "window_size": 7,
        "embed_dim": 24,
        "depths": (2, 2, 2, 2),
        "num_heads": (1, 2, 4, 8),
    }
    return build_model_with_cfg(
        SwinTransformer,
        "swin_mini_patch4_window7_64",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True},
        **(sizes | kwargs),
    )
