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
from kdscale.eval.zeroshot import classifier, predict
from kdscale.models.towers import eval_crop, image_features, normalise, tokenizer
from kdscale.stages.loop import World, autocast

CACHE_BYTES = 512 * 2**20
CKA_IMAGES = 2048
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
    if isinstance(templates, str):
        import open_clip

        table = {
            "openai": open_clip.OPENAI_IMAGENET_TEMPLATES,
            "simple": (lambda c: f"a photo of a {c}.",),
        }
        templates = [make("{}") for make in table[templates]]
    return list(names), list(templates)


@dataclass
class EvalSet:
    """This worker's share of a labelled image set, decoded once if it fits in memory."""

    manifest: Manifest
    world: World
    _cache: dict[tuple[int, str], list[Tensor]] = field(default_factory=dict)
    _teacher: dict[int, Tensor] = field(default_factory=dict)

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
    """

    def __init__(
        self, spec: ZeroShotSpec, manifest: Manifest, world: World, precision: Any
    ) -> None:
        self._names, self._templates = class_texts(spec)
        self._world, self._precision = world, precision
        self._images = EvalSet(manifest, world)
        self._teacher_features: list[Tensor] = []

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
        with autocast(self._precision, self._world.device):
            weights_CD = classifier(
                student.model, tokenizer(student.spec), self._names, self._templates
            )
        if teacher is not None and not self._teacher_features:
            self._teacher_features = self._features_of(teacher)
        rows: list[tuple[str, int, int]] = []
        cka = LinearCKA()
        for index, (keys, labels, images) in enumerate(self._images.batches(student.spec)):
            found = self._encode(student, images)
            predictions = predict(found["embedding"], weights_CD).tolist()
            rows += list(zip(keys, labels, predictions, strict=True))
            if index < len(self._teacher_features):
                cka.update(found["patch_mean"].float(), self._teacher_features[index])
        return self._merge(rows, cka, teacher is not None)

    def _encode(self, tower: Tower, images: Tensor) -> dict[str, Tensor]:
        pixels = normalise(images.to(self._world.device), tower.spec)
        with autocast(self._precision, self._world.device):
            return image_features(tower.model, pixels)

    def _features_of(self, teacher: Tower) -> list[Tensor]:
        """Computes the frozen teacher's features once for all checkpoints."""
        limit = -(-CKA_IMAGES // (BATCH_SIZE * self._world.size))
        found: list[Tensor] = []
        for index, (_, _, images) in enumerate(self._images.batches(teacher.spec)):
            if index < limit:
                found.append(self._encode(teacher, images)["patch_mean"].float())
        return found

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
