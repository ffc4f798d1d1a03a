"""The zero-shot suite: one tower on one image set.

Each piece of the set is embedded alone, by a function of the piece and nothing else; then the
pieces are put together in their order and scored. So the result does not depend on who embeds
what. Shape suffixes: B batch, N images, T captions, C classes, D embedding.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdscale.analysis.stats import Interval, bootstrap_interval, wilson_interval
from kdscale.core.config import Precision, TowerSpec
from kdscale.core.types import ConfigError, DataError
from kdscale.core.zero_shot_config import ClassSet, ZeroShot
from kdscale.data.evalsets import (
    EvalItem,
    EvalShard,
    check_readable,
    find_eval_shards,
    read_items,
)
from kdscale.data.labels import Labels
from kdscale.data.samples import BadImage, decode
from kdscale.eval.classes import class_set, prompt_templates
from kdscale.eval.ranking import check_embeddings
from kdscale.eval.retrieval import KS, Recalls, chosen, score_retrieval
from kdscale.eval.zeroshot import classifier, embed_texts, score_classes
from kdscale.models.towers import eval_crop, normalise, tokenizer
from kdscale.stages.evaluate import Tower
from kdscale.stages.loop import autocast, check_precision

BATCH_SIZE = 64
TEXTS_AT_ONCE = 256
_AHEAD = 2
_THREADS = 4

Tell = Callable[[int, int | None], None]


@dataclass(frozen=True)
class Measured:
    """A share in percent with its 95 % interval, and what guessing would give."""

    value: float
    interval: Interval
    chance: float


@dataclass(frozen=True)
class Part:
    """What a piece of a set gives.

    Attributes:
        items: Its readable images, without their bytes.
        embedding_ND: float32 on the CPU, as `encode_image` gives it.
        unreadable: {key: cause} of the others.
    """

    items: list[EvalItem]
    embedding_ND: Tensor
    unreadable: dict[str, str]


@dataclass(frozen=True)
class ZeroShotResult:
    """A tower's scores on a set.

    Attributes:
        n: Images scored.
        unreadable: Images left out, by cause.
        complete: These were all images of the whole set.
        metrics: `top1`, `top5`; or `image_to_text_r1`, ... and `text_to_image_r10`.
        notes: What a reader of the scores must know (distinct classes, captions).
        items: One record an image or query: what it was, and the rank of its right answer.
    """

    benchmark: str
    n: int
    unreadable: dict[str, int]
    complete: bool
    metrics: dict[str, Measured]
    notes: dict[str, Any]
    items: list[dict[str, Any]] = field(repr=False)

    @property
    def num_unreadable(self) -> int:
        """Images left out."""
        return sum(self.unreadable.values())


def labels_for(recipe: ZeroShot) -> Labels | None:
    """Returns the meaning of a set's labels, None for a set of captions."""
    if recipe.images.task == "retrieval":
        return None
    return Labels(class_set(recipe.images.classes), recipe.numbering, recipe.images.name)


def shards_for(recipe: ZeroShot) -> list[EvalShard]:
    """Finds the pieces of a recipe's set.

    Raises:
        ConfigError: The recipe does not say where it is.
        DataError: As `find_eval_shards`.
    """
    if recipe.data.urls is None:
        raise ConfigError(f"where is {recipe.images.name}? Give data.urls (--data)")
    return find_eval_shards(recipe.data.urls, labels_for(recipe), recipe.images.split)


@torch.no_grad()
def embed_shard(recipe: ZeroShot, tower: Tower, shard: EvalShard, limit: int | None = None) -> Part:
    """Embeds one piece of a set.

    Args:
        recipe: What is evaluated.
        tower: The recipe's tower, in evaluation mode, on the device that computes.
        shard: The piece.
        limit: Read so many of its images at most.

    Raises:
        EmbeddingUnusable: An embedding is not finite or zero.
        DataError: As `read_items`, or an image without a caption.
    """
    model: Any = tower.model
    device = next(model.parameters()).device
    items = islice(read_items(shard, labels_for(recipe), recipe.images.split), limit)
    kept: list[EvalItem] = []
    found: list[Tensor] = []
    unreadable: dict[str, str] = {}
    with ThreadPoolExecutor(_THREADS) as pool:
        for batch in _rendered(items, tower.spec, pool):
            good = [(item, seen) for item, seen in batch if isinstance(seen, np.ndarray)]
            unreadable |= {item.key: seen for item, seen in batch if isinstance(seen, str)}
            if not good:
                continue
            pixels = torch.from_numpy(np.stack([seen for _, seen in good])).to(device)
            with autocast(recipe.precision, device):
                embedding_BD = model.encode_image(normalise(pixels, tower.spec)).float().cpu()
            names = [item.key for item, _ in good]
            check_embeddings(embedding_BD, names, recipe.images.name)
            found.append(embedding_BD)
            kept += [EvalItem(item.key, None, item.label, item.captions) for item, _ in good]
    return Part(kept, torch.cat(found) if found else torch.empty(0, 0), unreadable)


