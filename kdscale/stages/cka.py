"""The CKA stage: what two models make of the same images, and how alike that is.

The unit of work is a shard of images. Its vectors are written down and then summed in the order
of the shards, so that neither the number of workers nor a killed run changes a bit of the result.
Shape suffixes: N images of a shard, B of a batch, D width of a layer.
"""

from __future__ import annotations

import hashlib
import io
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from kdscale.analysis.layer_cka import LayerCKA
from kdscale.core.config import DataSpec
from kdscale.core.eval_config import Cka
from kdscale.core.journal import JournalWriter
from kdscale.core.lease import check_lease
from kdscale.core.storage import Storage
from kdscale.core.types import ConfigError, DataError, NoShards
from kdscale.data.image_sets import ImageSet, ImageShard, Progress, read_images, survey
from kdscale.data.samples import BadImage, decode
from kdscale.models.named import resolve
from kdscale.models.taps import ImageTower, load_tower_of
from kdscale.stages.by_shard import device_for
from kdscale.stages.cka_result import CkaOutcome, check_enough, check_memory, documents
from kdscale.stages.jobs import CkaJob
from kdscale.stages.loop import World, autocast, check_precision

BATCH_SIZE = 32
ROWS = 512  # of all layers, summed at once
VECTORS = "vectors"
Layer = np.ndarray[Any, np.dtype[np.float32]]
Picture = tuple[int, np.ndarray[Any, Any], np.ndarray[Any, Any]]


@dataclass(frozen=True)
class ShardVectors:
    """The vectors of one shard's images.

    Attributes:
        a: {layer: (N, D) fp32} of the first model.
        b: The same of the second.
        faults: Images left out, by cause.
    """

    a: dict[str, Layer]
    b: dict[str, Layer]
    faults: Counter[str]

    @property
    def num_images(self) -> int:
        """Images that both models have seen."""
        return len(next(iter(self.a.values()), ()))


class TowerPair:
    """Two towers, loaded once, that look at the same images.

    Args:
        recipe: With both models as specs.
        storage: Where stages' weights are.
        device: Where the towers run, None for a GPU if there is one.
        threads: Threads that decode ahead.
    """

    def __init__(
        self, recipe: Cka, storage: Storage, device: str | None = None, threads: int = 1
    ) -> None:
        self.recipe, self.device = recipe, device_for(device)
        check_precision(recipe.precision, self.device.type)
        self.towers: list[ImageTower] = []
        for spec in (recipe.a, recipe.b):
            if isinstance(spec, str):
                raise ConfigError(f"{spec!r} is still a name; a plan or `resolve` replaces it")
            self.towers.append(load_tower_of(spec, storage))
            self.towers[-1].model.to(self.device)
        self._pool = ThreadPoolExecutor(threads)

    def __call__(self, shard: ImageShard, wanted: list[int]) -> ShardVectors:
        """Computes the vectors of a shard's images.

        Args:
            shard: From a survey.
            wanted: Indexes of its images, ascending.

        Raises:
            DataError: The shard changed, or a vector is not finite.
        """
        faults: Counter[str] = Counter()
        parts: tuple[dict[str, list[Layer]], dict[str, list[Layer]]] = ({}, {})
        for batch in self._rendered(shard, wanted, faults):
            indexes = [picture[0] for picture in batch]
            for side, tower in enumerate(self.towers):
                pixels = np.stack([picture[1 + side] for picture in batch])
                for layer, values in self._vectors(tower, pixels).items():
                    _check_finite(values, (tower.name, layer, shard.path), indexes)
                    parts[side].setdefault(layer, []).append(values)
        a, b = ({layer: np.concatenate(p) for layer, p in side.items()} for side in parts)
        return ShardVectors(a, b, faults)

    @torch.no_grad()
    def _vectors(self, tower: ImageTower, pixels: np.ndarray[Any, Any]) -> dict[str, Layer]:
        """Runs one tower on one batch."""
        inputs = torch.from_numpy(pixels).to(self.device)
        with autocast(self.recipe.precision, self.device):
            found = tower.vectors(inputs, self.recipe.tap, self.recipe.layers)
        return {layer: values.float().cpu().numpy() for layer, values in found.items()}

    def _rendered(
        self, shard: ImageShard, wanted: list[int], faults: Counter[str]
    ) -> Iterator[list[Picture]]:
        """Yields batches of images that decode, the next one being decoded meanwhile."""
        images = read_images(shard, wanted)

        def ahead() -> list[Any]:
            """Begins to decode the images of one more batch."""
            return [self._pool.submit(self._render, *item) for item in islice(images, BATCH_SIZE)]

        pending = ahead()
        while pending:
            following = ahead()
            batch: list[Picture] = []
            for future in pending:
                try:
                    batch.append(future.result())
                except BadImage as error:
                    faults[error.cause] += 1
            if batch:
                yield batch
            pending = following

    def _render(self, index: int, data: bytes) -> Picture:
        """Decodes an image once and prepares it for both towers."""
        rgb = decode(data, gif=True)
        return index, self.towers[0].render(rgb), self.towers[1].render(rgb)


