"""Named errors of the platform: what was found, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from kdscale.core.redaction import holds_secret, redacted


class KdscaleError(Exception):
    """Base of every error that kdscale raises on purpose; no secret is in its text."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(redacted(arg) if isinstance(arg, str) else arg for arg in args))


class ConfigError(KdscaleError, ValueError):
    """A recipe, sweep or command line that cannot mean anything."""


class SecretInUrl(ConfigError):
    """A URL that holds a password or token where it would be kept, in manifests for example."""


class UnknownName(ConfigError):
    """A name that no registry holds."""


class UnknownField(ConfigError):
    """A recipe or spec was given a field that it does not have."""


class UnknownStage(UnknownName):
    """A key that no stage of the storage has."""


class AmbiguousStage(ConfigError):
    """The beginning of several stages' keys."""


class WrongStage(ConfigError):
    """A stage of another kind than is asked for."""


class UnfinishedStage(ConfigError):
    """A stage that has no output yet."""


class PrecisionError(ConfigError):
    """A precision that the device cannot compute in at a usable speed."""


class MissingInput(KdscaleError, ValueError):
    """A computation was asked for without something it needs."""


class DataError(KdscaleError, ValueError):
    """Input data that cannot be used as they are."""


class NoShards(DataError):
    """A pattern that matches no shard."""


class EmptyShard(DataError):
    """A shard without a single usable sample."""


class TooManyBadSamples(DataError):
    """More bad samples than the data spec allows."""


class ShardChanged(DataError):
    """A shard no longer holds what its manifest says."""


class CacheMissing(DataError):
    """An embedding or feature that should be beside its shard and is not."""


class CacheMismatch(DataError):
    """A cache made for another tower, crop or shard."""


class CacheCorrupt(DataError):
    """A file of a cache that is damaged."""


class BadManifest(DataError):
    """A file that is no manifest, was edited, or does not vouch for what is asked of it."""


class BadBenchmark(DataError):
    """Files of a benchmark that cannot be asked: a malformed row, a missing column or part."""


class MissingBenchmark(DataError):
    """A benchmark that is neither in the folder nor to be had from the hub."""


class FolderTaken(DataError):
    """An output folder that holds something else than what is to be written."""


class WeightsError(KdscaleError):
    """Model weights that are absent or do not fit the architecture."""


class AnswerFailed(KdscaleError):
    """Questions that a model could not be asked, though nothing is wrong with them."""


class ExportMismatch(KdscaleError):
    """An exported model that does not answer as the original does."""


class StorageError(KdscaleError):
    """The storage refused or lost something."""


class LeaseLost(StorageError):
    """Another writer took over the stage that this process was computing."""


class CheckpointError(StorageError):
    """A checkpoint that cannot be resumed from."""


class OrderBroken(KdscaleError):
    """A stream gave other rows than a step wants; a late checkpoint can do that, so try again."""


class TrainingDiverged(KdscaleError):
    """The loss stopped being a finite number."""


class StageFailed(KdscaleError):
    """A stage of a trial ended with an error."""


class StageRefused(StageFailed):
    """A stage that another attempt would end in the same way."""


class StageStopped(KdscaleError):
    """A stage that was asked to stop; it goes on from its last checkpoint when it is run again."""


class StageBusy(KdscaleError):
    """A stage that cannot be removed while another process writes it, or reads it."""


class Interrupted(KdscaleError):
    """A run that a signal has ended before all was done; what it has done is kept."""


class OverBudget(ConfigError):
    """A plan that would cost more than it may, or nobody knows how much."""


class LimitReached(KdscaleError):
    """A sweep that has stopped since it has used up what it may use."""


class ImpossibleResources(KdscaleError):
    """A placement that this cluster can never satisfy."""


def unknown_name(kind: str, name: object, known: Iterable[str]) -> UnknownName:
    """Builds the error for a name outside a registry, with the nearest known names.

    Args:
        kind: What the name was meant to be, in words ("teacher", "loss recipe").
        name: What was given.
        known: The registry's names.
    """
    names = sorted(known)
    return UnknownName(f"unknown {kind} {name!r}.{_nearest(name, names)}")


def unknown_field(owner: str, name: object, known: Iterable[str]) -> UnknownField:
    """Builds the error for a field that something does not have, with the nearest that it has.

    Args:
        owner: What was given the field, in words.
        name: The field.
        known: The fields that it has.
    """
    return UnknownField(f"{owner} has no field {name!r}.{_nearest(name, sorted(known))}")


def _nearest(name: object, names: list[str]) -> str:
    """Ends an error about a name with those that might have been meant, and with all."""
    near = get_close_matches(str(name), names, n=2)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return f"{hint} Known: {', '.join(names)}."


def refuse_secret(what: str, text: str) -> None:
    """Refuses a URL with a password or token in it where it would be kept.

    Args:
        what: What was given it, for the error.
        text: Any text.

    Raises:
        SecretInUrl: It holds one.
    """
    if holds_secret(text):
        raise SecretInUrl(
            f"{what} holds a secret: {text}; records and manifests would keep it. Take it out, and "
            "give it by the environment or a file (docs/security.md)"
        )