def _rendered(
    items: Iterator[EvalItem], spec: TowerSpec, pool: ThreadPoolExecutor
) -> Iterator[list[tuple[EvalItem, np.ndarray[Any, Any] | str]]]:
    """Yields batches of (item, pixels or cause), the next ones being decoded meanwhile."""
    ahead: deque[list[tuple[EvalItem, Future[np.ndarray[Any, Any] | str]]]] = deque()
    while batch := list(islice(items, BATCH_SIZE)):
        ahead.append([(item, pool.submit(_render, item.image, spec)) for item in batch])
        if len(ahead) > _AHEAD:
            yield [(item, future.result()) for item, future in ahead.popleft()]
    while ahead:
        yield [(item, future.result()) for item, future in ahead.popleft()]


def _render(image: bytes | None, spec: TowerSpec) -> np.ndarray[Any, Any] | str:
    """Decodes an image and renders it as the tower sees it, or says why it cannot."""
    if not image:
        return "missing_image"
    try:
        return eval_crop(decode(image), spec)
    except BadImage as error:
        return error.cause


class ClassVectors:
    """Text classifiers of one tower: the sets of ImageNet share names, each is embedded once.

    Args:
        tower: In evaluation mode, on the device that computes.
        precision: Of the forward passes.
    """

    def __init__(self, tower: Tower, precision: Precision) -> None:
        self._tower = tower
        self._precision: Precision = precision
        self._known: dict[tuple[str, tuple[str, ...]], Tensor] = {}

    def of(self, classes: ClassSet, templates: Sequence[str]) -> Tensor:
        """Returns (C, D) unit vectors in label order; classes of one name get equal rows."""
        keys = [(name, tuple(templates)) for name in classes.names]
        new = [key for key in dict.fromkeys(keys) if key not in self._known]
        if new:
            model, spec = self._tower.model, self._tower.spec
            with autocast(self._precision, next(model.parameters()).device):
                names = [name for name, _ in new]
                rows_ND = classifier(model, tokenizer(spec), names, templates)
            self._known |= dict(zip(new, rows_ND, strict=True))
        return torch.stack([self._known[key] for key in keys])


def evaluate(
    recipe: ZeroShot, tower: Tower, vectors: ClassVectors | None = None, tell: Tell | None = None
) -> ZeroShotResult:
    """Embeds a set piece by piece in this process, and scores it.

    Args:
        recipe: What is evaluated.
        tower: The recipe's tower, in evaluation mode, on the device that computes.
        vectors: Text classifiers kept between sets; None makes them anew.
        tell: Is told (images done, images expected).

    Raises:
        ConfigError: No place of the data, or a precision that the device is too slow for.
        DataError: Data that cannot be used; see `kdscale.data.evalsets`.
        EmbeddingUnusable: An embedding is not finite or zero.
    """
    device = next(tower.model.parameters()).device
    check_precision(recipe.precision, device.type)
    parts: list[Part] = []
    done = 0
    for shard in shards_for(recipe):
        left = None if recipe.limit is None else recipe.limit - done
        if left == 0:
            break
        parts.append(embed_shard(recipe, tower, shard, left))
        done += len(parts[-1].items) + len(parts[-1].unreadable)
        if tell is not None:
            tell(done, recipe.limit or recipe.images.num_images)
    return score_parts(recipe, tower, parts, vectors)


