"""Zero-shot accuracy and CKA of a student, read at every checkpoint.

Images are shared out to the workers by index and the results put together again, so that they
do not depend on the number of workers. Shape suffixes: B batch, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from kdscale.analysis.cka import LinearCKA
from kdscale.core.config import TowerSpec, ZeroShotSpec
from kdscale.data.shards import Manifest, read_labelled
from kdscale.data.sidecars import EVAL, CacheRef, read_sidecar
from kdscale.eval.classes import prompt_templates
from kdscale.eval.zeroshot import classifier, predict
from kdscale.models.towers import eval_crop, image_features, normalise, tokenizer
from kdscale.stages.jobs import CKA_IMAGES
from kdscale.stages.loop import World, autocast

CACHE_BYTES = 512 * 2**20
BATCH_SIZE = 64


@dataclass(frozen=True)
class Tower:
    """A CLIP model beside the spec of its inputs."""

    model: nn.Module
    spec: TowerSpec


@dataclass(frozen=True)
class Scores:
    """What one evaluation gives, the same on every worker.

    Attributes:
        keys: Sample keys in manifest order.
        labels: True labels.
        predictions: Predicted labels.
        metrics: `zero_shot_top1` (percent), and `cka_biased`, `cka_debiased` with a teacher.
    """

    keys: list[str]
    labels: list[int]
    predictions: list[int]
    metrics: dict[str, float]


def class_texts(spec: ZeroShotSpec) -> tuple[list[str], list[str]]:
    """Returns a benchmark's class names and prompt templates."""
    names: Any = spec.classnames
    templates: Any = spec.templates
    if "mini" in (names, templates):
        from kdscale.mini.scenes import CLASSNAMES, TEMPLATES

        names = CLASSNAMES if names == "mini" else names
        templates = TEMPLATES if templates == "mini" else templates
    if names == "imagenet":
        from open_clip import IMAGENET_CLASSNAMES as names
    return list(names), prompt_templates(templates)


@dataclass
class EvalSet:
    """This worker's share of a labelled image set, decoded once if it fits in memory."""

    manifest: Manifest
    world: World
    _cache: dict[tuple[int, str], list[Tensor]] = field(default_factory=dict)

    def batches(self, spec: TowerSpec) -> Iterator[tuple[list[str], list[int], Tensor]]:
        """Yields (keys, labels, uint8 BHWC images) cropped for a tower."""
        kind = (spec.image_px, spec.resize)
        if kind in self._cache:
            yield from self._cache[kind]  # pyright: ignore[reportReturnType]
            return
        size = self.manifest.num_samples // self.world.size * 3 * spec.image_px**2
        kept: list[Any] = []
        for batch in self._read(spec):
            if size <= CACHE_BYTES:
                kept.append(batch)
            yield batch
        if kept:
            self._cache[kind] = kept

    def _read(self, spec: TowerSpec) -> Iterator[tuple[list[str], list[int], Tensor]]:
        """Yields this worker's images in batches: keys, labels, pixels."""
        keys: list[str] = []
        labels: list[int] = []
        images: list[np.ndarray] = []
        for index, (key, label, rgb) in enumerate(read_labelled(self.manifest)):
            if index % self.world.size != self.world.rank:
                continue
            keys.append(key)
            labels.append(label)
            images.append(eval_crop(rgb, spec))
            if len(keys) == BATCH_SIZE:
                yield keys, labels, torch.from_numpy(np.stack(images))
                keys, labels, images = [], [], []
        if keys:
            yield keys, labels, torch.from_numpy(np.stack(images))


