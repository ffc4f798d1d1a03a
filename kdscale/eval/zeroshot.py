"""Zero-shot classification: class prompts, classifier, predictions, scores.

Shape suffixes: B batch, N images, C classes, D embedding, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from kdscale.core.types import DataError
from kdscale.eval.ranking import MAX_CELLS, check_embeddings, cosines, right_ranks

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
        (C, D) unit vectors in float32; classes of one name get bit-equal rows.

    Raises:
        EmbeddingUnusable: A prompt's embedding is not finite or zero.

    Source:
        CLIP's prompt ensemble (Radford et al. 2021), as in open_clip.
    """
    names = list(dict.fromkeys(classnames))
    prompts = class_prompts(names, templates)
    embedding_ND = embed_texts(model, tokenize, prompts, "class prompts", batch_size=batch_size)
    stacked = normalize(embedding_ND, dim=-1).view(len(names), len(templates), -1)
    distinct_CD = normalize(stacked.mean(dim=1), dim=-1)
    place_of = {name: place for place, name in enumerate(names)}
    return distinct_CD[[place_of[name] for name in classnames]]


@torch.no_grad()
def embed_texts(
    model: nn.Module, tokenize: Tokenizer, texts: Sequence[str], source: str, *, batch_size: int
) -> Tensor:
    """Embeds texts, each distinct one once, so that equal texts get bit-equal rows.

    Args:
        model: A CLIP with `encode_text`.
        tokenize: Maps texts to (B, T) token ids.
        texts: At least one.
        source: What they are, for messages.
        batch_size: Texts per forward pass.

    Returns:
        (N, D) float32 on the model's device, not normalised.

    Raises:
        EmbeddingUnusable: An embedding is not finite or zero.
    """
    device = next(model.parameters()).device
    distinct = list(dict.fromkeys(texts))
    parts: list[Tensor] = []
    for start in range(0, len(distinct), batch_size):
        tokens_BT = tokenize(distinct[start : start + batch_size]).to(device)
        parts.append(model.encode_text(tokens_BT).float())  # pyright: ignore
    embedding_UD = torch.cat(parts)
    check_embeddings(embedding_UD, distinct, source)
    place_of = {text: place for place, text in enumerate(distinct)}
    return embedding_UD[[place_of[text] for text in texts]]


def predict(embedding_BD: Tensor, classifier_CD: Tensor) -> Tensor:
    """Returns the class of the largest cosine; ties go to the lowest label.

    Args:
        embedding_BD: Raw image embeddings.
        classifier_CD: Unit class vectors.

    Returns:
        (B,) int64 labels.

    Raises:
        EmbeddingUnusable: An embedding is not finite or zero; its "prediction" would be class 0.
    """
    check_embeddings(embedding_BD, (), "images")
    return cosines(embedding_BD, classifier_CD).argmax(dim=-1)


@dataclass(frozen=True, kw_only=True)
class ClassScores:
    """Zero-shot accuracies, in percent.

    Attributes:
        ranks: (N,) int64: how many classes stood before the right one.
        predictions: (N,) int64 labels.
        chance1: Top-1 of guessing.
        chance5: Top-5 of guessing.
    """

    ranks: Tensor
    predictions: Tensor
    chance1: float
    chance5: float

    def hits(self, k: int) -> int:
        """Counts images whose right class is among the first k."""
        return int((self.ranks < k).sum())

    @property
    def top1(self) -> float:
        """Share of images with the right class first."""
        return 100.0 * self.hits(1) / len(self.ranks)

    @property
    def top5(self) -> float:
        """Share of images with the right class among the first five."""
        return 100.0 * self.hits(5) / len(self.ranks)


def score_classes(embedding_ND: Tensor, label_N: Tensor, classifier_CD: Tensor) -> ClassScores:
    """Scores images against a text classifier; of tied classes the lowest label comes first.

    To restrict a set to some classes, give their rows of the classifier alone, and labels that
    count those.

    Args:
        embedding_ND: Raw image embeddings.
        label_N: int64, in [0, C).
        classifier_CD: Class vectors, in label order.

    Raises:
        DataError: No image, or a label outside [0, C).
        EmbeddingUnusable: An embedding is not finite or zero.
    """
    num_classes, n = len(classifier_CD), len(label_N)
    if n == 0 or not 0 <= int(label_N.min()) <= int(label_N.max()) < num_classes:
        found = f"labels {int(label_N.min())} to {int(label_N.max())}" if n else "no image"
        raise DataError(f"{found} for {num_classes} classes: nothing to score")
    classifier_CD = classifier_CD.to(embedding_ND.device)
    classes = torch.arange(num_classes, device=embedding_ND.device)
    portions = embedding_ND.split(max(1, MAX_CELLS // num_classes))
    return ClassScores(
        ranks=right_ranks(embedding_ND, classifier_CD, label_N.to(classes.device), classes),
        predictions=torch.cat([predict(part, classifier_CD).cpu() for part in portions]),
        chance1=100.0 / num_classes,
        chance5=100.0 * min(5, num_classes) / num_classes,
    )
