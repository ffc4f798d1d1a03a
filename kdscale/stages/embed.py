"""The embed stage: run a frozen teacher once over a data set and keep what it says.

The unit of work is a shard: read it, render its crops in threads while the teacher computes,
write its files, text last.
Shape suffixes: B samples of a batch, V crops or captions per sample, D embedding, K trunk width.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from kdscale.core.storage import Storage
from kdscale.core.types import ShardChanged
from kdscale.data.raw import RawSample
from kdscale.data.samples import BadImage, Picture, crop_box, decode
from kdscale.data.shards import ShardEntry, changed
from kdscale.data.sidecars import EVAL, TEXT, Values, encode_sidecar, view_name
from kdscale.models.towers import (
    eval_crop,
    freeze,
    image_features,
    load_tower,
    normalise,
    tokenizer,
)
from kdscale.stages.by_shard import device_for, rendered_ahead, samples_of, shard_row, shards_of
from kdscale.stages.jobs import EmbedJob
from kdscale.stages.loop import autocast, check_precision

BATCH_SIZE = 64
Arrays = dict[str, list[Values]]


def pending(job: EmbedJob) -> list[int]:
    """Returns the shards of a job that lack a file."""
    storage, cache, parts = job.stage.storage, job.cache, (*job.stage.parts, "output")
    there = {part: set(storage.names(*parts, part)) for part in cache.parts()}
    return [
        number
        for number in shards_of(job)
        if not all(
            cache.path(part, job.data.shards[number]).rsplit("/", 1)[-1] in names
            for part, names in there.items()
        )
    ]


class Embedder:
    """Embeds shards with one teacher, loaded once.

    Args:
        job: What to embed.
        device: Where the teacher runs, None for a GPU if there is one.
        threads: Threads that decode ahead.
    """

    def __init__(self, job: EmbedJob, device: str | None = None, threads: int = 1) -> None:
        recipe = job.recipe
        self.job, self.recipe, self.device = job, recipe, device_for(device)
        check_precision(recipe.precision, self.device.type)
        model = load_tower(recipe.teacher, Storage(job.storage_root))
        self.model: Any = freeze(model.to(self.device))
        self.tokenize = tokenizer(recipe.teacher)
        self.pool = ThreadPoolExecutor(threads)

    def __call__(self, number: int) -> dict[str, Any]:
        """Embeds one shard and writes its files.

        Args:
            number: Its place in the manifest.

        Returns:
            As of `kdscale.stages.by_shard.shard_row`.

        Raises:
            ShardChanged: It no longer fits the manifest.
            StorageError: A file could not be written; nothing half-written remains.
        """
        began = time.perf_counter()
        entry = self.job.data.shards[number]
        samples = samples_of(entry)
        found: Arrays = {part: [] for part in self.job.cache.parts()}
        for part, pixels in self._rendered(samples, entry):
            self._embed(samples[part], pixels, found)
        for name, pieces in found.items():
            self._write(name, entry, [s.key for s in samples], np.concatenate(pieces))
        return shard_row(number, len(samples), began, self.summary())

    def summary(self) -> dict[str, Any]:
        """Returns what a reader of the cache must know of the teacher."""
        cache, bias = self.job.cache, getattr(self.model, "logit_bias", None)
        return {
            "teacher": cache.teacher,
            "name": self.recipe.teacher.name,
            "dim": self.recipe.teacher.embed_dim,
            "logit_scale": float(self.model.logit_scale.detach().exp()),
            "logit_bias": None if bias is None else float(bias.detach()),
            "views": cache.views,
            "captions": cache.captions,
        }

    def _rendered(
        self, samples: Sequence[RawSample], entry: ShardEntry
    ) -> Iterator[tuple[slice, Values]]:
        """Yields (rows, (B, V, H, W, 3) uint8)."""
        render = partial(_render, job=self.job, entry=entry)
        size = max(1, BATCH_SIZE // max(1, self.recipe.views))
        yield from rendered_ahead(self.pool, render, samples, size)

    @torch.no_grad()
    def _embed(self, samples: Sequence[RawSample], pixels: Values, found: Arrays) -> None:
        """Runs the teacher on one batch and adds the results."""
        spec = self.recipe.teacher
        flat = torch.from_numpy(pixels.reshape(-1, *pixels.shape[2:])).to(self.device)
        with autocast(self.recipe.precision, self.device):
            inputs = normalise(flat, spec)
            if self.recipe.views == 0:
                features = image_features(self.model, inputs)["patch_mean"]
                found[EVAL].append(features.float().cpu().numpy())
                return
            image_BVD = _unit(self.model.encode_image(inputs)).reshape(*pixels.shape[:2], -1)
            captions = [text for s in samples for text in s.captions(self.recipe.captions)]
            text = _unit(self.model.encode_text(self.tokenize(captions).to(self.device)))
        for view in range(self.recipe.views):
            found[view_name(view)].append(image_BVD[:, view].numpy())
        found[TEXT].append(text.reshape(len(samples), self.recipe.captions, -1).numpy())

    def _write(self, part: str, entry: ShardEntry, keys: list[str], values: Values) -> None:
        """Writes one file of a shard."""
        cache, stage = self.job.cache, self.job.stage
        scale = {name: self.summary()[name] for name in ("logit_scale", "logit_bias")}
        data = encode_sidecar(keys, values, cache.metadata(part, entry) | scale)
        name = cache.path(part, entry).rsplit("/", 1)[-1]
        stage.storage.write(data, *stage.parts, "output", part, name)


def _unit(features: Tensor) -> Tensor:
    """Normalises in fp32 and rounds to fp16."""
    return normalize(features.float(), dim=-1).to(torch.float16).cpu()


def _render(sample: RawSample, job: EmbedJob, entry: ShardEntry) -> Values:
    """Renders all crops of a sample: (V, H, W, 3) uint8."""
    recipe, spec, data = job.recipe, job.recipe.teacher, sample.jpg or b""
    try:
        if recipe.views == 0:
            return eval_crop(decode(data), spec)[None]
        picture = Picture(data)
        boxes = (
            crop_box(sample.key, view, job.cache.crop, picture.height, picture.width)
            for view in range(recipe.views)
        )
        return np.stack([picture.cut(box, spec.image_px) for box in boxes])
    except BadImage as error:
        what = f"a bad image under {sample.key!r} ({error})"
        raise ShardChanged(changed(entry.path, what)) from error