class Evaluator:
    """Evaluates a student against a benchmark and, if there is one, its teacher.

    Args:
        spec: The benchmark.
        manifest: Its images.
        world: This worker.
        precision: Of the forward passes.
        cached: (N, K) features of the teacher for the first `CKA_IMAGES` images, in manifest
            order, where an embed stage has stored them.
    """

    def __init__(
        self,
        spec: ZeroShotSpec,
        manifest: Manifest,
        world: World,
        precision: Any,
        cached: Tensor | None = None,
    ) -> None:
        self._names, self._templates = class_texts(spec)
        self._world, self._precision = world, precision
        self._images = EvalSet(manifest, world)
        # This worker's share of them, one row per image.
        self._reference = None if cached is None else cached[world.rank :: world.size]

    @torch.no_grad()
    def run(self, student: Tower, teacher: Tower | None) -> Scores:
        """Returns the student's scores; the student's training mode is restored."""
        was_training = student.model.training
        student.model.eval()
        try:
            return self._run(student, teacher)
        finally:
            student.model.train(was_training)

    def _run(self, student: Tower, teacher: Tower | None) -> Scores:
        """Classifies all images and compares their features with the teacher's."""
        with autocast(self._precision, self._world.device):
            weights_CD = classifier(
                student.model, tokenizer(student.spec), self._names, self._templates
            )
        if teacher is not None and self._reference is None:
            self._reference = self._features_of(teacher)
        reference = torch.empty(0) if self._reference is None else self._reference
        rows: list[tuple[str, int, int]] = []
        cka = LinearCKA()
        for index, (keys, labels, images) in enumerate(self._images.batches(student.spec)):
            found = self._encode(student, images)
            predictions = predict(found["embedding"], weights_CD).tolist()
            rows += list(zip(keys, labels, predictions, strict=True))
            rows_BK = reference[index * BATCH_SIZE :][: len(keys)]
            if len(rows_BK):
                cka.update(found["patch_mean"][: len(rows_BK)].float(), rows_BK)
        return self._merge(rows, cka, self._reference is not None)

    def _encode(self, tower: Tower, images: Tensor) -> dict[str, Tensor]:
        """Returns a tower's features of a batch of images."""
        pixels = normalise(images.to(self._world.device), tower.spec)
        with autocast(self._precision, self._world.device):
            return image_features(tower.model, pixels)

    def _features_of(self, teacher: Tower) -> Tensor:
        """Computes the frozen teacher's features once for all checkpoints: (N, K) fp32."""
        own = len(range(self._world.rank, CKA_IMAGES, self._world.size))
        found: list[Tensor] = []
        for index, (_, _, images) in enumerate(self._images.batches(teacher.spec)):
            if index * BATCH_SIZE < own:
                found.append(self._encode(teacher, images)["patch_mean"].float())
        return torch.cat(found)[:own]

    def _merge(self, rows: list[tuple[str, int, int]], cka: LinearCKA, with_cka: bool) -> Scores:
        """Puts the workers' shares together in manifest order."""
        shares: list[Any] = [(rows, cka)]
        if self._world.size > 1:
            shares = [None] * self._world.size
            dist.all_gather_object(shares, (rows, cka))
        ordered = _interleave([share[0] for share in shares])
        correct = [label == prediction for _, label, prediction in ordered]
        metrics = {"zero_shot_top1": 100.0 * sum(correct) / len(correct)}
        if with_cka:
            whole = LinearCKA()
            for _, part in shares:
                whole.merge(part)
            result = whole.result()
            metrics |= {"cka_biased": result.biased, "cka_debiased": result.debiased}
        keys, labels, predictions = (list(column) for column in zip(*ordered, strict=True))
        return Scores(keys, labels, predictions, metrics)


def _interleave(shares: list[list[Any]]) -> list[Any]:
    """Undoes the sharing by index."""
    total = sum(len(share) for share in shares)
    return [shares[index % len(shares)][index // len(shares)] for index in range(total)]


def cached_features(cache: CacheRef, manifest: Manifest) -> Tensor:
    """Reads a teacher's features of the first `CKA_IMAGES` images: (N, K) fp32.

    Raises:
        DataError: A file is absent, damaged, or of another teacher or shard.
    """
    found: list[np.ndarray[Any, Any]] = []
    for entry in manifest.shards:
        if sum(map(len, found)) < CKA_IMAGES:
            found.append(read_sidecar(cache, EVAL, entry)[1])
    return torch.from_numpy(np.concatenate(found)[:CKA_IMAGES])