def score_parts(
    recipe: ZeroShot, tower: Tower, parts: Sequence[Part], vectors: ClassVectors | None = None
) -> ZeroShotResult:
    """Puts the pieces of a set together and scores them.

    Args:
        recipe: What is evaluated.
        tower: For the texts.
        parts: Of `embed_shard`, in the order of the pieces.
        vectors: As `evaluate`.

    Raises:
        TooManyBadSamples: More images are unreadable than the recipe tolerates.
        DataError: No image, or one without a caption.
    """
    name = recipe.images.name
    causes = Counter(cause for part in parts for cause in part.unreadable.values())
    items = [item for part in parts for item in part.items]
    total = len(items) + causes.total()
    check_readable(dict(causes), total, recipe.data.max_bad_fraction, name)
    embedding_ND = torch.cat([part.embedding_ND for part in parts if part.items])
    if recipe.images.task == "retrieval":
        metrics, notes, records = _retrieval(recipe, tower, items, embedding_ND)
    else:
        vectors = vectors or ClassVectors(tower, recipe.precision)
        metrics, notes, records = _classes(recipe, vectors, items, embedding_ND)
    return ZeroShotResult(
        benchmark=name,
        n=len(items),
        unreadable=dict(causes),
        complete=is_whole(recipe, len(items), causes),
        metrics=metrics,
        notes=notes,
        items=records,
    )


def is_whole(recipe: ZeroShot, n: int, unreadable: Mapping[str, int]) -> bool:
    """Tells whether so many scored images are all of a set, as far as its size is known."""
    return recipe.limit is None and recipe.images.num_images in (None, n) and not unreadable


_Scored = tuple[dict[str, Measured], dict[str, Any], list[dict[str, Any]]]


def _classes(
    recipe: ZeroShot, vectors: ClassVectors, items: Sequence[EvalItem], embedding_ND: Tensor
) -> _Scored:
    """Scores a set of labels."""
    classes = class_set(recipe.images.classes)
    classifier_CD = vectors.of(classes, prompt_templates(recipe.templates)).cpu()
    labels = torch.tensor([item.label for item in items])
    scores = score_classes(embedding_ND, labels, classifier_CD)
    metrics = {
        name: Measured(value, _wilson(scores.hits(k), len(items)), chance)
        for name, k, value, chance in (
            ("top1", 1, scores.top1, scores.chance1),
            ("top5", 5, scores.top5, scores.chance5),
        )
    }
    notes = {"classes": len(classes.names), "distinct_classes": classes.num_distinct}
    columns = zip(items, scores.predictions.tolist(), scores.ranks.tolist(), strict=True)
    return (
        metrics,
        notes,
        [
            {"key": item.key, "label": item.label, "prediction": prediction, "rank": rank}
            for item, prediction, rank in columns
        ],
    )


def _retrieval(
    recipe: ZeroShot, tower: Tower, items: Sequence[EvalItem], embedding_ND: Tensor
) -> _Scored:
    """Scores a set of captions."""
    bare = [item.key for item in items if not item.captions]
    if bare:
        raise DataError(
            f"{recipe.images.name}: {len(bare)} images have no caption, first {bare[0]!r}; a set "
            "of captions has .txt beside each image, a column of captions, or a file of them"
        )
    texts, owner_T = chosen([item.captions for item in items], recipe.captions)
    device = next(tower.model.parameters()).device
    with autocast(recipe.precision, device):
        text_TD = embed_texts(
            tower.model,
            tokenizer(tower.spec),
            texts,
            f"captions of {recipe.images.name}",
            batch_size=TEXTS_AT_ONCE,
        )
    scores = score_retrieval(embedding_ND.to(device), text_TD, owner_T)
    found: dict[str, Measured] = {}
    records: list[dict[str, Any]] = []
    ways = (
        ("image_to_text", scores.image_to_text, range(len(items))),
        ("text_to_image", scores.text_to_image, owner_T.tolist()),
    )
    for way, recalls, owners in ways:
        for k in KS:
            interval = _interval(recalls, k, owners)
            found[f"{way}_r{k}"] = Measured(recalls.at(k), interval, recalls.chance[k])
        records += [
            {"query": way, "image": items[owner].key, "rank": rank}
            for owner, rank in zip(owners, recalls.ranks.tolist(), strict=True)
        ]
    return found, {"captions": len(texts), "protocol": recipe.captions}, records


def _interval(recalls: Recalls, k: int, owners: Sequence[int]) -> Interval:
    """Interval of a recall; captions of one image stand or fall together."""
    hit_Q = (recalls.ranks < k).numpy()
    num_images = len(set(owners))
    if num_images == len(owners):
        return _wilson(int(hit_Q.sum()), len(owners))
    if hit_Q.all() or not hit_Q.any():  # a bootstrap would have no width
        return _wilson(num_images if hit_Q.all() else 0, num_images)
    return bootstrap_interval(100.0 * hit_Q, groups=owners)


def _wilson(hits: int, n: int) -> Interval:
    """95 % interval of a share, in percent."""
    found = wilson_interval(hits, n)
    return Interval(100.0 * found.low, 100.0 * found.high)
