"""The manifest of a data set: what is in every shard, and what in it is unusable.

It is made once, by decoding everything; later readers trust it and notice when a file no longer
fits.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from typing import Any, Self

import fsspec
import numpy as np

from kdscale.core.config import DataSpec
from kdscale.core.types import (
    BadManifest,
    DataError,
    EmptyShard,
    ShardChanged,
    TooManyBadSamples,
)
from kdscale.data.faults import CUT, Content, find_fault, length_of
from kdscale.data.order import Ints, permutation
from kdscale.data.raw import RawSample, expand, read_shard, read_tar
from kdscale.data.samples import BadImage, decode

__all__ = [
    "Content",
    "Manifest",
    "RawSample",
    "ShardEntry",
    "build_manifest",
    "check_fraction",
    "expand",
    "read_good",
    "read_labelled",
    "read_tar",
    "verify_shard",
]


@dataclass(frozen=True)
class ShardEntry:
    """What the manifest knows of one shard.

    Attributes:
        num_samples: Usable samples.
        keys_digest: Hash of the usable samples' keys, in order.
        quarantine: (index, key, cause) of every unusable sample.
        take: How many of the usable samples one epoch uses; None for all.
        labels: Smallest and largest label, None where none is required.
        lengths: Words of every usable conversation, negative where it has no image; None where
            none are required.
    """

    path: str
    num_bytes: int
    sha256: str
    num_samples: int
    keys_digest: str
    quarantine: tuple[tuple[int, str, str], ...] = ()
    take: int | None = None
    labels: tuple[int, int] | None = None
    lengths: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.take is not None and not 0 < self.take <= self.num_samples:
            raise DataError(
                f"{self.path} has {self.num_samples} usable samples, of which {self.take} cannot "
                "be taken"
            )
        if self.lengths is not None and len(self.lengths) != self.num_samples:
            raise DataError(
                f"{self.path} has {self.num_samples} usable samples and {len(self.lengths)} lengths"
            )

    @property
    def used(self) -> int:
        """Samples that one epoch uses."""
        return self.num_samples if self.take is None else self.take

    def used_places(self) -> Ints | None:
        """Returns the places, among the usable samples, of those that an epoch uses.

        Returns:
            (take,) ascending, the same in every epoch; None where all are used.
        """
        if self.take is None:
            return None
        return np.sort(permutation(self.num_samples, "take", self.keys_digest)[: self.take])

    def used_lengths(self) -> tuple[int, ...] | None:
        """Returns the lengths of the samples that an epoch uses; None where none are known."""
        places = self.used_places()
        if self.lengths is None or places is None:
            return self.lengths
        return tuple(self.lengths[place] for place in places.tolist())


@dataclass(frozen=True)
class Manifest:
    """The verified contents of a data set, in shard order; a mix lists shards several times.

    Attributes:
        content: What every sample was required to carry: a caption or an integer label beside
            its image, or a conversation with or without one.
    """

    shards: tuple[ShardEntry, ...]
    content: Content = "captions"
    version: int = field(default=1, kw_only=True)

    @property
    def num_samples(self) -> int:
        """Samples that one epoch uses."""
        return sum(self.counts)

    @property
    def num_bytes(self) -> int:
        """Size of all shards."""
        return sum(shard.num_bytes for shard in self.distinct)

    @property
    def distinct(self) -> tuple[ShardEntry, ...]:
        """One entry per file."""
        return tuple({shard.path: shard for shard in self.shards}.values())

    @property
    def counts(self) -> tuple[int, ...]:
        """Samples that an epoch uses of each shard, which is what `Order` takes."""
        return tuple(shard.used for shard in self.shards)

    @property
    def lengths(self) -> tuple[tuple[int, ...], ...] | None:
        """Words of the samples that an epoch uses of each shard; None where none are known."""
        found = tuple(shard.used_lengths() for shard in self.shards)
        known = tuple(lengths for lengths in found if lengths is not None)
        return known if len(known) == len(found) else None

    @cached_property
    def hash(self) -> str:
        """Hash of the contents and of what is quarantined; not of where the shards lie."""
        shards = [
            (s.sha256, s.num_samples, s.keys_digest, s.quarantine)
            + (() if s.take is None else (s.take,))
            + (() if s.lengths is None else (s.lengths,))
            for s in self.shards
        ]
        # Captions and labels go by the truth value that older manifests kept in their place.
        kind = self.content if self.content == "conversations" else self.content == "labels"
        text = json.dumps([self.version, kind, shards])
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    def causes(self) -> dict[str, int]:
        """Counts the quarantined samples by cause."""
        return dict(Counter(cause for s in self.distinct for _, _, cause in s.quarantine))

    def to_json(self) -> str:
        """Writes the manifest as JSON, one shard a line."""
        absent = ("take", "lengths")
        lines = ",\n".join(
            json.dumps({k: v for k, v in asdict(shard).items() if k not in absent or v is not None})
            for shard in self.shards
        )
        return (
            f'{{"version": {self.version}, "content": "{self.content}", "hash": "{self.hash}", '
            f'"shards": [\n{lines}\n]}}\n'
        )

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads what `to_json` wrote.

        Raises:
            BadManifest: Not a manifest, or edited since it was written.
        """
        try:
            value = json.loads(text)
            shards = tuple(
                ShardEntry(
                    **s
                    | {"quarantine": tuple((i, k, c) for i, k, c in s["quarantine"])}
                    | {n: tuple(s[n]) if s.get(n) else None for n in ("labels", "lengths")}
                )
                for s in value["shards"]
            )
            content = value.get("content") or ("labels" if value["labelled"] else "captions")
            manifest = cls(shards, content, version=value["version"])
            if value["hash"] != manifest.hash:
                raise ValueError("its hash does not fit its contents")
        except (KeyError, TypeError, ValueError) as error:
            raise BadManifest(f"not a usable manifest ({error}); verify the data again") from error
        return manifest


