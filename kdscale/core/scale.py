"""Scales: what the roles of a recipe mean, at true size or in miniature.

A sweep names roles (`teacher="clip_l14"`, `data="cc12m"`); a scale maps each to a spec and
shrinks the recipe's sizes. Scale is data: the same code runs both.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from kdscale.core import catalog, catalog_mini
from kdscale.core.config import (
    DataSpec,
    Distill,
    Execution,
    Precision,
    Pretrained,
    Spec,
    TowerSpec,
    ZeroShotSpec,
)
from kdscale.core.types import ConfigError, WeightsError, unknown_name
from kdscale.core.vlm_config import (
    Language,
    LanguageModelSpec,
    Lora,
    QuestionsSpec,
    SuiteSpec,
    VlmStage,
)


class Sizes(Spec):
    """How a scale shrinks the sizes that a recipe states at paper scale."""

    batch_divisor: int = Field(default=1, gt=0)
    epoch_divisor: int = Field(default=1, gt=0)
    warmup_divisor: int = Field(default=1, gt=0)
    lr_factor: float = Field(default=1.0, gt=0)


class VlmSizes(Spec):
    """How a scale shrinks a VLM stage.

    Attributes:
        fields: Fields set whatever the named recipe says; a sweep's own settings stay.
        lr_factor: Multiplies its learning rates.
        lora_lr_factor: The same for the rate of LoRA adapters, which is ten times a whole model's
            at the paper's size.
        lora_divisor: Divides rank and alpha of adapters: of rank 128 they are no smaller than the
            matrices of a miniature model.
    """

    fields: dict[str, Any] = Field(default_factory=dict)
    lr_factor: float = Field(default=1.0, gt=0)
    lora_lr_factor: float = Field(default=1.0, gt=0)
    lora_divisor: int = Field(default=1, gt=0)


class Scale(Spec):
    """A meaning for every role.

    Attributes:
        precision: Precision of every stage whose recipe names none.
        random_weights: Replace every pretrained weight by a random one (walks, photographs).
        teachers: Role to tower, or to the recipe of the stage that trains it; so are language
            models.
        data_paths: Where the user's shards are, by data set; "" for every set without a path.
        vlm_sizes: What becomes of `pretrain` and `finetune` stages.
        vlm_run: Execution of the VLM stages, None for that of the others.
        gates: Hold every pretrained teacher against its published top-1 on `zero_shot["imagenet"]`
            before anything is distilled from it.
    """

    name: str
    precision: Precision
    random_weights: bool = False
    teachers: dict[str, TowerSpec | Distill]
    students: dict[str, TowerSpec]
    data: dict[str, DataSpec]
    zero_shot: dict[str, ZeroShotSpec]
    data_paths: dict[str, str] = Field(default_factory=dict)
    language_models: dict[str, LanguageModelSpec | Language] = Field(default_factory=dict)
    questions: dict[str, QuestionsSpec] = Field(default_factory=dict)
    suites: dict[str, SuiteSpec] = Field(default_factory=dict)
    sizes: Sizes = Sizes()
    vlm_sizes: dict[str, VlmSizes] = Field(default_factory=dict)
    run: Execution = Execution()
    vlm_run: Execution | None = None
    gates: bool = True


PAPER = Scale(
    name="paper",
    precision="fp16",
    teachers=dict(catalog.TEACHERS),
    students=dict(catalog.STUDENTS),
    data=dict(catalog.DATA),
    zero_shot=dict(catalog.ZERO_SHOT),
    language_models=dict(catalog.LANGUAGE_MODELS),
    suites={"paper16": SuiteSpec(name="paper16")},
    run=Execution(
        num_workers=16, cpus_per_worker=2, gpus_per_worker=1, cpus_per_data_task=1, data_cpus=64
    ),
    vlm_run=Execution(
        num_workers=4,
        cpus_per_worker=2,
        gpus_per_worker=1,
        cpus_per_data_task=1,
        data_cpus=16,
        deepspeed=True,
    ),
)
MINI = Scale(
    name="mini",
    precision="fp32",
    teachers=dict(catalog_mini.MINI_TEACHERS),
    students=dict(catalog_mini.MINI_STUDENTS),
    data=dict(catalog_mini.MINI_DATA),
    zero_shot=dict(catalog_mini.MINI_ZERO_SHOT),
    language_models=dict(catalog_mini.MINI_LANGUAGE_MODELS),
    questions=dict(catalog_mini.MINI_QUESTIONS),
    suites=dict(catalog_mini.MINI_SUITES),
    sizes=Sizes(**catalog_mini.MINI_SIZES),
    vlm_sizes={kind: VlmSizes(**sizes) for kind, sizes in catalog_mini.MINI_VLM_SIZES.items()},
    run=Execution(
        num_workers=0,
        cpus_per_worker=0.5,
        threads_per_worker=1,
        checkpoint_every=32,
        log_every=8,
    ),
    vlm_run=Execution(
        num_workers=0,
        cpus_per_worker=0.5,
        threads_per_worker=2,
        checkpoint_every=128,
        log_every=8,
    ),
)
TRUE_SIZE_CPU = PAPER.replace(
    name="true_size_cpu",
    precision="fp32",
    random_weights=True,
    vlm_sizes={
        kind: VlmSizes(fields={"precision": "fp32", "global_batch_size": 2, "micro_batch_size": 2})
        for kind in ("pretrain", "finetune")
    },
    run=Execution(
        num_workers=2,
        cpus_per_worker=0.5,
        checkpoint_every=5,
        log_every=1,
    ),
    vlm_run=Execution(num_workers=0, cpus_per_worker=0.5, checkpoint_every=5, log_every=1),
)
SCALES = {scale.name: scale for scale in (PAPER, MINI, TRUE_SIZE_CPU)}


def scale_named(name: str | Scale) -> Scale:
    """Returns a scale by name; a `Scale` object is returned as it is."""
    if isinstance(name, Scale):
        return name
    if name not in SCALES:
        raise unknown_name("scale", name, SCALES)
    return SCALES[name]


def resolve(recipe: Distill, scale: Scale, overrides: Mapping[str, Any] | None = None) -> Distill:
    """Replaces roles by specs and shrinks sizes; teacher roles that are stages stay roles.

    Args:
        recipe: A recipe without open choices.
        scale: What the roles mean.
        overrides: Fields set last, after shrinking (`--set`); a mapping under `run` changes
            single fields of the execution that the recipe or else the scale has.

    Returns:
        The recipe; `bn_group` is a number, at most the batch.

    Raises:
        UnknownName: If a role is not in the scale.
        ConfigError: If an override does not validate.
    """
    sizes = scale.sizes
    read = recipe.read_epoch
    changes: dict[str, Any] = {
        "student": student_tower(recipe.student, scale),
        "data": with_path(lookup("data set", recipe.data, scale.data), scale),
        "zero_shot": benchmark_of(recipe.zero_shot, scale),
        "precision": recipe.precision or scale.precision,
        "epochs": math.ceil(recipe.epochs / sizes.epoch_divisor),
        "keep_epochs": tuple(math.ceil(kept / sizes.epoch_divisor) for kept in recipe.keep_epochs),
        "read_epoch": read and math.ceil(read / sizes.epoch_divisor),
        "global_batch_size": math.ceil(recipe.global_batch_size / sizes.batch_divisor),
        "warmup_steps": math.ceil(recipe.warmup_steps / sizes.warmup_divisor),
        "lr": recipe.lr * sizes.lr_factor,
        "run": recipe.run or scale.run,
    } | dict(overrides or {})
    if isinstance(changes["run"], Mapping):
        changes["run"] = (recipe.run or scale.run).replace(**changes["run"])
    resolved = recipe.replace(**changes)
    batch = resolved.global_batch_size
    group = resolved.bn_group or default_bn_group(batch)
    return resolved.replace(bn_group=max(2, min(group, batch)), **_early(resolved))


def _early(resolved: Distill) -> dict[str, Any]:
    """Adds the epoch that is read to those kept; the last one's student is the stage's own."""
    read = resolved.read_epoch
    wanted = {*resolved.keep_epochs, *(() if read is None else (read,))} - {resolved.epochs}
    return {"keep_epochs": tuple(sorted(wanted)), "read_epoch": read if read in wanted else None}


def resolve_vlm(
    stage: VlmStage,
    scale: Scale,
    overrides: Mapping[str, Any],
    said: Container[str] = (),
) -> VlmStage:
    """Fills in a VLM stage's data, sizes, precision and execution; models are specs already.

    Args:
        stage: A stage without open choices.
        scale: What the roles mean.
        overrides: Fields set last; a mapping under `run` changes single fields of the execution.
        said: Fields that the sweep itself sets: the scale leaves them as they are, but for
            learning rates, which are stated at paper scale.

    Raises:
        UnknownName: If the data's role is not in the scale.
        ConfigError: If an override does not validate.
    """
    overrides = dict(overrides)
    # What a scale does depends on these.
    first = ("data", "trainable", "lora")
    sizes = scale.vlm_sizes.get(stage.kind, VlmSizes())
    adapters = None if "lora" in overrides else _adapters(stage, sizes.lora_divisor)
    stage = stage.replace(**{name: overrides.pop(name) for name in first if name in overrides})
    run = stage.run or scale.vlm_run or scale.run
    projector_lr = stage.projector_lr and stage.projector_lr * sizes.lr_factor
    factor = sizes.lr_factor if stage.lora is None else sizes.lora_lr_factor
    changes: dict[str, Any] = {
        "data": with_path(lookup("data set", stage.data, scale.data), scale),
        "precision": stage.precision or scale.precision,
        "lr": stage.lr * factor,
        "projector_lr": projector_lr,
        "run": run,
    }
    fields = sizes.fields | ({} if adapters is None else {"lora": adapters})
    changes |= {name: value for name, value in fields.items() if name not in said}
    changes |= overrides
    if isinstance(changes["run"], Mapping):
        changes["run"] = run.replace(**changes["run"])
    return stage.replace(**changes)


def _adapters(stage: VlmStage, divisor: int) -> Lora | None:
    """Returns a stage's adapters with rank and alpha divided; None where it has none."""
    if stage.lora is None:
        return None
    rank, alpha = (math.ceil(size / divisor) for size in (stage.lora.rank, stage.lora.alpha))
    return stage.lora.replace(rank=rank, alpha=alpha)


