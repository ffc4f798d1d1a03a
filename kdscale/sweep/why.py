"""Why a stage would run: what of it differs from the nearest stage of its kind that is finished."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from rich.markup import escape
from rich.tree import Tree

from kdscale.core.storage import StageStore, Storage
from kdscale.core.types import AmbiguousStage, StorageError, UnknownStage
from kdscale.sweep.plan import Plan
from kdscale.sweep.stage import Stage

ABSENT = "(absent)"
MAX_SHOWN = 12
_MOST_CHARACTERS = 60
_INPUT = re.compile(r"(?:stage:(\w+)/|(embed|features):)([0-9a-f]{16})(?:@\d+)?")
_NOT_READ = "not read: "  # in place of a manifest in records of earlier versions


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One field of a stage's identity that has another value.

    Attributes:
        field: Its name, with dots.
        here: Value of the stage that would run.
        there: Value of the finished one.
        cause: What distinguishes the two inputs that the values name, None where they name none.
    """

    field: str
    here: Any
    there: Any
    cause: Why | None = None


@dataclass(frozen=True, kw_only=True)
class Why:
    """A stage beside a finished one.

    Attributes:
        stage: The stage of the plan.
        nearest: {key, name} of the finished stage with the fewest differences, None without any.
        differences: What they differ by.
        note: What has to be known beside that, empty for nothing.
    """

    stage: Stage
    nearest: dict[str, str] | None = None
    differences: tuple[Difference, ...] = ()
    note: str = ""

    def document(self) -> dict[str, Any]:
        """Returns the answer as JSON."""
        return {
            "kind": self.stage.kind,
            "key": self.stage.key,
            "name": self.stage.name,
            "finished": self.stage.reused,
            "nearest": self.nearest,
            "differences": [
                {
                    "field": found.field,
                    "here": found.here,
                    "there": found.there,
                    "input": found.cause and found.cause.document(),
                }
                for found in self.differences
            ],
            "note": self.note,
        }

    def tree(self) -> Tree:
        """Returns the answer for people."""
        tree = Tree(self._head())
        for found in self.differences[:MAX_SHOWN]:
            values = escape(f"{_short(found.there)} -> {_short(found.here)}")
            branch = tree.add(f"[bold]{_name(found.field)}[/]  {values}")
            if found.cause is not None:
                branch.add(found.cause.tree())
        if len(self.differences) > MAX_SHOWN:
            tree.add(f"and {len(self.differences) - MAX_SHOWN} more (--json)")
        if self.note:
            tree.add(f"[yellow]{escape(self.note)}[/]")
        return tree

    def _head(self) -> str:
        """Says how it is in a line."""
        stage = self.stage
        who = f"[cyan]{stage.kind}[/] {escape(stage.name)} [dim]{stage.key}[/]"
        if self.nearest is None and stage.reused:
            return f"{who} is finished and would not run"
        state = "is finished" if stage.reused else "would run"
        if self.nearest is None and self.note:
            return f"{who} {state}"
        if self.nearest is None:
            return f"{who} {state}: no {stage.kind} is finished in this storage to compare with"
        count = len(self.differences)
        fields = "1 field" if count == 1 else f"{count} fields"
        other = f"{escape(self.nearest['name'])} [dim]{self.nearest['key']}[/]"
        return f"{who} {state}: it differs in {fields} from a finished one, {other}"


def planned_stage(plan: Plan, key: str) -> Stage:
    """Returns the stage of a plan that a key, or the beginning of one, names.

    Raises:
        UnknownStage: The plan has none.
        AmbiguousStage: It has several.
    """
    found = [stage for stage in plan.stages.values() if stage.key.startswith(key)]
    if len(found) == 1:
        return found[0]
    if not found:
        raise UnknownStage(
            f"no stage of this plan has a key that begins with {key!r}; "
            "`kdscale plan` shows them, with the same options"
        )
    names = ", ".join(f"{stage.kind} {stage.key} ({stage.name})" for stage in found[:6])
    raise AmbiguousStage(f"{key} may be {names}; give more of the key")


