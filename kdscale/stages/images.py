"""The images of a comparison, found or written down once; no torch, no Ray."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from kdscale.core.config import DataSpec
from kdscale.core.eval_config import BenchmarkImages
from kdscale.core.storage import Storage
from kdscale.core.types import DataError, MissingBenchmark
from kdscale.data.image_sets import ImageSet, Progress, set_hash, survey
from kdscale.data.raw import expand
from kdscale.eval.images import StoredImage, read_images
from kdscale.eval.questions import Question
from kdscale.stages.inputs import WRITTEN, find_source, fingerprint

NOT_AT_HAND = ""  # in place of a digest of questions or images
IMAGES_PER_FILE = 256


def find_images(
    spec: DataSpec | BenchmarkImages, storage: Storage, progress: Progress = lambda *_: None
) -> ImageSet:
    """Surveys the images of a data set, or reads the survey that the storage keeps.

    Args:
        spec: Shards, a manifest, a folder of images, a miniature world, which is drawn first, or a
            benchmark, whose distinct images are first written into the storage.
        storage: Where drawn data, benchmarks' images and surveys are kept.
        progress: As of `kdscale.data.image_sets.survey`.

    Raises:
        NoShards, NoImages, DataError: As of `survey`.
        MissingBenchmark: Nobody has said where the benchmark is.
        DataError: The benchmark's images are others than those of the plan.
    """
    if isinstance(spec, BenchmarkImages):
        found = _surveyed(_written(spec, storage), storage, progress)
        _check_same(spec, found.hash)
        return found
    if spec.mini is not None or spec.urls is None or spec.urls.endswith(".json"):
        manifest = find_source(spec, storage, content="labels").manifest()
        return survey("{" + ",".join(shard.path for shard in manifest.shards) + "}", progress)
    return _surveyed(spec.urls, storage, progress)


def distinct_images(questions: list[Question]) -> dict[str, bytes | StoredImage]:
    """Returns each image that is asked about, once: {SHA-256: the image, or where it is}."""
    return {q.image_sha256: q.image for q in questions if q.image is not None}


def _surveyed(urls: str, storage: Storage, progress: Progress) -> ImageSet:
    """Surveys files; the survey of a folder of image files is not kept."""
    try:
        place = "manifests", f"{fingerprint(expand(urls))}-images.json"
    except DataError:
        return survey(urls, progress)
    if storage.exists(*place):
        return ImageSet.from_json(storage.read(*place).decode())
    found = survey(urls, progress)
    storage.write(found.to_json().encode(), *place)
    return found


def _written(spec: BenchmarkImages, storage: Storage) -> str:
    """Writes a benchmark's images into the storage unless they are there; returns where."""
    if spec.digest == NOT_AT_HAND:
        raise MissingBenchmark(
            f"where are the files of benchmark {spec.name}? Say --data NAME=DIR, "
            "NAME being the suite's"
        )
    parts = ("data", f"images-{spec.digest[:16]}")
    if not storage.exists(*parts, WRITTEN):
        from kdscale.eval.sources import questions

        images = distinct_images(questions(spec.name, spec.data, spec.limit, spec.mode))
        _check_same(spec, set_hash(images))
        for number, data in enumerate(_files([images[digest] for digest in sorted(images)])):
            storage.write(data, *parts, f"{number:05d}.parquet")
        storage.write(b"", *parts, WRITTEN)
    return storage.url(*parts, "*.parquet")


def _files(images: list[bytes | StoredImage]) -> Iterator[bytes]:
    """Packs images into Parquet files, as Hugging Face's data sets have them."""
    for start in range(0, len(images), IMAGES_PER_FILE):
        part = images[start : start + IMAGES_PER_FILE]
        known = read_images(image for image in part if isinstance(image, StoredImage))
        cells = [
            {"bytes": known[image] if isinstance(image, StoredImage) else image} for image in part
        ]
        buffer = io.BytesIO()
        pq.write_table(pa.table({"image": cells}), buffer, compression="none")
        yield buffer.getvalue()


def _check_same(spec: BenchmarkImages, digest: str) -> None:
    """Refuses images that are not those of the plan."""
    if digest != spec.digest:
        raise DataError(
            f"the images of {spec.name} in {spec.data} have changed since the plan was made; run "
            "it again"
        )