def language_model(value: str | LanguageModelSpec, scale: Scale) -> LanguageModelSpec | Language:
    """Returns the language model that a role means, or the recipe of the stage that trains it.

    Where the scale draws weights, its config gives the dimensions, and the miniature tokenizer
    stands in for one that would have to be downloaded.
    """
    spec: LanguageModelSpec | Language = lookup("language model", value, scale.language_models)
    if isinstance(spec, Language):
        run = (spec.run or scale.vlm_run or scale.run).replace(num_workers=0)
        return spec.llm if scale.random_weights else spec.replace(run=run)
    if not scale.random_weights or spec.config is None:
        return spec
    return spec.replace(weights="random", tokenizer=spec.tokenizer or "mini_lm")


def default_bn_group(global_batch_size: int) -> int:
    """Returns how many samples share BatchNorm statistics where a recipe does not say.

    The group divides the share of each of 1, 2, 4 or 8 workers, as far as they divide the batch,
    so that their number stays free: the largest power of two, at most 256, that divides an eighth
    of the batch (or a quarter or half where there is no eighth), and at least 2.
    """
    group = math.gcd(256, global_batch_size // math.gcd(global_batch_size, 8))
    if group > 1:
        return group
    return 2 if global_batch_size % 2 == 0 else max(2, global_batch_size)


def teacher_of(recipe: Distill, scale: Scale) -> TowerSpec | Distill | None:
    """Returns what a recipe's teacher stands for: a tower, the recipe that trains it, or None."""
    if not isinstance(recipe.teacher, str):
        return recipe.teacher
    found = lookup("teacher", recipe.teacher, scale.teachers)
    if isinstance(found, TowerSpec) and scale.random_weights:
        return found.replace(weights="random")
    return found


def with_path(spec: DataSpec, scale: Scale) -> DataSpec:
    """Fills in where a data set's shards are, as the user said.

    Raises:
        ConfigError: If there is a path for one that is drawn.
    """
    path = path_of(spec, scale)
    if spec.mini is not None:
        return spec
    return spec.replace(urls=path or spec.urls or scale.data_paths.get(""))


def path_of(spec: DataSpec | SuiteSpec, scale: Scale) -> str | None:
    """Returns the path that the user gave for a data set or a suite, None where there is none.

    Raises:
        ConfigError: If it is drawn, and no path is read.
    """
    name = next((name for name in data_names(spec, scale) if name in scale.data_paths), None)
    if name is None:
        return None
    if spec.mini is not None:
        raise ConfigError(
            f"--data {name}={scale.data_paths[name]}: {spec.name!r} is drawn at the scale "
            f"{scale.name!r}, and no path is read for it; leave it out, or choose another --scale"
        )
    return scale.data_paths[name]


def data_names(spec: DataSpec | SuiteSpec, scale: Scale) -> list[str]:
    """Returns what a data set or a suite may be called where its path is given: name, or role."""
    known = scale.suites if isinstance(spec, SuiteSpec) else scale.data
    return [spec.name, *(role for role, found in known.items() if found.name == spec.name)]


def benchmark_of(value: str | ZeroShotSpec | None, scale: Scale) -> ZeroShotSpec | None:
    """Looks a zero-shot benchmark up and fills in its path."""
    spec = lookup("zero-shot benchmark", value, scale.zero_shot)
    return spec and spec.replace(data=with_path(spec.data, scale))


def known_questions(scale: Scale) -> dict[str, QuestionsSpec | None]:
    """Returns every role of questions; None stands for those that this scale does not have."""
    elsewhere = (role for known in SCALES.values() for role in known.questions)
    return dict.fromkeys(elsewhere) | scale.questions


def lookup(kind: str, value: Any, registry: Mapping[str, Any]) -> Any:
    """Returns the registry's entry for a name; specs and None pass through."""
    if not isinstance(value, str):
        return value
    if value not in registry:
        raise unknown_name(kind, value, registry)
    return registry[value]


def student_tower(value: str | TowerSpec | Pretrained, scale: Scale) -> TowerSpec:
    """Looks a student up and drops its weights where the scale asks for random ones.

    Raises:
        UnknownName: If a role is not in the scale.
        WeightsError: If a student trained elsewhere is not there.
    """
    own = value.student if isinstance(value, Pretrained) else value
    spec: TowerSpec = lookup("student", own, scale.students)
    if scale.random_weights:
        return spec.replace(weights="random")
    if not isinstance(value, Pretrained):
        return spec
    path = Path(value.path).expanduser().absolute()  # Ray's processes work elsewhere
    if not path.exists():
        raise WeightsError(
            f"{path} does not exist; Pretrained takes a directory in the hub's layout or a "
            "checkpoint file (--random-weights does without)"
        )
    return spec.replace(weights=str(path))