def _check_finite(values: Layer, where: tuple[str, str, str], indexes: Sequence[int]) -> None:
    """Refuses vectors that no similarity can be computed of."""
    finite = np.isfinite(values).all(axis=1)
    if not finite.all():
        tower, layer, path = where
        image = indexes[int(np.argmin(finite))]
        raise DataError(
            f"{tower} gives values that are not finite in layer {layer} for image {image} of "
            f"{path}; compute in precision 'fp32', or look at the weights"
        )


class CkaSums:
    """Adds up shards, in order, and says what came out."""

    def __init__(self, job: tuple[Cka, ImageSet]) -> None:
        self.recipe, self.images = job
        self._sums = LayerCKA()
        self._faults = Counter(dict(self.images.faults))
        self._layers: tuple[list[str], list[str]] = ([], [])

    def add(self, part: ShardVectors) -> None:
        """Adds a shard's images.

        Raises:
            ConfigError: The sums of all layers would not fit into memory.
        """
        self._faults += part.faults
        if not part.num_images:
            return
        if not self._layers[0]:
            self._layers = list(part.a), list(part.b)
            check_memory(
                [layer.shape[1] for layer in part.a.values()],
                [layer.shape[1] for layer in part.b.values()],
            )
        for start in range(0, part.num_images, ROWS):
            a, b = (
                [layer[start : start + ROWS] for layer in side.values()]
                for side in (part.a, part.b)
            )
            self._sums.update(a, b)

    def outcome(self) -> CkaOutcome:
        """Computes both estimates.

        Raises:
            TooFewImages: Fewer than four images could be read.
        """
        result = self._sums.result()
        check_enough(result.n, self.images, self._faults)
        names = tuple(getattr(spec, "name", str(spec)) for spec in (self.recipe.a, self.recipe.b))
        return CkaOutcome(
            names=(names[0], names[1]),
            tap=self.recipe.tap,
            layers=self._layers,
            result=result,
            num_duplicates=self.images.num_duplicates,
            faults=dict(sorted(self._faults.items())),
        )


def compare(
    recipe: Cka, images: ImageSet, storage: Storage, progress: Progress = lambda *_: None
) -> CkaOutcome:
    """Compares two models in this process, writing nothing.

    Args:
        recipe: With both models as specs.
        images: From `kdscale.stages.images.find_images`.
        storage: Where stages' weights are.
        progress: Told (what, images done, images in all).

    Raises:
        TooFewImages: There are fewer than four distinct images.
        DataError, ConfigError, WeightsError: As of `TowerPair` and `CkaSums`.
    """
    check_enough(images.num_images, images, dict(images.faults))
    progress("loading the models", 0, None)
    pair, sums = TowerPair(recipe, storage, threads=2), CkaSums((recipe, images))
    chosen = images.chosen(recipe.n)
    done, total = 0, sum(map(len, chosen))
    for shard, wanted in zip(images.shards, chosen, strict=True):
        progress("images", done, total)
        if wanted:
            sums.add(pair(shard, wanted))
        done += len(wanted)
    return sums.outcome()


