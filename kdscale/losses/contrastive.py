"""Contrastive losses over a global batch: softmax (CLIP) and sigmoid (SigLIP).

Shape suffixes: N global batch, D width of the features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Scale = Tensor | float


def similarity_logits(anchor_ND: Tensor, key_ND: Tensor, scale: Scale) -> Tensor:
    """Computes scaled dot products between all anchors and all keys.

    Args:
        anchor_ND: Unit features, one row per sample.
        key_ND: Unit features of the other side, matching rows in the same order.
        scale: Multiplied into the products (an inverse temperature, not its logarithm).

    Returns:
        (N, N) logits, anchors along rows.
    """
    return scale * (anchor_ND @ key_ND.T)


def symmetric_cross_entropy(
    image_to_text_NN: Tensor, text_to_image_NN: Tensor | None = None
) -> Tensor:
    """Computes the mean of both directions' cross-entropies with the diagonal as target.

    Args:
        image_to_text_NN: Logits, images along rows.
        text_to_image_NN: Logits, texts along rows; the transpose of the other if None.

    Returns:
        Scalar, in nats; ln N where all logits are equal.

    Source:
        Radford et al. 2021 (CLIP); the same form serves ICL and AFD in CLIP-KD.
    """
    reverse_NN = image_to_text_NN.T if text_to_image_NN is None else text_to_image_NN
    target_N = torch.arange(image_to_text_NN.shape[0], device=image_to_text_NN.device)
    forward = F.cross_entropy(image_to_text_NN, target_N)
    return (forward + F.cross_entropy(reverse_NN, target_N)) / 2


def sigmoid_loss(logits_NN: Tensor) -> Tensor:
    """Computes the pairwise sigmoid loss, summed over pairs and averaged over rows.

    Args:
        logits_NN: Scaled and biased similarities; the diagonal holds the matching pairs.

    Returns:
        Scalar, in nats.

    Source:
        Zhai et al. 2023 (SigLIP), equation 1.
    """
    num_rows = logits_NN.shape[0]
    sign_NN = 2 * torch.eye(num_rows, dtype=logits_NN.dtype, device=logits_NN.device) - 1
    return -F.logsigmoid(sign_NN * logits_NN).sum() / num_rows
