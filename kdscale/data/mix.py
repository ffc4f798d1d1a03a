"""Mixing data sets: a manifest that lists every shard as often as an epoch passes over it.

A source of N usable samples and weight w gives round(w * N) samples an epoch: whole copies of its
shards, then a partial copy that takes from every shard in proportion to its size. A partial copy
takes the same samples in every epoch, and each at most once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from kdscale.core.types import ConfigError, DataError
from kdscale.data.shards import Manifest, ShardEntry


@dataclass(frozen=True)
class MixedSource:
    """One data set of a mix.

    Attributes:
        pattern: What names it: shards, or a manifest.
        weight: Passes over it per epoch.
    """

    pattern: str
    manifest: Manifest
    weight: float

    @property
    def num_samples(self) -> int:
        """Samples that an epoch of the mix takes from this source."""
        return round(self.weight * self.manifest.num_samples)


def parse_sources(items: Sequence[str]) -> dict[str, float]:
    """Turns PATTERN=WEIGHT options into {pattern: weight}; a pattern may itself hold `=`.

    Raises:
        ConfigError: An option has no positive weight, or a pattern comes twice.
    """
    weights: dict[str, float] = {}
    for item in items:
        pattern, _, text = item.rpartition("=")
        try:
            weight = float(text)
        except ValueError:
            weight = math.nan
        if not pattern or not 0 < weight < math.inf:
            raise ConfigError(f"--source takes PATTERN=WEIGHT with a weight above 0, got {item!r}")
        if pattern in weights:
            raise ConfigError(
                f"--source names {pattern!r} twice: give it once, with the sum of the weights"
            )
        weights[pattern] = weight
    return weights


def mix(sources: Sequence[MixedSource]) -> Manifest:
    """Makes one manifest of several, source after source.

    Raises:
        DataError: A source is labelled, of another content than the first or a mix itself, two
            share a shard, or one is left out because its weight gives no sample.
    """
    owners: dict[str, str] = {}
    content = sources[0].manifest.content if sources else "captions"
    for source in sources:
        if source.manifest.content == "labels":
            raise DataError(f"{source.pattern} is labelled; only image-text data can be mixed")
        if source.manifest.content != content:
            raise DataError(
                f"{source.pattern} holds {source.manifest.content}, the first source {content}: "
                "mix data of one content"
            )
        for shard in source.manifest.shards:
            if shard.take is not None or shard.path in owners:
                raise DataError(
                    f"{shard.path} of {source.pattern} is already part of "
                    f"{owners.get(shard.path, 'a mix')}: name every shard in one source only, "
                    "and no mix as a source"
                )
            owners[shard.path] = source.pattern
    return Manifest(tuple(entry for source in sources for entry in _copies(source)), content)


def _copies(source: MixedSource) -> list[ShardEntry]:
    """Lists a source's shards, whole copies first."""
    if source.num_samples == 0:
        raise DataError(
            f"{source.pattern} has {source.manifest.num_samples} samples, of which weight "
            f"{source.weight:g} leaves none: raise the weight or leave the source out"
        )
    shards = source.manifest.shards
    whole, rest = divmod(source.num_samples, source.manifest.num_samples)
    partial = [
        replace(shard, take=take if take < shard.num_samples else None)
        for shard, take in zip(shards, spread(rest, source.manifest.counts), strict=True)
        if take
    ]
    return [*shards * whole, *partial]


def spread(total: int, sizes: Sequence[int]) -> list[int]:
    """Divides a total in proportion to sizes by the largest-remainder rule; ties go to the first.

    Args:
        total: At most the sum of the sizes.
        sizes: Positive.

    Returns:
        One number a size, none larger than it; their sum is the total.
    """
    whole = sum(sizes)
    parts = [total * size // whole for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda i: -(total * sizes[i] % whole))
    for index in by_remainder[: total - sum(parts)]:
        parts[index] += 1
    return parts