def compare_named(
    recipe: Cka, storage: Storage, progress: Progress = lambda *_: None
) -> CkaOutcome:
    """Compares two models that may still be names, on images wherever they lie; writes nothing.

    Args:
        recipe: Its models as specs, or named as `kdscale.models.named.resolve` takes them; its
            images a folder, tars or Parquet files.
        storage: Where stages' weights are.
        progress: Told (what, number done, number in all or None).

    Raises:
        NoShards: The recipe does not say where the images are.
        UnknownName: A model's name is not known.
        ConfigError, DataError, WeightsError: As of `resolve`, `survey` and `compare`.
    """
    check_precision(recipe.precision, device_for(None).type)
    a, b = (resolve(m, storage) if isinstance(m, str) else m for m in (recipe.a, recipe.b))
    if not isinstance(recipe.images, DataSpec) or recipe.images.urls is None:
        raise NoShards(f"where are the images of {recipe.images.name!r}? Say DataSpec(urls=...)")
    images = survey(recipe.images.urls, progress)
    return compare(recipe.replace(a=a, b=b), images, storage, progress)


class CkaRun:
    """One attempt at the stage on one worker; each computes the vectors of its share of shards.

    Args:
        job: What to do.
        world: This worker.
        report: Called once on every worker.
    """

    def __init__(
        self, job: CkaJob, world: World, report: Callable[[dict[str, float]], None]
    ) -> None:
        check_enough(job.images.num_images, job.images, dict(job.images.faults))
        self.job, self.world, self.report = job, world, report
        self.chosen = job.images.chosen(job.recipe.n)
        self.started = time.time()

    def train(self, _: Any = None) -> None:
        """Computes what is left of the vectors, sums them up and writes the output."""
        storage, parts = self.job.stage.storage, (*self.job.stage.parts, VECTORS)
        numbers = [number for number, wanted in enumerate(self.chosen) if wanted]
        there = set(storage.names(*parts))
        own = [n for n in numbers[self.world.rank :: self.world.size] if self._name(n) not in there]
        if own:
            pair = TowerPair(self.job.recipe, Storage(storage.root), str(self.world.device))
            for number in own:
                found = pair(self.job.images.shards[number], self.chosen[number])
                storage.write(_packed(found), *parts, self._name(number))
        self.world.wait()
        if self.world.is_first:
            sums = CkaSums((self.job.recipe, self.job.images))
            for number in numbers:
                sums.add(_unpacked(storage.read(*parts, self._name(number))))
            self._finish(sums.outcome())
        self.report({"step": 1.0})
        self.world.wait()

    def _name(self, number: int) -> str:
        """Names a shard's file by its images, so that no other arrangement's is taken for it."""
        shard = self.job.images.shards[number]
        digests = "".join(shard.digests[index] for index in self.chosen[number])
        return f"{number:06d}-{hashlib.sha256(digests.encode()).hexdigest()[:16]}.npz"

    def _finish(self, outcome: CkaOutcome) -> None:
        """Writes the result and marks the stage done."""
        job, storage = self.job, self.job.stage.storage
        check_lease(job.stage, job.lease)
        for name, data in documents(outcome).items():
            storage.write(data, *job.stage.parts, "output", name)
        seconds = time.time() - self.started
        journal = JournalWriter(job.stage, 1)
        speed = {"images": outcome.result.n, "samples_per_s": outcome.result.n / seconds}
        journal.append({"step": 1} | outcome.metrics() | speed)
        storage.remove(*job.stage.parts, VECTORS)
        job.stage.finish(job.record | {"seconds": round(seconds, 1)})


def run_cka(
    job: CkaJob,
    world: World | None = None,
    report: Callable[[dict[str, float]], None] = lambda _: None,
) -> None:
    """Does the whole stage, or one worker's share of it; see `CkaRun`."""
    CkaRun(job, world or World(device=device_for(None)), report).train()


def _packed(found: ShardVectors) -> bytes:
    """Encodes a shard's vectors."""
    buffer = io.BytesIO()
    sides = {f"a/{k}": v for k, v in found.a.items()} | {f"b/{k}": v for k, v in found.b.items()}
    faults = {f"faults/{cause}": np.array(count) for cause, count in found.faults.items()}
    np.savez(buffer, **sides, **faults)  # pyright: ignore[reportArgumentType]
    return buffer.getvalue()


def _unpacked(data: bytes) -> ShardVectors:
    """Decodes a shard's vectors."""
    found: dict[str, dict[str, Any]] = {"a": {}, "b": {}, "faults": {}}
    with np.load(io.BytesIO(data)) as arrays:
        for name in arrays.files:
            kind, _, rest = name.partition("/")
            found[kind][rest] = arrays[name]
    faults = Counter({cause: int(count) for cause, count in found["faults"].items()})
    return ShardVectors(found["a"], found["b"], faults)
