"""A search: recipe fields drawn from a Ray Tune space, or suggested by a searcher.

A space maps dotted recipe fields to anything that Tune can sample. Without a searcher every
configuration is drawn before anything runs, so a plan shows all trials; with one they are suggested
while running, and `kdscale.sweep.chosen` keeps them.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from kdscale.core.config import Distill, Spec
from kdscale.core.types import ConfigError, UnknownField, unknown_name
from kdscale.core.vlm_config import VLM_STAGES, Vlm
from kdscale.losses.recipes import LossFlags, weights_for
from kdscale.sweep.grid import Trial
from kdscale.sweep.naming import ALWAYS, chosen_of, label, name_of

Config = Mapping[str, Any]  # {dotted field: value}
DIGITS = 3
NOT_SEARCHED = {
    "seed": "give `Sweep.seeds`",
    "run": "it changes no number",
    "vision": "name the student's field itself, or use choose(...)",
}
CHANGES = "changes trials while they train, and a stage is a function of its recipe"
PAUSES = "pauses trials until others have come as far"
UNFIT = {
    "PopulationBasedTraining": CHANGES,
    "PopulationBasedTrainingReplay": CHANGES,
    "PB2": CHANGES,
    "ResourceChangingScheduler": CHANGES,
    "HyperBandScheduler": PAUSES,
}


@dataclass(frozen=True, kw_only=True)
class Search:
    """Which configurations a sweep tries, and which it gives up early.

    Attributes:
        space: {dotted field: Tune domain, `grid_search`, `sample_from`, or a constant}, such as
            `lr`, `loss.fd`, `flags.head_wd`, `finetune.lr`. In a VLM a field that it does not have
            itself is its student's.
        metric: A name in the journal: `zero_shot_top1`, `cka_debiased`, `total`, `accuracy`.
        mode: `max` or `min`.
        num_trials: Draws (each takes every combination of the space's grids), or suggestions.
        seed: Of the draws.
        scheduler: A Tune scheduler that stops trials; None stops none. Its `time_attr` is `step`,
            `progress` (per cent of a trial's steps) or `training_iteration` (evaluations).
        searcher: A Tune searcher that suggests configurations; None draws them up front.
    """

    space: Mapping[str, Any]
    num_trials: int
    metric: str = "zero_shot_top1"
    mode: str = "max"
    seed: int = 0
    scheduler: Any = None
    searcher: Any = None

    def __post_init__(self) -> None:
        if self.mode not in ("max", "min"):
            raise ConfigError(f"a search's mode is 'max' or 'min', got {self.mode!r}")
        if not self.space or self.num_trials < 1:
            raise ConfigError("a search needs a space of one field or more, and num_trials >= 1")
        for name in self.space:
            if name in NOT_SEARCHED or name.startswith("run."):
                head = name.partition(".")[0]
                raise ConfigError(f"{name!r} cannot be searched: {NOT_SEARCHED[head]}")
        for kind in type(self.scheduler).__mro__:
            if kind.__name__ in UNFIT:
                raise ConfigError(
                    f"{kind.__name__} {UNFIT[kind.__name__]}; use a scheduler that stops trials, "
                    "such as ASHAScheduler or MedianStoppingRule"
                )

    @property
    def is_steered(self) -> bool:
        """Whether a scheduler or searcher decides while the trials run."""
        return self.scheduler is not None or self.searcher is not None

    @property
    def fields(self) -> list[str]:
        """Returns the fields that differ between trials."""
        return [name for name, domain in self.space.items() if is_open(domain)]

    def log_fields(self) -> set[str]:
        """Returns the fields that are drawn on a logarithmic scale."""
        return {name for name, domain in self.space.items() if "LogUniform" in _sampler(domain)}

    def draw(self) -> list[Config]:
        """Returns distinct configurations, always the same ones for a seed."""
        from ray.tune.search import variant_generator

        drawn: list[Config] = []
        variants = cast(Any, variant_generator).generate_variants
        generator = np.random.default_rng(self.seed)
        with _seeded(self.seed):
            for _ in range(self.num_trials):
                for _, found in variants(dict(self.space), random_state=generator):
                    config = {name: plain(value) for name, value in found.items()}
                    if config not in drawn:
                        drawn.append(config)
        return drawn

    def constants(self) -> Config:
        """Returns the fields that have one value throughout."""
        return {name: value for name, value in self.space.items() if not is_open(value)}


def searched(
    search: Search,
    recipes: Sequence[Distill | Vlm],
    overrides: Mapping[str, Any],
    configs: Sequence[Config] | None,
) -> list[Trial]:
    """Returns one trial for each recipe and configuration, named by rounded values.

    Args:
        search: Draws the configurations where none are given.
        recipes: Recipes without open choices.
        overrides: What was set from outside.
        configs: What to set in each recipe.

    Raises:
        UnknownField: If a recipe has no such field.
        ConfigError: If what is searched was set from outside.
    """
    check_overrides(search, overrides)
    for recipe in recipes:
        for field in search.space:
            check_field(recipe, field)
    configs = search.draw() if configs is None else configs
    pairs = [(recipe, config) for recipe in recipes for config in configs]
    # Searched numbers are told on their own, not as parts of a loss or with all their digits.
    plain = [apply(recipe, _neutral(config)) for recipe, config in pairs]
    trials: list[Trial] = []
    for (recipe, config), told in zip(pairs, chosen_of(plain), strict=True):
        chosen = told | {f: rounded(config[f]) for f in search.fields if f not in ALWAYS}
        changed = apply(recipe, config)
        trials.append(Trial(name=name_of(chosen), recipe=changed, chosen=chosen))
    return trials


def check_overrides(search: Search, overrides: Mapping[str, Any]) -> None:
    """Refuses settings from outside of what the search varies.

    Raises:
        ConfigError: Naming the field.
    """
    given = set(overrides)
    for stage in VLM_STAGES:
        given |= {f"{stage}.{name}" for name in overrides.get(stage, {})}
    for field in search.space:
        if field in given or (field.partition(".")[0] in given - set(VLM_STAGES)):
            raise ConfigError(f"{field!r} cannot be set from outside: the sweep searches it")


def check_field(recipe: Distill | Vlm, field: str) -> None:
    """Refuses a field that a recipe does not have.

    Raises:
        UnknownField: With those that it has.
    """
    owner = _owner(recipe, field)
    head, _, rest = field.partition(".")
    part: Any = VLM_STAGES.get(head) if isinstance(owner, Vlm) else None
    if part is not None:
        if rest.partition(".")[0] not in part.model_fields:
            raise UnknownField(str(unknown_name(f"{head} field", rest, part.model_fields)))
        return
    if head not in type(owner).model_fields:
        raise UnknownField(str(unknown_name("recipe field", field, type(owner).model_fields)))
    if rest and not isinstance(getattr(owner, head), Mapping | Spec) and head != "loss":
        raise UnknownField(f"{head!r} has no parts, so {field!r} cannot be searched")
    if head == "loss" and rest:
        weights_for({rest: 1.0})  # names an unknown term


def apply(recipe: Distill | Vlm, config: Config) -> Distill | Vlm:
    """Returns a recipe with dotted fields set; in a VLM those of its student where it has none."""
    changes: dict[str, Any] = {}
    student: dict[str, Any] = {}
    for field, value in config.items():
        owner = _owner(recipe, field)
        known = changes if owner is recipe else student
        head, _, rest = field.partition(".")
        known[head] = _with(known.get(head, _value(owner, head)), rest, value) if rest else value
    if student and isinstance(recipe, Vlm) and isinstance(recipe.vision, Distill):
        changes["vision"] = recipe.vision.replace(**student)
    return recipe.replace(**changes)


def _owner(recipe: Distill | Vlm, field: str) -> Distill | Vlm:
    """Returns the recipe that a field belongs to."""
    own = field.partition(".")[0] in type(recipe).model_fields
    inner = getattr(recipe, "vision", None)
    return inner if not own and isinstance(inner, Distill) else recipe


def _value(recipe: Distill | Vlm, name: str) -> Any:
    """Returns a field; a loss as weights by term."""
    value = getattr(recipe, name)
    if name == "loss" and isinstance(value, str) and isinstance(recipe, Distill):
        return weights_for(value, LossFlags.for_mode(recipe.mode, **recipe.flags))
    return value


def _with(value: Any, path: str, new: Any) -> Any:
    """Returns a mapping or spec with something inside it changed."""
    head, _, rest = path.partition(".")
    if isinstance(value, Spec):
        return value.replace(**{head: _with(getattr(value, head), rest, new) if rest else new})
    if not isinstance(value, Mapping):
        raise ConfigError(f"{value!r} has no part {path!r}")
    known = cast("Mapping[str, Any]", value)
    return {**known, head: _with(known.get(head, {}), rest, new) if rest else new}


def _neutral(config: Config) -> Config:
    """Returns what a trial's name tells of a configuration by the names of its parts."""
    whole = {field: value for field, value in config.items() if field in ALWAYS}
    return whole | {field: 1.0 for field in config if field.startswith("loss.")}


def rounded(value: Any) -> Any:
    """Returns a value as people read it."""
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else label(value)


def is_open(domain: Any) -> bool:
    """Tells whether Tune would draw a value for this."""
    if isinstance(domain, Mapping):
        return "grid_search" in domain or "eval" in domain
    return hasattr(domain, "sample") and hasattr(domain, "is_function")


def describe_space(space: Mapping[str, Any]) -> dict[str, str]:
    """Puts a space in words that change with it, whatever Python runs it."""
    return {
        name: f"{type(domain).__name__} {getattr(domain, 'domain_str', domain)} {_sampler(domain)}"
        if is_open(domain) and not getattr(domain, "func", None)
        else str(label(domain))
        for name, domain in space.items()
    }


def _sampler(domain: Any) -> str:
    """Names how a domain is drawn; a quantized one as what it rounds."""
    sampler = getattr(domain, "sampler", None)
    return str(getattr(sampler, "sampler", sampler))


def plain(value: Any) -> Any:
    """Returns a number of Python's own in place of numpy's."""
    return cast(Any, value).item() if isinstance(value, np.generic) else value


@contextmanager
def _seeded(seed: int) -> Generator[None]:
    """Makes Python's and numpy's global generators repeat: `sample_from` functions use them."""
    states = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def followed_kind(search: Search) -> str:
    """Returns the kind of the stage whose journal a scheduler follows and whose run it may stop."""
    parts = (*VLM_STAGES, "llm", "recipe")
    return "finetune" if any(f.partition(".")[0] in parts for f in search.space) else "distill"
