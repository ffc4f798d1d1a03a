"""A sweep: recipes, the choices between them, and their expansion to trials."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from kdscale.core.config import Choice, Distill
from kdscale.core.scale import Scale
from kdscale.core.types import ConfigError, UnknownField, unknown_field
from kdscale.core.vlm_config import VLM_STAGES, Finetune, Vlm, checked_settings
from kdscale.sweep.check import check_references
from kdscale.sweep.naming import chosen_of, dotted, name_of

if TYPE_CHECKING:
    from kdscale.sweep.search import Config, Search

PARTS = ("vision", *VLM_STAGES)  # fields of a VLM that hold fields themselves


def choose(*options: Any) -> Any:
    """Returns a choice for a recipe field; the sweep makes trials of every option.

    The same object in two fields moves together; different objects combine freely.
    """
    return Choice(options)


def product(*columns: Sequence[Any]) -> tuple[Any, ...]:
    """Returns one choice a column, combined freely: `teacher, loss = product(T, L)`."""
    return tuple(Choice(tuple(column)) for column in columns)


def zipped(*columns: Sequence[Any]) -> tuple[Any, ...]:
    """Returns one choice a column, moving together: the i-th options make one trial.

    Raises:
        ConfigError: If the columns differ in length.
    """
    lengths = {len(column) for column in columns}
    if len(lengths) > 1:
        raise ConfigError(f"zipped columns must be equally long, got {sorted(lengths)}")
    link = object()
    return tuple(Choice(tuple(column), link) for column in columns)


@dataclass(frozen=True, kw_only=True)
class Pivot:
    """How a report arranges trials: recipe fields for rows and columns, a metric for cells."""

    rows: str
    columns: str
    value: str = "zero_shot_top1"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One combination of choices.

    Attributes:
        name: For people: what was chosen.
        recipe: A recipe without open choices; roles are still names.
        chosen: {field: option}, also of fields that every trial of the sweep sets.
    """

    name: str
    recipe: Distill | Vlm
    chosen: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A question, as recipes with choices between them.

    Attributes:
        name: Names the MLflow experiment and the report.
        stages: Recipes; each expands to trials of its own.
        seeds: Every trial is made once a seed.
        table: How the report arranges the trials.
        baseline: Field values of the trials that the others are compared with.
        scale: Scale used where the command line names none.
        search: Draws further values for every recipe (`kdscale.sweep.search`).
        question: What it asks and why; a sweep file's docstring where it is empty.
    """

    name: str
    stages: list[Distill | Vlm]
    seeds: tuple[int, ...] = (0,)
    table: Pivot = field(default_factory=lambda: Pivot(rows="teacher", columns="loss"))
    baseline: dict[str, Any] | None = None
    scale: str | Scale = "paper"
    search: Search | None = None
    question: str = ""

    def trials(
        self,
        overrides: Mapping[str, Any] | None = None,
        configs: Sequence[Config] | None = None,
    ) -> list[Trial]:
        """Returns every trial, seed by seed, in the order of the recipes and options.

        Args:
            overrides: Recipe fields set last; names and choices of the trials tell of them.
                Mappings under `pretrain` and `finetune` set fields of one stage of the VLMs.
            configs: What the search has chosen; None takes what it draws.

        Raises:
            UnknownField: If no recipe has such a field.
            ConfigError: If the sweep varies such a field or tells its baseline by it, or a plan
                fills it in.
        """
        changes = dict(overrides or {})
        recipes = [
            _changed(recipe, {"seed": seed})
            for seed in self.seeds
            for template in self.stages
            for recipe in expand(template)
        ]
        self._check_free(changes, recipes)
        recipes = [_changed(recipe, changes) for recipe in recipes]
        self._check_taken(changes, recipes)
        for recipe in recipes:
            student = recipe.vision if isinstance(recipe, Vlm) else recipe
            if isinstance(student, Distill):
                check_references(student)
        if self.search is not None:
            from kdscale.sweep.search import searched

            return searched(self.search, recipes, changes, configs)
        told = zip(recipes, chosen_of(recipes), strict=True)
        return [Trial(name=name_of(chosen), recipe=r, chosen=chosen) for r, chosen in told]

    def _check_free(self, changes: Mapping[str, Any], recipes: Sequence[Distill | Vlm]) -> None:
        """Refuses changes that would make trials of one sweep alike, or a control no control."""
        told = {name for chosen in chosen_of(recipes, always=()) for name in chosen}
        for name in dotted(changes):
            varied = name in told and name != "run"  # which distinguishes no trials
            if varied or name in (self.baseline or {}):
                raise ConfigError(
                    f"{name!r} cannot be set from outside: the sweep {self.name!r} "
                    f"{'varies it' if varied else 'tells its baseline by it'}; "
                    "edit the sweep file, or choose another field"
                )

    def _check_taken(self, changes: Mapping[str, Any], recipes: Sequence[Distill | Vlm]) -> None:
        """Refuses changes that no recipe takes, for they would change nothing."""
        known = {name for recipe in recipes for name in _takes(recipe)} | {"run", "max_steps"}
        has_vlms = known.issuperset(VLM_STAGES)
        for name in changes:
            if name in VLM_STAGES and has_vlms:
                checked_settings(VLM_STAGES[name], changes[name])
            elif name in VLM_STAGES:
                raise ConfigError(f"the sweep {self.name!r} has no VLM whose {name} could be set")
            elif name not in known:
                error = unknown_field(f"a recipe of the sweep {self.name!r}", name, known)
                both = f" The stages of a VLM have it: say pretrain.{name} or finetune.{name}."
                is_theirs = has_vlms and name in Finetune.model_fields
                raise UnknownField(f"{error}{both if is_theirs else ''}")

    def main(self) -> None:
        """Runs the sweep as a program: `python FILE [options]` is `kdscale run FILE [options]`."""
        from kdscale.cli import app

        app(["run", *sys.argv])


def expand(template: Distill | Vlm) -> Iterator[Distill | Vlm]:
    """Yields the recipes that a recipe with choices stands for.

    A VLM's choices include those of its student and those inside `pretrain` and `finetune`.
    """
    choices = _choices(template)
    links: dict[int, int] = {}
    for choice in choices.values():
        known = links.setdefault(id(choice.link), len(choice.options))
        if known != len(choice.options):
            raise ConfigError(f"{choice!r} is linked to a choice of {known} options")
    for picks in itertools.product(*(range(count) for count in links.values())):
        index = dict(zip(links, picks, strict=True))
        taken = {name: choice.options[index[id(choice.link)]] for name, choice in choices.items()}
        own = {name: value for name, value in taken.items() if "." not in name}
        for part in PARTS:
            deep = {k.partition(".")[2]: v for k, v in taken.items() if k.startswith(f"{part}.")}
            if deep:
                inner = getattr(template, part)
                own[part] = inner.replace(**deep) if isinstance(inner, Distill) else inner | deep
        yield template.replace(**own)


def _choices(template: Distill | Vlm) -> dict[str, Choice]:
    """Returns the open choices of a recipe and, dotted, those inside of it."""
    choices = template.choices()
    for part in PARTS:
        inner: Any = getattr(template, part, None)
        fields = inner.choices() if isinstance(inner, Distill) else inner
        if isinstance(fields, dict):
            found = cast("dict[str, Any]", fields).items()
            choices |= {f"{part}.{k}": v for k, v in found if isinstance(v, Choice)}
    return choices


def _takes(recipe: Distill | Vlm) -> Set[str]:
    """Returns the fields of a recipe that can be set, its student's included."""
    own = set(type(recipe).model_fields)
    inner = getattr(recipe, "vision", None)
    return own | (_takes(inner) if isinstance(inner, Distill) else set[str]())


def _changed(recipe: Distill | Vlm, changes: Mapping[str, Any]) -> Distill | Vlm:
    """Sets the fields that a recipe has, in a VLM also those of its student.

    How stages are run, and single stages of a VLM, are set when the scale is known.
    """
    later = ("run", *VLM_STAGES)
    known = type(recipe).model_fields
    own = {k: v for k, v in changes.items() if k in known and k not in later}
    if isinstance(recipe, Vlm):
        vision = own.get("vision", recipe.vision)
        if isinstance(vision, Distill):
            own["vision"] = _changed(vision, changes)
    return recipe.replace(**own)
