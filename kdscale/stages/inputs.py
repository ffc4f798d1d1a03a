"""Input data of a stage: found, or drawn, and verified once; no torch, no Ray."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import fsspec

from kdscale.core.config import DataSpec, Embed, MiniWorld, Recipe
from kdscale.core.keys import describe
from kdscale.core.storage import Storage
from kdscale.core.types import BadManifest, ConfigError, NoShards, StorageError
from kdscale.core.vlm_config import Features, SuiteSpec, VlmStage
from kdscale.data.shards import (
    Content,
    Manifest,
    ShardEntry,
    build_manifest,
    check_fraction,
    expand,
)
from kdscale.stages.labelled import (
    files_of,
    is_folder_of_pictures,
    is_labelled_in_words,
    write_labelled,
)

QUESTIONS = "questions.parquet"
WORLD_VERSION = 1
SUITE_VERSION = 1
WRITTEN = "written"
_WORD: dict[Content, str] = {
    "captions": "",
    "labels": "labelled",
    "conversations": "conversations",
}
_DRAWN = ("manifest.json", "manifest-conversations.json")
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Source:
    """A data set that exists or can be drawn.

    Attributes:
        num_samples: Usable samples.
        num_shards: Files that they lie in.
        hash: Identity of the content.
        content: What every sample carries.
    """

    spec: DataSpec
    storage: Storage
    num_samples: int
    num_shards: int
    hash: str
    content: Content = "captions"

    def manifest(self, progress: Progress = lambda _: None) -> Manifest:
        """Returns the manifest; draws and verifies the data first where that is to be done."""
        if self.spec.mini is not None:
            return _drawn(self, self.spec.mini, progress)
        return verified(self.spec, self.storage, content=self.content, progress=progress)


def find_source(
    spec: DataSpec,
    storage: Storage,
    *,
    content: Content = "captions",
    labelled: bool = False,
    progress: Progress = lambda _: None,
) -> Source:
    """Finds a data set.

    Args:
        spec: What to find.
        storage: Where drawn data and manifests are kept.
        content: What every sample must carry; `labelled` is short for `content="labels"`.
        progress: Told, in words, about long work.

    Raises:
        NoShards: If the spec names no data or its pattern matches none.
    """
    content = "labels" if labelled else content
    if spec.mini is not None:
        world = spec.mini
        shards = -(-world.num_samples // world.samples_per_shard)
        return Source(spec, storage, world.num_samples, shards, _world_key(world), content)
    manifest = verified(spec, storage, content=content, progress=progress)
    shards = len(manifest.shards)
    return Source(spec, storage, manifest.num_samples, shards, manifest.hash, content)


def content_of(recipe: Recipe) -> Content:
    """Returns what the samples of a stage's data must carry."""
    if isinstance(recipe, VlmStage | Features):
        return "conversations"
    return "labels" if isinstance(recipe, Embed) and recipe.views == 0 else "captions"


def verified(
    spec: DataSpec,
    storage: Storage,
    *,
    content: Content = "captions",
    progress: Progress = lambda _: None,
    each_shard: Callable[[ShardEntry], None] | None = None,
) -> Manifest:
    """Reads the manifest of shards from the storage, or makes it and keeps it there.

    Args:
        spec: Its `urls` name shards, or a manifest that is read as it is. Labelled images may also
            lie in class folders or have labels in words; they are written into the storage once.
        storage: Where manifests are kept.
        content: What every sample must carry.
        progress: Told, in words, about long work.
        each_shard: Called with each shard that had to be verified.

    Raises:
        NoShards: The spec names no data or its pattern matches none.
        BadManifest: `urls` names a `.json` that is no manifest of such data.
        TooManyBadSamples: More are unusable than the spec allows.
        UnknownLabel: A label in words is none of ImageNet's classes.
    """
    if _urls(spec).endswith(".json"):
        manifest = read_manifest(_urls(spec), content=content)
        check_fraction(manifest, spec.max_bad_fraction)
        return manifest
    if content == "labels":
        spec = as_shards(spec, storage, progress)
    place = manifest_place(_urls(spec), content=content)
    if storage.exists(*place):
        manifest = Manifest.from_json(storage.read(*place).decode())
        check_fraction(manifest, spec.max_bad_fraction)
        return manifest
    progress(f"verifying {spec.urls} (once)")
    manifest = build_manifest(spec, content=content, progress=each_shard)
    storage.write(manifest.to_json().encode(), *place)
    return manifest


def _urls(spec: DataSpec) -> str:
    """Returns where a data set is; NoShards if nobody has said."""
    if spec.urls is None:
        raise NoShards(f"data set {spec.name!r} has no path: say --data NAME=PATTERN")
    return spec.urls


def as_shards(spec: DataSpec, storage: Storage, progress: Progress = lambda _: None) -> DataSpec:
    """Returns where labelled images are as shards with integer labels; writes them once if need be.

    Args:
        spec: Its `urls` name class folders, or tars or Parquet files with any labels.
        storage: Receives those that are written; shards that can be read as they are stay.
        progress: Told, in words, about long work.

    Raises:
        NoShards: The pattern matches none.
        UnknownLabel: A label in words is none of ImageNet's classes.
        DataError: As `kdscale.data.evalsets.find_eval_shards`.
    """
    urls = spec.urls or ""
    if not is_folder_of_pictures(urls):
        kept = storage.exists(*manifest_place(urls, content="labels"))
        if kept or not is_labelled_in_words(expand(urls)[0]):
            return spec
    parts = "data", f"labelled-{fingerprint(files_of(urls))}"
    if not storage.exists(*parts, WRITTEN):
        progress(f"writing {urls} with its labels into {storage.url(*parts)} (once)")
        write_labelled(urls, spec.name, storage, parts)
        storage.write(b"", *parts, WRITTEN)
    return spec.replace(urls=storage.url(*parts, "*.tar"))


