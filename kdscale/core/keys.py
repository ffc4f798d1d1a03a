"""Content keys: a stage is named by what decides its numbers and by nothing else."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel

from kdscale.core.config import (
    IN_KEY_UNLESS_DEFAULT,
    NOT_IN_KEY,
    Choice,
    DataSpec,
    Spec,
    TowerSpec,
)
from kdscale.core.types import ConfigError

KEY_LENGTH = 16
_BUILT_IN = ("random", "clip_bpe", "siglip", "mini_bpe", "mini_sp")  # whatever lies beside


def content_key(
    kind: str,
    version: int,
    recipe: Spec,
    manifests: Mapping[str, str],
    more: Mapping[str, Any] | None = None,
) -> str:
    """Returns the content key of a stage: the digest of its `identity`, whose arguments it takes.

    Returns:
        16 hexadecimal digits.
    """
    return digest(identity(kind, version, recipe, manifests, more))


def identity(
    kind: str,
    version: int,
    recipe: Spec,
    manifests: Mapping[str, str],
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns everything that decides a stage's numbers, as JSON.

    Keys of input stages are part of the recipe already: a tower that another stage trains
    carries `weights="stage:<kind>/<key>"`.

    Args:
        kind: Stage kind ("teacher", "distill", ...).
        version: The kind's code version; raised whenever its numbers change.
        recipe: A resolved recipe: no choice left, every role replaced by a spec.
        manifests: {urls: manifest hash} of the data that were found.
        more: What else decides this stage's numbers; where nothing does, keys are without it.

    Raises:
        ConfigError: If a field holds something without a stable description.
    """
    return {
        "kind": kind,
        "version": version,
        "recipe": describe(recipe, manifests),
        **({"more": describe(more, manifests)} if more else {}),
    }


def digest(identity: Mapping[str, Any]) -> str:
    """Returns the content key that an identity has."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=KEY_LENGTH // 2).hexdigest()


def describe(value: Any, manifests: Mapping[str, str]) -> Any:
    """Turns a recipe value into JSON that holds exactly what changes numbers."""
    if isinstance(value, DataSpec) and value.urls is not None:
        return {"manifest": manifests.get(value.urls, f"not read: {value.urls}")}
    if isinstance(value, DataSpec) and value.mini is None:
        return {"manifest": f"not at hand: {value.name}"}  # for plans, which come before the data
    if isinstance(value, BaseModel):
        known = {
            name: describe(getattr(value, name), manifests)
            for name, field in type(value).model_fields.items()
            if _in_key(field.json_schema_extra, getattr(value, name) == field.default)
        }
        file = weights_file(known["weights"]) if isinstance(value, TowerSpec) else None
        return known if file is None else known | {"weights": f"file:{_digest(file)}"}
    if isinstance(value, Mapping):
        entries = cast("Mapping[Any, Any]", value).items()
        return {str(name): describe(item, manifests) for name, item in entries}
    if isinstance(value, list | tuple):
        return [describe(item, manifests) for item in cast("Sequence[Any]", value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Choice):
        raise ConfigError(f"{value!r} is still open: a key needs a single value")
    if callable(value):
        return describe_callable(value)
    raise ConfigError(f"{value!r} cannot enter a content key; use numbers, text, specs")


def describe_callable(function: Callable[..., Any]) -> dict[str, str]:
    """Names a function by module, qualified name and hash of its source.

    Raises:
        ConfigError: For lambdas and local functions, which workers could not import.
    """
    name = getattr(function, "__qualname__", "")
    if "<" in name or not name:
        raise ConfigError(
            f"{function!r} cannot be imported on the workers: use a function at module level"
        )
    source = hashlib.blake2b(inspect.getsource(function).encode(), digest_size=8).hexdigest()
    return {"callable": f"{function.__module__}.{name}", "source": source}


def local_files(recipe: Spec) -> dict[str, Any]:
    """Describes the files in the local directories that a recipe's towers and models name.

    Returns:
        For `more` of `content_key`: other weights in the same directory make another stage.
        Empty where no tower names a directory that is here.
    """
    parts = [getattr(recipe, name) for name in type(recipe).model_fields]
    known = [part for part in parts if isinstance(part, Spec)]
    named = ("weights", "tokenizer")
    places = {p for k in known for n in named if isinstance(p := getattr(k, n, None), str)}
    folders = {p: Path(p).expanduser() for p in places if p not in _BUILT_IN}
    found = {place: folder_contents(path) for place, path in folders.items() if path.is_dir()}
    return {"files": found} if found else {}


def weights_file(weights: str) -> Path | None:
    """Returns the checkpoint file that a tower's `weights` name, None where they name none."""
    path = Path(weights).expanduser()
    return path if path.is_absolute() and path.is_file() else None


def folder_contents(folder: Path) -> dict[str, str]:
    """Hashes the files of a directory, not those below: {name: SHA-256}."""
    return {file.name: _digest(file) for file in folder.iterdir() if file.is_file()}


def _digest(file: Path) -> str:
    """Hashes a file by SHA-256."""
    stat = file.stat()
    return _file_digest(str(file), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=256)
def _file_digest(path: str, _size: int, _changed_ns: int) -> str:
    """Hashes a file, once while it does not change: weights are gigabytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _in_key(extra: Any, is_default: bool) -> bool:
    """Tells whether a field's metadata lets it into the key."""
    if not isinstance(extra, Mapping):
        return True
    rule = cast("Mapping[str, Any]", extra)
    return rule != NOT_IN_KEY and not (is_default and rule == IN_KEY_UNLESS_DEFAULT)
