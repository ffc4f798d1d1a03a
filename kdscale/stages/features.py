"""The features stage: run a frozen tower once over a data set and keep what a projector reads.

As in `kdscale.stages.embed`, the unit of work is a shard. What is written differs from what the
tower would give during training by the rounding to fp16 and nothing else.
Shapes: n images of a batch, P visual tokens, D features.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from kdscale.core.storage import Storage
from kdscale.core.types import DataError
from kdscale.data import features as files
from kdscale.data.features import FeatureRef, write_features
from kdscale.data.instruct_blocks import rendered
from kdscale.data.raw import RawSample
from kdscale.data.shards import ShardEntry
from kdscale.data.sidecars import Values
from kdscale.models.hf_towers import family, feature_rule, num_image_tokens, vision_model
from kdscale.models.towers import load_tower
from kdscale.models.vlm import normalise_pixels, tower_features
from kdscale.stages.by_shard import device_for, rendered_ahead, samples_of, shard_row, shards_of
from kdscale.stages.jobs import FeaturesJob, tower_of
from kdscale.stages.loop import autocast, check_precision
from kdscale.stages.streams import pad_colour, renderer

BATCH_SIZE = 32


def pending(job: FeaturesJob) -> list[int]:
    """Returns the shards of a job that lack their file."""
    there = set(job.stage.storage.names(*job.stage.parts, "output"))
    shards = job.data.shards
    return [number for number in shards_of(job) if files.file_name(shards[number]) not in there]


class FeatureWriter:
    """Writes the features of shards with one tower, loaded once.

    Args:
        job: Whose features of what.
        device: Where the tower runs, None for a GPU if there is one.
        threads: Threads that decode ahead.
    """

    def __init__(self, job: FeaturesJob, device: str | None = None, threads: int = 1) -> None:
        recipe, self.device = job.recipe, device_for(device)
        tower, tokens = recipe.vision, recipe.hierarchical_tokens
        check_precision(recipe.precision, self.device.type)
        clip = load_tower(tower, Storage(job.storage_root), seed=recipe.seed)
        vision: Any = vision_model(clip, tower, tokens)
        self.job, self.recipe, self.model = job, recipe, vision.to(self.device)
        self.rule = feature_rule(family(tower), recipe.siglip_tokens)
        shape = num_image_tokens(tower, recipe.siglip_tokens, tokens), vision.config.hidden_size
        self.ref = FeatureRef(job.stage.url("output"), tower_of(recipe), shape)
        self.render = renderer(tower)
        self.colour = pad_colour(tower, recipe.image_mode)
        self.pool = ThreadPoolExecutor(threads)

    def __call__(self, number: int) -> dict[str, Any]:
        """Computes the features of one shard's images and writes their file.

        Args:
            number: Its place in the manifest.

        Returns:
            As of `kdscale.stages.by_shard.shard_row`.

        Raises:
            ShardChanged: It no longer fits the manifest.
            StorageError: The file could not be written; nothing half-written remains.
            DataError: A feature is too large for fp16.
        """
        began, stage = time.perf_counter(), self.job.stage
        entry = self.job.data.shards[number]
        images = [sample for sample in samples_of(entry) if sample.jpg]
        name = files.file_name(entry)
        with stage.storage.local_file(*stage.parts, "output", name) as path:
            write_features(path, self.ref, entry, self._batches(images, entry))
        return shard_row(number, len(images), began, self.summary())

    def summary(self) -> dict[str, Any]:
        """Returns what a reader must know of the features."""
        name = self.recipe.vision.name
        return {"name": name, "tower": self.ref.tower, "shape": list(self.ref.shape)}

    def _batches(self, images: Sequence[RawSample], entry: ShardEntry) -> Iterator[files.Features]:
        """Yields (n, P, D) of the images, in order."""

        def render(sample: RawSample) -> Values:
            """Returns the pixels of a sample."""
            place = (entry.path, sample.key)
            return rendered(sample.jpg or b"", self.render, self.colour, place)

        for part, pixels in rendered_ahead(self.pool, render, images, BATCH_SIZE):
            yield self._features(pixels, images[part], entry)

    @torch.no_grad()
    def _features(
        self, pixels: Values, images: Sequence[RawSample], entry: ShardEntry
    ) -> files.Features:
        """Runs the tower on one batch."""
        inputs = normalise_pixels(torch.from_numpy(pixels).to(self.device), self.recipe.vision)
        with autocast(self.recipe.precision, self.device):
            features = tower_features(self.model, inputs, self.rule).to(torch.float16)
        finite = features.isfinite().flatten(1).all(1).tolist()
        if not all(finite):
            key = images[finite.index(False)].key
            raise DataError(
                f"the features of {key!r} in {entry.path} do not fit into fp16, which a cache "
                "holds; train with feature_cache=False"
            )
        return features.cpu().numpy()
