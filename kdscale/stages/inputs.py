"""Input data of a stage: found, or drawn, and verified once; no torch, no Ray."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import fsspec

from kdscale.core.config import DataSpec, MiniWorld
from kdscale.core.keys import describe
from kdscale.core.storage import Storage
from kdscale.core.types import NoShards
from kdscale.data.shards import Manifest, build_manifest, expand

WORLD_VERSION = 1
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Source:
    """A data set that exists or can be drawn.

    Attributes:
        num_samples: Usable samples.
        num_shards: Files that they lie in.
        hash: Identity of the content.
    """

    spec: DataSpec
    storage: Storage
    num_samples: int
    num_shards: int
    hash: str
    labelled: bool

    def manifest(self, progress: Progress = lambda _: None) -> Manifest:
        """Returns the manifest; draws and verifies the data first where that is to be done."""
        if self.spec.mini is not None:
            return _drawn(self.spec, self.spec.mini, self.storage, progress)
        return _verified(self.spec, self.storage, self.labelled, progress)


def find_source(
    spec: DataSpec,
    storage: Storage,
    *,
    labelled: bool = False,
    progress: Progress = lambda _: None,
) -> Source:
    """Finds a data set.

    Args:
        spec: What to find.
        storage: Where drawn data and manifests are kept.
        labelled: Whether every sample must carry an integer `label`.
        progress: Told, in words, about long work.

    Raises:
        NoShards: If the spec names no data or its pattern matches none.
    """
    if spec.mini is not None:
        world = spec.mini
        shards = -(-world.num_samples // world.samples_per_shard)
        return Source(spec, storage, world.num_samples, shards, _world_key(world), labelled)
    manifest = _verified(spec, storage, labelled, progress)
    shards = len(manifest.shards)
    return Source(spec, storage, manifest.num_samples, shards, manifest.hash, labelled)


def _verified(spec: DataSpec, storage: Storage, labelled: bool, progress: Progress) -> Manifest:
    """Reads the manifest of shards from the storage, or makes it."""
    if spec.urls is None:
        raise NoShards(
            f"data set {spec.name!r} has no path: pass its shards with "
            f"--data '{spec.name}=/data/{spec.name}/{{00000..00999}}.tar'"
        )
    name = f"{_fingerprint(expand(spec.urls))}{'-labelled' if labelled else ''}.json"
    if storage.exists("manifests", name):
        return Manifest.from_json(storage.read("manifests", name).decode())
    progress(f"verifying {spec.urls} (once)")
    manifest = build_manifest(spec, labelled=labelled)
    storage.write(manifest.to_json().encode(), "manifests", name)
    return manifest


def _drawn(spec: DataSpec, world: MiniWorld, storage: Storage, progress: Progress) -> Manifest:
    """Draws a miniature world into the storage unless it is there."""
    from kdscale.mini.build import write_world

    parts = ("data", _world_key(world))
    if not storage.exists(*parts, "manifest.json"):
        progress(f"drawing {world.num_samples:,} scenes of {spec.name} ({world.split})")
        with tempfile.TemporaryDirectory() as directory:
            write_world(world, directory)
            storage.put_directory(directory, *parts)
        urls = storage.url(*parts, "*.tar")
        manifest = build_manifest(
            spec.replace(mini=None, urls=urls), labelled=world.split == "eval"
        )
        storage.write(manifest.to_json().encode(), *parts, "manifest.json")
    return Manifest.from_json(storage.read(*parts, "manifest.json").decode())


def _world_key(world: MiniWorld) -> str:
    """Names a world by its fields."""
    text = json.dumps([WORLD_VERSION, describe(world, {})], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _fingerprint(paths: list[str]) -> str:
    """Names a set of files by path, size and time of change, without reading them."""
    rows: list[str] = []
    for path in paths:
        fs, inner = fsspec.core.url_to_fs(path)
        info = fs.info(inner)
        changed = info.get("mtime") or info.get("LastModified") or info.get("ETag")
        rows.append(f"{path} {info['size']} {changed}")
    return hashlib.blake2b("\n".join(rows).encode(), digest_size=8).hexdigest()
