"""Zero-shot classification: class prompts, classifier, predictions.

Shape suffixes: B batch, C classes, D embedding, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from kdscale.core.types import TrainingDiverged

Tokenizer = Callable[[list[str]], Tensor]


def class_prompts(classnames: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Returns the prompts of all classes, class by class.

    Args:
        classnames: Names in label order.
        templates: Format strings with one `{}`.
    """
    return [template.format(name) for name in classnames for template in templates]


@torch.no_grad()
def classifier(
    model: nn.Module,
    tokenize: Tokenizer,
    classnames: Sequence[str],
    templates: Sequence[str],
    *,
    batch_size: int = 256,
) -> Tensor:
    """Builds the text classifier: normalise each prompt, average over templates, normalise.

    Args:
        model: A CLIP with `encode_text`.
        tokenize: Maps texts to (B, T) token ids.
        classnames: Names in label order.
        templates: Format strings with one `{}`.
        batch_size: Prompts per forward pass.

    Returns:
        (C, D) unit vectors in float32.

    Source:
        CLIP's prompt ensemble (Radford et al. 2021), as in open_clip.
    """
    device = next(model.parameters()).device
    prompts = class_prompts(classnames, templates)
    parts: list[Tensor] = []
    for start in range(0, len(prompts), batch_size):
        tokens_BT = tokenize(prompts[start : start + batch_size]).to(device)
        parts.append(normalize(model.encode_text(tokens_BT).float(), dim=-1))  # pyright: ignore
    stacked = torch.cat(parts).view(len(classnames), len(templates), -1)
    return normalize(stacked.mean(dim=1), dim=-1)


def predict(embedding_BD: Tensor, classifier_CD: Tensor) -> Tensor:
    """Returns the class of the largest cosine; ties go to the lowest label.

    Args:
        embedding_BD: Raw image embeddings.
        classifier_CD: Unit class vectors.

    Returns:
        (B,) int64 labels.

    Raises:
        TrainingDiverged: An embedding is not finite; its "prediction" would be class 0.
    """
    if not torch.isfinite(embedding_BD).all():
        raise TrainingDiverged(
            "the model's image embeddings are not finite numbers; lower lr or a loss weight"
        )
    cosine_BC = normalize(embedding_BD.float(), dim=-1) @ classifier_CD.T
    return cosine_BC.argmax(dim=-1)