def build_manifest(
    spec: DataSpec,
    *,
    content: Content = "captions",
    num_threads: int | None = None,
    progress: Callable[[ShardEntry], None] | None = None,
) -> Manifest:
    """Verifies every shard of a data set by decoding every image.

    Args:
        content: What every sample must carry: a caption, an integer `label` in its metadata, or
            `conversations` there, which need no image.
        num_threads: Shards verified at a time, None for one per core; decoding runs outside
            the interpreter lock.
        progress: Called with each finished shard, in order.

    Raises:
        NoShards: The pattern matches nothing.
        DataError: A shard cannot be read as what its name says.
        EmptyShard: A shard has no usable sample.
        TooManyBadSamples: More are unusable than `spec.max_bad_fraction`.
    """
    if spec.urls is None:
        raise DataError(f"data {spec.name!r} has no urls: draw or download its shards first")
    entries: list[ShardEntry] = []
    paths = expand(spec.urls)
    with ThreadPoolExecutor(num_threads or min(len(paths), os.cpu_count() or 1)) as pool:
        try:
            for entry in pool.map(partial(verify_shard, content=content), paths):
                entries.append(entry)
                if progress is not None:
                    progress(entry)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    manifest = Manifest(tuple(entries), content)
    check_fraction(manifest, spec.max_bad_fraction)
    return manifest


def check_fraction(manifest: Manifest, allowed: float) -> None:
    """Checks that no more than the allowed share of the samples is unusable.

    Raises:
        TooManyBadSamples: More is.
    """
    bad = sum(manifest.causes().values()) + _cut_off(manifest)
    total = bad + sum(shard.num_samples for shard in manifest.distinct)
    if bad <= allowed * total:
        return
    counts = ", ".join(f"{cause} {count}" for cause, count in sorted(manifest.causes().items()))
    examples = [
        f"{key} in {shard.path} ({cause})"
        for shard in manifest.distinct
        for _, key, cause in shard.quarantine
    ][:3]
    raise TooManyBadSamples(
        f"{bad} of {total} samples are unusable ({bad / total:.1%}, allowed {allowed:.1%}): "
        f"{counts}; for example {'; '.join(examples)}. Repair the shards or raise "
        "max_bad_fraction."
    )


