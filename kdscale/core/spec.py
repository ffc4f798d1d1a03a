"""What recipes and specs are made of: frozen models with named errors, and open choices."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.config import JsonDict

from kdscale.core.types import ConfigError, UnknownField, refuse_secret, unknown_field

NOT_IN_KEY: JsonDict = {"in_key": False}
IN_KEY_UNLESS_DEFAULT: JsonDict = {"in_key": "unless default"}  # for fields that came later


class Choice:
    """Several values for one recipe field; two fields that hold the same choice move together.

    Attributes:
        options: The values, in the order in which trials are made.
        link: Choices with the same link are zipped (they take their i-th option together).
    """

    def __init__(self, options: tuple[Any, ...], link: object = None) -> None:
        if not options:
            raise ConfigError("a choice needs at least one option")
        self.options = options
        self.link = link if link is not None else self

    def __repr__(self) -> str:
        return f"choose({', '.join(map(repr, self.options))})"


class Spec(BaseModel):
    """Base of specs and recipes: frozen, keyword-only, closed to unknown fields.

    What is in one is kept in records and manifests, so URLs in it may hold no secret.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", arbitrary_types_allowed=True, protected_namespaces=()
    )

    def __init__(self, **fields: Any) -> None:
        for name, value in fields.items():
            if isinstance(value, str):
                refuse_secret(f"{type(self).__name__}.{name}", value)
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise _named(type(self).__name__, set(type(self).model_fields), error) from error

    def replace(self, **changes: Any) -> Self:
        """Returns a copy with some fields changed, validated like a new one."""
        return type(self)(
            **{name: getattr(self, name) for name in type(self).model_fields} | changes
        )


def _named(owner: str, known: set[str], error: ValidationError) -> ConfigError:
    """Turns pydantic's report into one of our errors, one line a problem."""
    lines: list[str] = []
    unknown = False
    for item in error.errors():
        where = ".".join([owner, *map(str, item["loc"])])
        if item["type"] == "extra_forbidden":
            unknown = True
            name = where.removeprefix(f"{owner}.")
            lines.append(str(unknown_field(owner, name, known)))
        elif item["type"] == "value_error":  # our own, which says what was found
            cause = item.get("ctx", {}).get("error", item["msg"])
            unknown = unknown or isinstance(cause, UnknownField)
            lines.append(f"{where}: {cause}")
        else:
            lines.append(f"{where}: {item['msg']}, got {item.get('input')!r:.80}")
    return (UnknownField if unknown else ConfigError)("; ".join(lines))
