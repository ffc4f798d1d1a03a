"""The stages of a VLM trial: student, projector, fine-tuning, questions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kdscale.core.config import STAGE_WEIGHTS, Distill, Pretrained, TowerSpec
from kdscale.core.scale import (
    Scale,
    known_questions,
    language_model,
    lookup,
    resolve_vlm,
    student_tower,
)
from kdscale.core.types import unknown_name
from kdscale.core.vlm_config import (
    FEATURES_STAGE,
    Evaluate,
    Features,
    Finetune,
    Language,
    LanguageModelSpec,
    Pretrain,
    QuestionsSpec,
    Vlm,
    VlmStage,
)
from kdscale.core.vlm_recipes import VLM_RECIPES
from kdscale.stages.jobs import vlm_features
from kdscale.sweep.check import check_stages, check_vlm
from kdscale.sweep.suite import add_suite, suite_of

if TYPE_CHECKING:
    from kdscale.sweep.plan import Planner


def add_vlm(planner: Planner, recipe: Vlm, name: str, path: list[str]) -> TowerSpec:
    """Adds the stages of a VLM and, before them, those of its tower, which it returns.

    Raises:
        UnknownName: If a role or the recipe's name is not known.
        ConfigError: If a stage cannot run.
    """
    # Features come before both, so that the stages that train stay neighbours: they share workers.
    first, second = (_cached(planner, stage, path) for stage in _stages(planner, recipe, path))
    planner.add_stage("pretrain", name, first, path)
    key = planner.add_stage("finetune", name, second, path)
    questions = _questions(planner, recipe)
    if questions is not None:
        ask = Evaluate(model=f"{STAGE_WEIGHTS}finetune/{key}", questions=questions, run=second.run)
        planner.add_stage("evaluate", name, ask, path)
    suite = suite_of(recipe.suite, planner.plan.scale)
    if suite is not None:
        add_suite(planner, suite, f"{STAGE_WEIGHTS}finetune/{key}", second.run, path)
    assert isinstance(first.vision, TowerSpec)
    return first.vision


def _stages(planner: Planner, recipe: Vlm, path: list[str]) -> tuple[VlmStage, VlmStage]:
    """Returns both stages that train, resolved; adds those that train the tower."""
    scale = planner.plan.scale
    if recipe.recipe not in VLM_RECIPES:
        raise unknown_name("VLM recipe", recipe.recipe, VLM_RECIPES)
    shared: dict[str, Any] = {
        "vision": tower_of(planner, recipe, path),
        "llm": language_of(planner, recipe.llm, path),
        "seed": recipe.seed,
    }
    run: dict[str, Any] = {"run": recipe.run}
    settings = VLM_RECIPES[recipe.recipe]
    limits = {k: v for k, v in planner.overrides.items() if k in ("max_steps", "run")}
    first = Pretrain(**run | settings[0] | recipe.pretrain | shared)
    first = resolve_vlm(first, scale, limits | _set(planner, "pretrain"), recipe.pretrain)
    check_vlm(first)
    projector = f"{STAGE_WEIGHTS}pretrain/{planner.key_of('pretrain', first)}"
    second = Finetune(**run | settings[1] | recipe.finetune | shared, projector=projector)
    second = resolve_vlm(second, scale, limits | _set(planner, "finetune"), recipe.finetune)
    check_vlm(second)
    check_stages(first, second)
    return first, second


def _questions(planner: Planner, recipe: Vlm) -> QuestionsSpec | None:
    """Returns what a VLM is asked; notes questions that only another scale has."""
    scale = planner.plan.scale
    found: QuestionsSpec | None = lookup("questions", recipe.questions, known_questions(scale))
    if found is None and recipe.questions is not None:
        note = f"questions {recipe.questions!r} are not asked: the scale {scale.name!r} has none"
        if note not in planner.plan.notes:
            planner.plan.notes.append(note)
    return found


def _cached(planner: Planner, stage: VlmStage, path: list[str]) -> VlmStage:
    """Adds the stage that computes a VLM stage's features, and names it in the recipe.

    A finished stage needs none; they may have been removed since.
    """
    if not stage.feature_cache or planner.is_done(stage):
        return stage
    features = vlm_features(stage)
    name = f"{features.vision.name} on {features.data.name}"
    key = planner.add_stage(Features.kind, name, features, path)
    return stage.replace(features=FEATURES_STAGE + key)


def tower_of(planner: Planner, recipe: Vlm, path: list[str]) -> TowerSpec:
    """Returns a VLM's tower; adds the stages that train it where there are some."""
    vision = recipe.vision
    if isinstance(vision, Distill):
        return planner.distill(vision, f"student of {recipe.recipe}", path)
    return tower_named(planner, vision, path)


def tower_named(
    planner: Planner, value: str | TowerSpec | Pretrained, path: list[str]
) -> TowerSpec:
    """Returns the tower that a role means; adds the stage that trains it where there is one.

    Raises:
        UnknownName: If the role is not known.
        WeightsError: If a student trained elsewhere is not there.
    """
    if isinstance(value, Pretrained):
        return student_tower(value, planner.plan.scale)
    if isinstance(value, TowerSpec):
        return value
    known = towers(planner.plan.scale)
    if value not in known:
        raise unknown_name("tower", value, known)
    found = known[value]
    if isinstance(found, Distill):
        tower = planner.teacher(Distill(student="vit_t16", teacher=value, loss="kl"), path)
        assert tower is not None
        return tower
    return found.replace(weights="random") if planner.plan.scale.random_weights else found


def language_of(
    planner: Planner, value: str | LanguageModelSpec, path: list[str]
) -> LanguageModelSpec:
    """Returns a VLM's language model; adds the stage that trains it where there is one."""
    found = language_model(value, planner.plan.scale)
    if isinstance(found, LanguageModelSpec):
        return found
    assert found.run is not None
    run = found.run.replace(**planner.overrides.get("run", {})).replace(num_workers=0)
    found = found.replace(run=run)
    own: list[str] = []  # it needs nothing of what comes before it
    key = planner.add_stage(Language.kind, found.llm.name, found, own)
    path += own
    return found.llm.replace(weights=f"{STAGE_WEIGHTS}language/{key}", config=None)


def towers(scale: Scale) -> dict[str, TowerSpec | Distill]:
    """Returns every tower that a VLM may name: teachers and untrained students."""
    return {**scale.students, **scale.teachers}


def _set(planner: Planner, kind: str) -> dict[str, Any]:
    """Returns the settings of one stage from outside (`--set finetune.lr=1e-4`)."""
    return dict(planner.overrides.get(kind, {}))