def _cut_off(manifest: Manifest) -> int:
    """Guesses how many samples truncated shards lost: what they lack of a usual shard."""
    sizes = {s.path: s.num_samples + len(s.quarantine) for s in manifest.distinct}
    usual = sorted(sizes.values())[len(sizes) // 2]
    cut = {s.path for s in manifest.distinct for *_, cause in s.quarantine if cause == CUT}
    return sum(max(0, usual - sizes[path]) for path in cut)


def check_labels(manifest: Manifest, num_classes: int, name: str) -> None:
    """Checks that every label names a class.

    Raises:
        DataError: One does not; it would be scored as a mistake.
    """
    for shard in manifest.shards:
        if shard.labels is not None and not 0 <= shard.labels[0] <= shard.labels[1] < num_classes:
            raise DataError(
                f"{shard.path} has labels from {shard.labels[0]} to {shard.labels[1]}, the "
                f"benchmark {name!r} has classes 0 to {num_classes - 1}; labels count from 0"
            )


def verify_shard(path: str, *, content: Content = "captions") -> ShardEntry:
    """Reads and decodes one whole shard.

    Raises:
        DataError: It cannot be read as what its name says.
        EmptyShard: It has no usable sample.
    """
    fs, inner = fsspec.core.url_to_fs(path)
    size, checksum = int(fs.size(inner)), hashlib.sha256()
    keys = hashlib.blake2b(digest_size=16)
    seen: set[str] = set()
    good = 0
    labels: list[int] = []
    lengths: list[int] = []
    quarantine: list[tuple[int, str, str]] = []
    for sample in read_shard(inner, fs, checksum):
        cause = "duplicate_key" if sample.key in seen else find_fault(sample, content)
        seen.add(sample.key)
        if cause is None:
            good += 1
            keys.update(sample.key.encode() + b"\0")
            labels += [sample.meta["label"]] if content == "labels" else []
            lengths += [length_of(sample)] if content == "conversations" else []
        else:
            quarantine.append((sample.index, sample.key, cause))
    if not good:
        counts = Counter(cause for _, _, cause in quarantine)
        found = ", ".join(f"{cause} {count}" for cause, count in sorted(counts.items()))
        raise EmptyShard(
            f"{path} ({size} bytes) has no usable sample; found: {found or 'nothing'}. "
            "Remove it from the pattern or write it again."
        )
    digests = checksum.hexdigest(), keys.hexdigest()
    extremes = (min(labels), max(labels)) if labels else None
    known, bad = tuple(lengths) or None, tuple(quarantine)
    return ShardEntry(path, size, digests[0], good, digests[1], bad, labels=extremes, lengths=known)


def read_good(
    path: str, fs: Any, entry: ShardEntry, *, checked: bool = False
) -> Iterator[RawSample]:
    """Streams the usable samples of a shard, in order.

    Args:
        path: Where the shard lies on `fs`, which need not be where it was verified.
        checked: Compare the hash of its contents, too.

    Raises:
        ShardChanged: Its size, its keys or their number are not those of the manifest. The
            keys are known only at the end: a reader must not use a shard half read.
    """
    try:
        size = int(fs.size(path))
    except FileNotFoundError as error:
        raise ShardChanged(f"{path} is gone since its manifest was made") from error
    if size != entry.num_bytes:
        raise ShardChanged(changed(path, f"{size} bytes instead of {entry.num_bytes}"))
    bad = {index for index, _, _ in entry.quarantine}
    keys = hashlib.blake2b(digest_size=16)
    good = 0
    checksum = hashlib.sha256() if checked else None
    for sample in read_shard(path, fs, checksum):
        if sample.index in bad:
            continue
        textual = entry.lengths is not None and good < entry.num_samples and entry.lengths[good] < 0
        if bool(sample.jpg) == textual or sample.cut:
            found = "an image it had not" if sample.jpg and textual else "no whole image"
            raise ShardChanged(changed(path, f"sample {sample.key!r} with {found}"))
        good += 1
        keys.update(sample.key.encode() + b"\0")
        yield sample
    if good != entry.num_samples:
        raise ShardChanged(changed(path, f"{good} samples instead of {entry.num_samples}"))
    if keys.hexdigest() != entry.keys_digest:
        raise ShardChanged(changed(path, "other keys"))
    if checksum is not None and checksum.hexdigest() != entry.sha256:
        raise ShardChanged(changed(path, "the same size and keys and other contents"))


def changed(path: str, what: str) -> str:
    """Words the error for a shard that differs from its manifest."""
    return f"{path} changed since its manifest was made: it has {what}. Verify the data again."


def read_labelled(
    manifest: Manifest,
) -> Iterator[tuple[str, int, np.ndarray[Any, np.dtype[np.uint8]]]]:
    """Streams (key, label, image as (H, W, 3) uint8) of a labelled data set, in order.

    Raises:
        DataError: The manifest was not made for labels, or is a mix.
        ShardChanged: A shard no longer fits the manifest.
    """
    if manifest.content != "labels":
        raise DataError("this manifest does not vouch for labels: build it with content='labels'")
    if any(entry.take is not None for entry in manifest.shards):
        raise DataError("labelled data are read whole, this manifest is a mix: give its sources")
    for entry in manifest.shards:
        fs, path = fsspec.core.url_to_fs(entry.path)
        for sample in read_good(path, fs, entry):
            try:
                image = decode(sample.jpg or b"")
            except BadImage as error:
                what = f"a bad image under {sample.key!r} ({error})"
                raise ShardChanged(changed(entry.path, what)) from error
            yield sample.key, int(sample.meta["label"]), image
