"""Hierarchical timm trunks as vision towers of transformers' Llava.

A checkpoint whose `vision_config` says `token_timm` opens with plain transformers after
`import kdscale.models.token_timm`, which registers the two classes; nothing else of kdscale is
loaded by that import.

Shape suffixes: B batch, C channels, H height, W width, T tokens, D trunk width.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModel, TimmWrapperConfig, TimmWrapperModel
from transformers.models.timm_wrapper.modeling_timm_wrapper import TimmWrapperModelOutput

import kdscale.models.mini_timm  # noqa: F401  # pyright: ignore[reportUnusedImport]


class TokenTimmConfig(TimmWrapperConfig):
    """Config of `TokenTimmModel`, with what Llava asks of a vision config.

    Attributes:
        hidden_size: Width of the chosen stage.
        image_size: Side of the input.
        patch_size: Total stride of the chosen stage, so that (image_size / patch_size)^2 tokens
            come out.
        num_hidden_layers: Stages whose features are given, always 1.
        num_channels: Channels of the input.
        stage: Index of the stage that gives the tokens, counted from the end (-1 is the last).
    """

    model_type = "token_timm"

    hidden_size: int = 768
    image_size: int = 224
    patch_size: int = 32
    num_hidden_layers: int = 1
    num_channels: int = 3
    stage: int = -1


class TokenTimmModel(TimmWrapperModel):
    """A timm trunk whose feature maps come out as rows of tokens."""

    config_class = TokenTimmConfig
    main_input_name = "pixel_values"

    def train(self, mode: bool = True) -> TokenTimmModel:
        """Stays in evaluation mode while frozen: batch norm would move its statistics."""
        return super().train(mode and any(p.requires_grad for p in self.parameters()))

    def forward(self, pixel_values: Any, **_: Any) -> TimmWrapperModelOutput:
        """Computes the tokens of the configured stage.

        Args:
            pixel_values: (B, C, H, W) normalised pixels, or (B, T, D) features that were computed
                before, which pass through.

        Returns:
            `last_hidden_state` (B, T, D), and `hidden_states` with the same as only entry.
        """
        tokens_BTD = pixel_values.to(self.device, self.dtype)
        if tokens_BTD.ndim == 4:
            trunk: Any = self.timm_model
            (map_BDHW,) = trunk.forward_intermediates(
                tokens_BTD,
                indices=[len(trunk.feature_info) + self.config.stage],
                stop_early=True,
                intermediates_only=True,
            )
            tokens_BTD = map_BDHW.flatten(2).transpose(1, 2)
        return TimmWrapperModelOutput(last_hidden_state=tokens_BTD, hidden_states=(tokens_BTD,))


AutoConfig.register("token_timm", TokenTimmConfig)
AutoModel.register(TokenTimmConfig, TokenTimmModel)
