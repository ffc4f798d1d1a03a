"""Why a stage would run: what of it differs from the nearest stage of its kind that is finished."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
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
        cause: Why the input that the value names would run, or, where that is finished, what
            distinguishes the two inputs; None where the values name none.
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
        nearest: {key, name} of the finished stage with the fewest differences, None without any;
            of an input that is finished itself, the one that the compared stage has in its place.
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

    def tree(self, shown: set[tuple[str, str]] | None = None) -> Tree:
        """Returns the answer for people.

        Args:
            shown: Keys of stages, and of those that they are compared with, that are answered
                further above; this answer's are added.
        """
        shown = set() if shown is None else shown
        pair = self.stage.key, self.nearest["key"] if self.nearest else ""
        if pair in shown:
            return Tree(f"{self._who()}: see above")
        shown.add(pair)
        tree = Tree(self._head())
        for found in self.differences[:MAX_SHOWN]:
            values = escape(f"{_short(found.there)} -> {_short(found.here)}")
            branch = tree.add(f"[bold]{field_name(found.field)}[/]  {values}")
            if found.cause is not None:
                branch.add(found.cause.tree(shown))
        if len(self.differences) > MAX_SHOWN:
            tree.add(f"and {len(self.differences) - MAX_SHOWN} more (--json)")
        if self.note:
            tree.add(f"[yellow]{escape(self.note)}[/]")
        return tree

    def _who(self) -> str:
        """Names the stage."""
        return f"[cyan]{self.stage.kind}[/] {escape(self.stage.name)} [dim]{self.stage.key}[/]"

    def _head(self) -> str:
        """Says how it is in a line."""
        stage, who = self.stage, self._who()
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

    The nearest differs in the fewest fields and, among several, in the fewest of its inputs'.

    Args:
        plan: The plan.
        key: Of the stage, or its first digits.

    Raises:
        UnknownStage, AmbiguousStage: As `planned_stage`.
    """
    return _Finished(plan).why(planned_stage(plan, key))


class _Finished:
    """The finished stages of a storage, beside those of a plan; each record is read once.

    Args:
        plan: The plan.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._record = cache(partial(finished_record, plan.storage))
        self._answers: dict[str, Why] = {}

    def why(self, stage: Stage) -> Why:
        """Returns what distinguishes a stage from the nearest finished one, inputs followed."""
        if stage.key not in self._answers:
            self._answers[stage.key] = self._followed(self._nearest(stage))
        return self._answers[stage.key]

    def _nearest(self, stage: Stage) -> Why:
        """Compares a stage with the nearest finished one of its kind."""
        if stage.reused or stage.note:
            return Why(stage=stage, note=stage.note)
        candidates = [
            compared(stage, record)
            for name in self._plan.storage.names("stages", stage.kind)
            if name != stage.key and (record := self._record(stage.kind, name)) is not None
        ]
        fewest = min((len(why.differences) for why in candidates), default=0)
        tied = [why for why in candidates if len(why.differences) == fewest]
        if not tied:
            return Why(stage=stage)
        return tied[0] if len(tied) == 1 else min(tied, key=self._total)

    def _total(self, why: Why, counted: set[tuple[str, str]] | None = None) -> float:
        """Counts the fields in which two stages and their inputs differ, each pair once.

        Inputs that are not known any more count as infinitely many.
        """
        counted = set() if counted is None else counted
        count = float(len(why.differences))
        for found in why.differences:
            pair = _inputs(found)
            if pair is None or (pair[0], pair[2]) in counted:
                continue
            counted.add((pair[0], pair[2]))
            below = self._beside(*pair)
            count += math.inf if below is None else self._total(below, counted)
        return count

    def _beside(self, key: str, kind: str, other: str) -> Why | None:
        """Compares a stage of the plan with a finished one, None where either is not known."""
        if key not in self._plan.stages:
            return None
        record = self._record(kind, other)
        return None if record is None else compared(self._plan.stages[key], record)

    def _followed(self, why: Why) -> Why:
        """Adds the causes of its differences."""
        found = tuple(replace(each, cause=self._cause(each)) for each in why.differences)
        return replace(why, differences=found)

    def _cause(self, found: Difference) -> Why | None:
        """Answers for the input that differs as `why` does, or compares it if it is finished."""
        pair = _inputs(found)
        if pair is None or pair[0] not in self._plan.stages:
            return None
        stage = self._plan.stages[pair[0]]
        if not stage.reused:
            return self.why(stage)
        below = self._beside(*pair)
        return None if below is None else self._followed(below)


def finished_record(storage: Storage, kind: str, key: str) -> dict[str, Any] | None:
    """Reads what a finished stage says of itself, None where there is none or it says too little.

    A stage that is being removed may vanish meanwhile.
    """
    store = StageStore(storage, kind, key)
    try:
        record = store.record() if store.is_done() else {}
    except (StorageError, ValueError):
        return None
    return record | {"key": key} if "recipe" in record else None


def compared(stage: Stage, record: Mapping[str, Any]) -> Why:
    """Compares a planned stage with the record of a finished one, inputs by their names alone."""
    here, there, note = dict(stage.identity), _identity(record), ""
    if "version" not in there:
        here = {"recipe": here.get("recipe")}
        note = (
            "the finished stage was recorded before versions were kept: the code of its kind, or "
            "files beside it, may differ, too"
        )
    differences = tuple(
        Difference(field=field, here=new, there=old) for field, new, old in _different(here, there)
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


def _inputs(found: Difference) -> tuple[str, str, str] | None:
    """Returns the inputs that two values name: a key, and kind and key of the finished one."""
    new, old = (
        _INPUT.fullmatch(value) if isinstance(value, str) else None
        for value in (found.here, found.there)
    )
    return None if new is None or old is None else (new[3], old[1] or old[2], old[3])


def field_name(field: str) -> str:
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
