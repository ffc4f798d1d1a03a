"""Drop path whose draws depend on the seed, the step and the sample, and on nothing else.

Whatever the number of workers, the micro-batches or the replays, a sample of a step loses the same
residual branches.
"""

from __future__ import annotations

import hashlib

import torch
from open_clip.transformer import VisionTransformer
from timm.layers.drop import DropPath
from torch import Tensor, nn

from kdscale.core.types import ConfigError, MissingInput


class SampledDropPath(nn.Module):
    """Drops residual branches per sample, by draws that are set from outside.

    Attributes:
        drop_prob: Probability of dropping.
        scale_by_keep: Whether kept branches are divided by the probability of keeping.
        layer: Position among the model's drop-path layers; part of the draw.
    """

    def __init__(self, drop_prob: float, scale_by_keep: bool, layer: int) -> None:
        super().__init__()
        self.drop_prob = drop_prob
        self.scale_by_keep = scale_by_keep
        self.layer = layer
        self.draws: tuple[int, int, Tensor, int] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Drops rows of x, whose first dimension is samples, or samples times equal parts.

        MobileViT's inner blocks see each sample as several rows; each has a draw of its own.
        """
        if not self.training:
            return x
        if self.draws is None:
            raise MissingInput("no draws for drop path; call set_draws before the forward pass")
        seed, step, rows, global_batch = self.draws
        parts, rest = divmod(x.shape[0], len(rows))
        if rest or not parts:
            raise ConfigError(
                f"drop path saw {x.shape[0]} rows for {len(rows)} samples; set_draws must name "
                "the rows of this forward pass"
            )
        generator = torch.Generator().manual_seed(_stable_seed(seed, step, self.layer))
        uniform = torch.rand(global_batch, parts, generator=generator)[rows].flatten()
        keep_prob = 1.0 - self.drop_prob
        scale = 1.0 / keep_prob if self.scale_by_keep else 1.0
        mask = (uniform < keep_prob).to(device=x.device, dtype=x.dtype).mul_(scale)
        return x * mask.view(-1, *[1] * (x.ndim - 1))

    def extra_repr(self) -> str:
        """Shows the rate."""
        return f"drop_prob={self.drop_prob:.3f}"


class SampledPatchDropout(nn.Module):
    """Keeps a fixed share of an image's patch tokens, by draws that are set from outside.

    Stands where open_clip's ViT has its own patch dropout, and does nothing unless `active`.

    Attributes:
        keep_share: Share of the patches that stay; MFD of CLIP-KD keeps a quarter.
    """

    LAYER = -1

    def __init__(self, keep_share: float = 0.25) -> None:
        super().__init__()
        self.keep_share = keep_share
        self.active = False
        self.draws: tuple[int, int, Tensor, int] | None = None

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Returns the class token and the kept patch tokens, in their order."""
        if not self.active:
            return x_BTD
        if self.draws is None:
            raise MissingInput("no draws for masking; call set_draws before the forward pass")
        seed, step, rows, global_batch = self.draws
        num_patches = x_BTD.shape[1] - 1
        generator = torch.Generator().manual_seed(_stable_seed(seed, step, self.LAYER))
        uniform = torch.rand(global_batch, num_patches, generator=generator)[rows]
        num_kept = max(1, round(self.keep_share * num_patches))
        kept = uniform.topk(num_kept, dim=1).indices.sort(dim=1).values.to(x_BTD.device)
        index = torch.cat([torch.zeros_like(kept[:, :1]), kept + 1], dim=1)
        return x_BTD.gather(1, index[..., None].expand(-1, -1, x_BTD.shape[2]))


def mask_patches(model: nn.Module) -> SampledPatchDropout:
    """Gives a CLIP's ViT a patch mask, in place.

    Raises:
        ConfigError: The image tower is not open_clip's ViT.
    """
    visual = getattr(model, "visual", None)
    if not isinstance(visual, VisionTransformer):
        raise ConfigError(
            f"mfd masks the patches of open_clip's ViT, this image tower is "
            f"{type(visual).__name__}; use fd, or a ViT student"
        )
    mask = SampledPatchDropout()
    visual.patch_dropout = mask  # pyright: ignore[reportAttributeAccessIssue]
    return mask


def _stable_seed(seed: int, step: int, layer: int) -> int:
    """A seed that is the same in every process and Python version."""
    digest = hashlib.blake2b(f"{seed}:{step}:{layer}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def sampled_drop_path(model: nn.Module) -> list[SampledDropPath]:
    """Replaces every active timm `DropPath` of a model, in place.

    Args:
        model: Its state dict is unaffected.

    Returns:
        The new layers, in the model's order; empty where nothing drops.

    Raises:
        ConfigError: The model also has active dropout, which would draw from global state.
    """
    layers: list[SampledDropPath] = []
    for parent_name, parent in list(model.named_modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.modules.dropout._DropoutNd) and child.p > 0:
                raise ConfigError(
                    f"{parent_name}.{name} is dropout with p={child.p}; its draws would depend "
                    "on the workers, so towers must be built without it"
                )
            if isinstance(child, DropPath) and child.drop_prob > 0:
                layers.append(SampledDropPath(child.drop_prob, child.scale_by_keep, len(layers)))
                setattr(parent, name, layers[-1])
    return layers


def set_draws(
    model: nn.Module, seed: int, step: int, rows: slice | Tensor, global_batch: int
) -> None:
    """Sets the draws of the next forward passes.

    Args:
        model: A model after `sampled_drop_path`.
        seed: The run's seed.
        step: The optimizer step.
        rows: Which rows of the global batch the forward pass sees, in its order.
        global_batch: Samples of the global batch.
    """
    indices = torch.arange(global_batch)[rows.cpu() if isinstance(rows, Tensor) else rows]
    for module in model.modules():
        if isinstance(module, SampledDropPath | SampledPatchDropout):
            module.draws = (seed, step, indices, global_batch)
