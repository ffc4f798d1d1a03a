"""Input data of a stage: found, or drawn, and verified once; no torch, no Ray."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace

import fsspec

from kdscale.core.config import DataSpec, MiniWorld
from kdscale.core.keys import describe
from kdscale.core.storage import Storage
from kdscale.core.types import BadManifest, NoShards
from kdscale.data.shards import Manifest, ShardEntry, build_manifest, check_fraction, expand

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
        return verified(self.spec, self.storage, labelled=self.labelled, progress=progress)


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
    manifest = verified(spec, storage, labelled=labelled, progress=progress)
    shards = len(manifest.shards)
    return Source(spec, storage, manifest.num_samples, shards, manifest.hash, labelled)


def verified(
    spec: DataSpec,
    storage: Storage,
    *,
    labelled: bool = False,
    progress: Progress = lambda _: None,
    each_shard: Callable[[ShardEntry], None] | None = None,
) -> Manifest:
    """Reads the manifest of shards from the storage, or makes it and keeps it there.

    Args:
        spec: Its `urls` name shards, or a manifest that is read as it is.
        storage: Where manifests are kept.
        labelled: Whether every sample must carry an integer `label`.
        progress: Told, in words, about long work.
        each_shard: Called with each shard that had to be verified.

    Raises:
        NoShards: The spec names no data or its pattern matches none.
        BadManifest: `urls` names a `.json` that is no manifest of such data.
        TooManyBadSamples: More are unusable than the spec allows.
    """
    if spec.urls is None:
        raise NoShards(
            f"data set {spec.name!r} has no path: pass its shards with "
            f"--data '{spec.name}=/data/{spec.name}/{{00000..00999}}.tar'"
        )
    if spec.urls.endswith(".json"):
        manifest = read_manifest(spec.urls, labelled=labelled)
        check_fraction(manifest, spec.max_bad_fraction)
        return manifest
    place = manifest_place(spec.urls, labelled=labelled)
    if storage.exists(*place):
        manifest = Manifest.from_json(storage.read(*place).decode())
        check_fraction(manifest, spec.max_bad_fraction)
        return manifest
    progress(f"verifying {spec.urls} (once)")
    manifest = build_manifest(spec, labelled=labelled, progress=each_shard)
    storage.write(manifest.to_json().encode(), *place)
    return manifest


def manifest_place(urls: str, *, labelled: bool = False) -> tuple[str, str]:
    """Returns where a storage keeps the manifest of some shards, as they are now.

    Raises:
        NoShards: The pattern matches nothing.
    """
    name = f"{_fingerprint(expand(urls))}{'-labelled' if labelled else ''}.json"
    return "manifests", name


def read_manifest(url: str, *, labelled: bool = False) -> Manifest:
    """Reads a manifest from a file of its own.

    Args:
        url: Anything that fsspec opens.
        labelled: Whether the manifest must vouch for labels instead of captions.

    Raises:
        NoShards: There is no such file.
        BadManifest: It is no manifest, or vouches for the other kind of sample.
    """
    fs, path = fsspec.core.url_to_fs(url)
    try:
        text = fs.cat_file(path).decode()
    except FileNotFoundError as error:
        raise NoShards(f"there is no manifest {url}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise BadManifest(f"{url} cannot be read as a manifest: {error}") from error
    try:
        manifest = Manifest.from_json(text)
    except BadManifest as error:
        raise BadManifest(f"{url} is {error}") from error
    if manifest.labelled != labelled:
        kind, wanted = ("labels", "captions") if manifest.labelled else ("captions", "labels")
        flag = " --labelled" if labelled else ""
        raise BadManifest(
            f"{url} vouches for {kind}, {wanted} are needed: make another one with "
            f"`kdscale data verify{flag}`"
        )
    return manifest


def _drawn(spec: DataSpec, world: MiniWorld, storage: Storage, progress: Progress) -> Manifest:
    """Draws a miniature world into the storage unless it is there.

    Its shards are looked for in the storage as it is now, which may have been moved or mounted
    elsewhere since they were drawn.
    """
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
    drawn = Manifest.from_json(storage.read(*parts, "manifest.json").decode())
    shards = (replace(s, path=storage.url(*parts, s.path.rpartition("/")[2])) for s in drawn.shards)
    return replace(drawn, shards=tuple(shards))


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