def explain(plan: Plan, key: str) -> Why:
    """Returns what distinguishes a stage of a plan from the nearest finished one of its kind.

    Args:
        plan: The plan.
        key: Of the stage, or its first digits.

    Raises:
        UnknownStage, AmbiguousStage: As `planned_stage`.
    """
    stage = planned_stage(plan, key)
    if stage.reused or stage.note:
        return Why(stage=stage, note=stage.note)
    candidates = [
        _compared(plan, stage, record)
        for name in plan.storage.names("stages", stage.kind)
        if name != stage.key and (record := _record(plan.storage, stage.kind, name)) is not None
    ]
    return min(candidates, key=lambda why: len(why.differences), default=Why(stage=stage))


def _record(storage: Storage, kind: str, key: str) -> dict[str, Any] | None:
    """Reads what a finished stage says of itself, None where there is none or it says too little.

    A stage that is being removed may vanish meanwhile.
    """
    store = StageStore(storage, kind, key)
    try:
        record = store.record() if store.is_done() else {}
    except (StorageError, ValueError):
        return None
    return record | {"key": key} if "recipe" in record else None


def _compared(plan: Plan, stage: Stage, record: Mapping[str, Any]) -> Why:
    """Compares a planned stage with the record of a finished one."""
    here, there, note = dict(stage.identity), _identity(record), ""
    if "version" not in there:
        here = {"recipe": here.get("recipe")}
        note = (
            "the finished stage was recorded before versions were kept: the code of its kind, or "
            "files beside it, may differ, too"
        )
    differences = tuple(
        Difference(field=field, here=new, there=old, cause=_cause(plan, new, old))
        for field, new, old in _different(here, there)
    )
    nearest = {"key": str(record["key"]), "name": str(record.get("name", ""))}
    return Why(stage=stage, nearest=nearest, differences=differences, note=note)


def _identity(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the identity in a stage's record, as far as it was kept."""
    found = {name: record[name] for name in ("recipe", "version", "kind", "more") if name in record}
    if "version" not in found:
        return {"recipe": _with_manifest(found["recipe"], record.get("manifest"))}
    return found


def _with_manifest(recipe: dict[str, Any], manifest: Any) -> dict[str, Any]:
    """Puts the manifest where an earlier record names the path of its data."""
    data = recipe.get("data")
    named = cast("dict[str, Any]", data).get("manifest") if isinstance(data, dict) else None
    if isinstance(named, str) and named.startswith(_NOT_READ):
        return recipe | {"data": {"manifest": manifest}}
    return recipe


def _different(here: Any, there: Any, field: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields every field of two documents that differs: its name, and both values."""
    if isinstance(here, dict) and isinstance(there, dict):
        new, old = cast("dict[str, Any]", here), cast("dict[str, Any]", there)
        for name in {**new, **old}:
            below = f"{field}.{name}" if field else name
            yield from _different(new.get(name, ABSENT), old.get(name, ABSENT), below)
    elif here != there:
        yield field, here, there


def _cause(plan: Plan, here: Any, there: Any) -> Why | None:
    """Compares the inputs that two values name, where both name one and both are known."""
    new, old = (
        _INPUT.fullmatch(value) if isinstance(value, str) else None for value in (here, there)
    )
    if new is None or old is None or new[3] not in plan.stages:
        return None
    record = _record(plan.storage, old[1] or old[2], old[3])
    return None if record is None else _compared(plan, plan.stages[new[3]], record)


def _name(field: str) -> str:
    """Names a field as a person would."""
    if field == "version":
        return "version of the stage's code"
    if field.endswith(".manifest"):
        return field.removeprefix("recipe.") + " (other shards, or other contents)"
    return field.removeprefix("recipe.").removeprefix("more.")


def _short(value: Any) -> str:
    """Writes a value within a line."""
    text = value if value == ABSENT else repr(value)
    return text if len(text) <= _MOST_CHARACTERS else text[: _MOST_CHARACTERS - 3] + "..."
