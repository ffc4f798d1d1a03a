"""Content keys: a stage is named by what decides its numbers and by nothing else."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from pydantic import BaseModel

from kdscale.core.config import NOT_IN_KEY, Choice, DataSpec, Spec
from kdscale.core.types import ConfigError

KEY_LENGTH = 16


def content_key(
    kind: str,
    version: int,
    recipe: Spec,
    manifests: Mapping[str, str],
    more: Mapping[str, Any] | None = None,
) -> str:
    """Returns the content key of a stage.

    Keys of input stages are part of the recipe already: a tower that another stage trains
    carries `weights="stage:<kind>/<key>"`.

    Args:
        kind: Stage kind ("teacher", "distill", ...).
        version: The kind's code version; raised whenever its numbers change.
        recipe: A resolved recipe: no choice left, every role replaced by a spec.
        manifests: {urls: manifest hash} of the data that were found.
        more: What else decides this stage's numbers; where nothing does, keys are without it.

    Returns:
        16 hexadecimal digits.

    Raises:
        ConfigError: If a field holds something without a stable description.
    """
    document: dict[str, Any] = {
        "kind": kind,
        "version": version,
        "recipe": describe(recipe, manifests),
        **({"more": describe(more, manifests)} if more else {}),
    }
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=KEY_LENGTH // 2).hexdigest()


def describe(value: Any, manifests: Mapping[str, str]) -> Any:
    """Turns a recipe value into JSON that holds exactly what changes numbers."""
    if isinstance(value, DataSpec) and value.urls is not None:
        return {"manifest": manifests.get(value.urls, f"not read: {value.urls}")}
    if isinstance(value, BaseModel):
        return {
            name: describe(getattr(value, name), manifests)
            for name, field in type(value).model_fields.items()
            if _in_key(field.json_schema_extra)
        }
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


def _in_key(extra: Any) -> bool:
    """Tells whether a field's metadata lets it into the key."""
    return not (isinstance(extra, Mapping) and cast("Mapping[str, Any]", extra) == NOT_IN_KEY)