def manifest_place(
    urls: str, *, content: Content = "captions", labelled: bool = False
) -> tuple[str, str]:
    """Returns where a storage keeps the manifest of some shards, as they are now.

    Raises:
        NoShards: The pattern matches nothing.
    """
    word = _WORD["labels" if labelled else content]
    return "manifests", f"{fingerprint(expand(urls))}{word and f'-{word}'}.json"


def read_manifest(url: str, *, content: Content = "captions", labelled: bool = False) -> Manifest:
    """Reads a manifest from a file of its own.

    Args:
        url: Anything that fsspec opens.
        content: What the manifest must vouch for; `labelled` is short for `content="labels"`.

    Raises:
        NoShards: There is no such file.
        BadManifest: It is no manifest, or vouches for another content.
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
    content = "labels" if labelled else content
    if manifest.content != content:
        word = _WORD[content]
        raise BadManifest(
            f"{url} vouches for {manifest.content}, {content} are needed: make another one with "
            f"`kdscale data verify{word and f' --{word}'}`"
        )
    return manifest


def _drawn(source: Source, world: MiniWorld, progress: Progress) -> Manifest:
    """Draws a miniature world into the storage unless it is there, and verifies it likewise.

    Its shards are looked for in the storage as it is now, which may have been moved or mounted
    elsewhere since they were drawn. Captions and conversations of one world share its shards.
    """
    storage, parts = source.storage, ("data", _world_key(world))
    content: Content = "labels" if world.split == "eval" else "captions"
    content = "conversations" if source.content == "conversations" else content
    name = _DRAWN[content == "conversations"]
    if not storage.exists(*parts, name):
        if not any(storage.exists(*parts, known) for known in _DRAWN):
            _draw(source, world, progress)
        urls = storage.url(*parts, "*.tar")
        spec = source.spec.replace(mini=None, urls=urls)
        manifest = build_manifest(spec, content=content)
        storage.write(manifest.to_json().encode(), *parts, name)
    drawn = Manifest.from_json(storage.read(*parts, name).decode())
    shards = (replace(s, path=storage.url(*parts, s.path.rpartition("/")[2])) for s in drawn.shards)
    return replace(drawn, shards=tuple(shards))


def _draw(source: Source, world: MiniWorld, progress: Progress) -> None:
    """Draws a world's shards into the storage."""
    from kdscale.mini.build import write_world

    progress(f"drawing {world.num_samples:,} scenes of {source.spec.name} ({world.split})")
    with tempfile.TemporaryDirectory() as directory:
        write_world(world, directory)
        source.storage.put_directory(directory, "data", _world_key(world))


def questions_file(world: MiniWorld, storage: Storage, progress: Progress = lambda _: None) -> str:
    """Returns the Parquet file of a world's questions; draws them first unless it is there."""
    from kdscale.mini.build import write_questions

    parts = ("data", _world_key(world))
    if not storage.exists(*parts, QUESTIONS):
        progress(f"drawing {world.num_samples:,} questions")
        with tempfile.TemporaryDirectory() as directory:
            path = write_questions(world, f"{directory}/{QUESTIONS}")
            with open(path, "rb") as file:
                storage.write(file.read(), *parts, QUESTIONS)
    return storage.url(*parts, QUESTIONS)


def suite_directory(suite: SuiteSpec, storage: Storage) -> str | None:
    """Returns the directory of a suite's files; a miniature one is drawn first, in seconds.

    Args:
        suite: The suite.
        storage: Where drawn files are kept.

    Returns:
        A local directory; None where nobody has said where the files are.

    Raises:
        ConfigError: A miniature suite on a storage that is no local directory.
        StorageError: It cannot be drawn there.
    """
    if suite.mini is None:
        return suite.data
    from kdscale.mini.benchmarks import write_benchmarks

    name = f"{_world_key(suite.mini)}-{suite.num_items}-{SUITE_VERSION}"
    directory = Path(storage.url("data", name))
    if "://" in storage.url("data", name):
        raise ConfigError(f"miniature benchmarks are drawn on a local storage, not {storage.root}")
    if not (directory / WRITTEN).exists():
        try:
            write_benchmarks(directory, suite.mini, suite.num_items)
            (directory / WRITTEN).touch()
        except OSError as error:
            raise StorageError(f"cannot draw benchmarks into {directory}: {error}") from error
    return str(directory)


def _world_key(world: MiniWorld) -> str:
    """Names a world by its fields."""
    text = json.dumps([WORLD_VERSION, describe(world, {})], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def fingerprint(paths: list[str]) -> str:
    """Names a set of files by path, size and time of change, without reading them."""
    rows: list[str] = []
    for path in paths:
        fs, inner = fsspec.core.url_to_fs(path)
        info = fs.info(inner)
        changed = info.get("mtime") or info.get("LastModified") or info.get("ETag")
        rows.append(f"{path} {info['size']} {changed}")
    return hashlib.blake2b("\n".join(rows).encode(), digest_size=8).hexdigest()
