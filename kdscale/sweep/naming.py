"""What trials of a sweep are called: the fields in which they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from kdscale.core.config import Distill, Spec
from kdscale.core.vlm_config import VLM_STAGES, Vlm
from kdscale.core.vlm_recipes import VLM_RECIPES

ALWAYS = ("recipe", "llm", "student", "teacher", "loss", "vision")  # told of every trial


def chosen_of(
    recipes: Sequence[Distill | Vlm], always: Sequence[str] = ALWAYS
) -> list[dict[str, Any]]:
    """Returns, for every recipe, what distinguishes it from the others of its kind.

    Args:
        recipes: Recipes without open choices.
        always: Fields that are told in any case.

    Returns:
        {field: label}; fields of a VLM's stages are dotted (`finetune.lr`), those of its student
        are not.
    """
    found: list[dict[str, Any]] = [{} for _ in recipes]
    kinds: tuple[type[Distill | Vlm], ...] = (Distill, Vlm)
    for kind in kinds:
        places = [place for place, recipe in enumerate(recipes) if type(recipe) is kind]
        rows = _rows([recipes[place] for place in places])
        for name in dict.fromkeys(name for row in rows for name in row):
            values = [row[name] for row in rows if name in row]
            different = len({repr(value) for value in values})
            if name not in always and different == 1:
                continue
            tell = label if len({label(value) for value in values}) == different else _in_full
            for place, row in zip(places, rows, strict=True):
                found[place] |= {name: tell(row[name])} if name in row else {}
    return found


def name_of(chosen: Mapping[str, Any]) -> str:
    """Names a trial by what distinguishes it."""
    parts: list[str] = []
    if "recipe" in chosen:
        parts += [chosen["recipe"], chosen["llm"], "on"]
    if "vision" in chosen:
        parts.append(chosen["vision"])
    else:
        teacher = chosen["teacher"]
        parts += [chosen["student"], "alone" if teacher is None else f"from {teacher}"]
        parts.append(chosen["loss"])
    parts += [f"{name}={value}" for name, value in chosen.items() if name not in ALWAYS]
    return " ".join(map(str, parts))


def dotted(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns fields with those of a VLM's stages on their own: `{"finetune.lr": 2e-5}`."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if name in VLM_STAGES:
            settings = cast("Mapping[str, Any]", value).items()
            found |= {f"{name}.{field}": setting for field, setting in settings}
        else:
            found[name] = value
    return found


def label(value: Any) -> Any:
    """Returns a short, hashable name of a recipe field's value."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, Distill):  # a teacher that the sweep trains
        read = () if value.read_epoch is None else ("read_epoch",)
        told = ("student", "teacher", "loss", *read)
        return name_of({name: label(getattr(value, name)) for name in told})
    if isinstance(value, dict):
        terms = cast("dict[str, Any]", value)
        if not all(isinstance(weight, int | float) for weight in terms.values()):
            return repr(terms)
        weights = terms.items()
        return "+".join(term if weight == 1 else f"{weight:g} {term}" for term, weight in weights)
    return getattr(value, "name", None) or getattr(value, "__qualname__", None) or repr(value)


def _in_full(value: Any) -> Any:
    """Returns a name that tells specs of the same name apart."""
    if not isinstance(value, Spec):
        return label(value)
    told = [
        f"{name}={getattr(value, name)}"
        for name, field in type(value).model_fields.items()
        if name != "name" and getattr(value, name) != field.default
    ]
    return f"{label(value)} ({', '.join(told)})"


def _rows(recipes: Sequence[Distill | Vlm]) -> list[dict[str, Any]]:
    """Returns the fields of recipes of one kind.

    A VLM that does not say what another one says of a stage has its own recipe's value there.
    """
    rows = [_fields(recipe) for recipe in recipes]
    said = dict.fromkeys(name for row in rows for name in row if "." in name)
    return [
        row | {name: row.get(name, _usual(recipe, name)) for name in said}
        if isinstance(recipe, Vlm)
        else row
        for recipe, row in zip(recipes, rows, strict=True)
    ]


def _fields(recipe: Distill | Vlm) -> dict[str, Any]:
    """Returns the fields of a recipe; in a VLM also those of its student and its stages."""
    fields = {name: getattr(recipe, name) for name in type(recipe).model_fields}
    if isinstance(recipe, Distill):
        return fields
    first = {name: fields.pop(name) for name in ("recipe", "llm")}
    if isinstance(recipe.vision, Distill):
        del fields["vision"]
        first |= _fields(recipe.vision)
    return first | dotted(fields)


def _usual(recipe: Vlm, name: str) -> Any:
    """Returns what a VLM's recipe says of a field of one stage (`finetune.lr`)."""
    stage, _, field = name.partition(".")
    settings = VLM_RECIPES.get(recipe.recipe, ({}, {}))[list(VLM_STAGES).index(stage)]
    return settings.get(field, VLM_STAGES[stage].model_fields[field].default)
