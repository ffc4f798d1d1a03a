"""A sweep: recipes, the choices between them, and their expansion to trials."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from kdscale.core.config import Choice, Distill
from kdscale.core.scale import Scale
from kdscale.core.types import ConfigError
from kdscale.core.vlm_config import Vlm

VLM_STAGES = ("pretrain", "finetune")  # settings in these names change one stage of a VLM


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
    """

    name: str
    stages: list[Distill | Vlm]
    seeds: tuple[int, ...] = (0,)
    table: Pivot = field(default_factory=lambda: Pivot(rows="teacher", columns="loss"))
    baseline: dict[str, Any] | None = None
    scale: str | Scale = "paper"

    def trials(self, overrides: Mapping[str, Any] | None = None) -> list[Trial]:
        """Returns every trial, seed by seed, in the order of the recipes and options.

        Args:
            overrides: Recipe fields set last; names and choices of the trials tell of them.

        Raises:
            ConfigError: If the sweep varies such a field or tells its baseline by it.
        """
        recipes = [
            _seeded(recipe, seed)
            for seed in self.seeds
            for template in self.stages
            for recipe in expand(template)
        ]
        # Single fields of `run` are set when the scale is known; they change no name.
        changes = {k: v for k, v in (overrides or {}).items() if k not in ("run", *VLM_STAGES)}
        self._check_free(changes, [recipe for recipe in recipes if isinstance(recipe, Distill)])
        recipes = [_changed(recipe, changes) for recipe in recipes]
        varied = {
            name
            for name in Distill.model_fields
            if len({label(getattr(r, name)) for r in recipes if isinstance(r, Distill)}) > 1
        } | {"student", "teacher", "loss"}
        return [_trial(recipe, varied) for recipe in recipes]

    def _check_free(self, changes: Mapping[str, Any], recipes: Sequence[Distill]) -> None:
        """Refuses changes that would make trials of one sweep alike, or a control no control."""
        for name in changes:
            values = [getattr(recipe, name, None) for recipe in recipes]
            # How a stage is run distinguishes no trials.
            varied = name != "run" and any(value != values[0] for value in values)
            if varied or name in (self.baseline or {}):
                raise ConfigError(
                    f"{name!r} cannot be set from outside: the sweep {self.name!r} "
                    f"{'varies it' if varied else 'tells its baseline by it'}; "
                    "edit the sweep file, or choose another field"
                )

    def main(self) -> None:
        """Runs the sweep as a program: `python FILE [options]` is `kdscale run FILE [options]`."""
        from kdscale.cli import app

        app(["run", *sys.argv])


def expand(template: Distill | Vlm) -> Iterator[Distill | Vlm]:
    """Yields the recipes that a recipe with choices stands for; a VLM's includes its student's."""
    inner = getattr(template, "vision", None)
    choices = template.choices()
    if isinstance(inner, Distill):
        choices |= {f"vision.{name}": choice for name, choice in inner.choices().items()}
    links: dict[int, int] = {}
    for choice in choices.values():
        known = links.setdefault(id(choice.link), len(choice.options))
        if known != len(choice.options):
            raise ConfigError(f"{choice!r} is linked to a choice of {known} options")
    for picks in itertools.product(*(range(count) for count in links.values())):
        index = dict(zip(links, picks, strict=True))
        taken = {name: choice.options[index[id(choice.link)]] for name, choice in choices.items()}
        own = {name: value for name, value in taken.items() if "." not in name}
        if isinstance(inner, Distill):
            deep = {k.partition(".")[2]: v for k, v in taken.items() if "." in k}
            own["vision"] = inner.replace(**deep)
        yield template.replace(**own)


def _seeded(recipe: Distill | Vlm, seed: int) -> Distill | Vlm:
    """Sets a recipe's seed, and its student's."""
    if isinstance(recipe, Vlm) and isinstance(recipe.vision, Distill):
        recipe = recipe.replace(vision=recipe.vision.replace(seed=seed))
    return recipe.replace(seed=seed)


def _changed(recipe: Distill | Vlm, changes: Mapping[str, Any]) -> Distill | Vlm:
    """Sets fields of a distillation; in a VLM those of its student."""
    if isinstance(recipe, Distill):
        return recipe.replace(**changes)
    if isinstance(recipe.vision, Distill):
        return recipe.replace(vision=recipe.vision.replace(**changes))
    return recipe


def _trial(recipe: Distill | Vlm, varied: set[str]) -> Trial:
    """Names a trial by what distinguishes it."""
    if isinstance(recipe, Vlm):
        return _vlm_trial(recipe, varied)
    chosen = {name: label(getattr(recipe, name)) for name in Distill.model_fields if name in varied}
    teacher = chosen["teacher"]
    parts = [chosen["student"], "alone" if teacher is None else f"from {teacher}", chosen["loss"]]
    extra = [f"{k}={v}" for k, v in chosen.items() if k not in ("student", "teacher", "loss")]
    return Trial(name=" ".join([*map(str, parts), *extra]), recipe=recipe, chosen=chosen)


def _vlm_trial(recipe: Vlm, varied: set[str]) -> Trial:
    """Names a VLM's trial by framework, language model and tower."""
    tower = _trial(recipe.vision, varied) if isinstance(recipe.vision, Distill) else recipe.vision
    chosen = {"recipe": recipe.recipe, "llm": label(recipe.llm)}
    if isinstance(tower, Trial):
        chosen |= tower.chosen
    else:
        chosen["vision"] = label(tower)
    where = tower.name if isinstance(tower, Trial) else label(tower)
    name = f"{recipe.recipe} {chosen['llm']} on {where}"
    return Trial(name=name, recipe=recipe, chosen=chosen)


def label(value: Any) -> Any:
    """Returns a short, hashable name of a recipe field's value."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, dict):
        weights = cast("dict[str, float]", value).items()
        return "+".join(term if weight == 1 else f"{weight:g} {term}" for term, weight in weights)
    return getattr(value, "name", None) or getattr(value, "__qualname__", None) or repr(value)
