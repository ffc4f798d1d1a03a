"""From planned stages to what their workers are told: data found again, the record begun."""

from __future__ import annotations

import os
import subprocess
from importlib.metadata import version
from typing import Any

import kdscale
from kdscale.core.config import DataSpec, Embed, TowerSpec
from kdscale.core.eval_config import Cka
from kdscale.core.storage import Storage
from kdscale.core.types import ShardChanged
from kdscale.core.vlm_config import Evaluate, Features, Language, VlmStage
from kdscale.core.zero_shot_config import Gate
from kdscale.data.shards import Manifest
from kdscale.stages.images import find_images
from kdscale.stages.inputs import content_of, find_source, questions_file
from kdscale.stages.jobs import (
    CkaJob,
    DistillJob,
    EmbedJob,
    EvaluateJob,
    FeaturesJob,
    GateJob,
    LanguageJob,
    ShardJob,
    VlmJob,
)
from kdscale.sweep.amounts import total_steps
from kdscale.sweep.plan import Stage

OtherJob = EvaluateJob | CkaJob | GateJob | LanguageJob


def group_job(stage: Stage, token: str, storage: Storage) -> DistillJob | VlmJob | OtherJob:
    """Returns what a group of workers is told."""
    if isinstance(stage.recipe, Evaluate | Cka | Gate | Language):
        return _other_job(stage, token, storage)
    return _training_job(stage, token, storage)


def _other_job(stage: Stage, token: str, storage: Storage) -> OtherJob:
    """Returns what those are told who read no stream."""
    recipe, record = stage.recipe, record_of(stage)
    if isinstance(recipe, Cka):
        if isinstance(recipe.images, DataSpec) and stage.data_hash is not None:
            checked(stage, find_source(recipe.images, storage, content="labels").manifest())
        images = find_images(recipe.images, storage)
        return CkaJob(stage.key, storage.root, recipe, images, record, token)
    if isinstance(recipe, Gate):
        return GateJob(stage.key, storage.root, recipe, record, token)
    if isinstance(recipe, Language):
        return LanguageJob(stage.key, storage.root, recipe, record, token)
    assert isinstance(recipe, Evaluate)
    place = questions_file(recipe.questions.mini, storage)
    return EvaluateJob(stage.key, storage.root, recipe, place, record, token)


def _training_job(stage: Stage, token: str, storage: Storage) -> DistillJob | VlmJob:
    """Returns what those are told who read one."""
    recipe: Any = stage.recipe
    data = _data_of(stage, storage)
    steps = total_steps(recipe, data.num_samples)
    record = record_of(stage, data) | {"total_steps": steps}
    if isinstance(recipe, VlmStage):
        record |= {"features": recipe.features}  # not in the key, and so not in the recipe's words
        from kdscale.stages.streams import vlm_inputs

        inputs = vlm_inputs(recipe)
        return VlmJob(
            stage.kind, stage.key, storage.root, recipe, steps, data, inputs, record, token
        )
    zero_shot = recipe.zero_shot
    benchmark = zero_shot and find_source(zero_shot.data, storage, content="labels").manifest()
    return DistillJob(
        kind=stage.kind,
        key=stage.key,
        storage_root=storage.root,
        recipe=recipe,
        total_steps=steps,
        data=data,
        zero_shot_data=benchmark,
        record=record,
        lease=token,
    )


def _data_of(stage: Stage, storage: Storage) -> Manifest:
    """Returns the data of a stage."""
    recipe: Any = stage.recipe
    source = find_source(recipe.data, storage, content=content_of(recipe))
    return checked(stage, source.manifest())


def checked(stage: Stage, data: Manifest) -> Manifest:
    """Returns the data if they are still those that the stage's key stands for.

    Raises:
        ShardChanged: They are not.
    """
    if stage.data_hash not in (None, data.hash):
        raise ShardChanged(
            f"the data of {stage.kind} {stage.name!r} have changed since the plan was made "
            f"(manifest {data.hash[:12]} instead of {str(stage.data_hash)[:12]}): run it again"
        )
    return data


def shard_job(stage: Stage, token: str, storage: Storage) -> ShardJob:
    """Returns what those are told who work shard by shard."""
    recipe, data = stage.recipe, _data_of(stage, storage)
    record = record_of(stage, data)
    if isinstance(recipe, Features):
        return FeaturesJob(stage.key, storage.root, recipe, data, record, token)
    assert isinstance(recipe, Embed)
    return EmbedJob(stage.key, storage.root, recipe, data, record, token)


def record_of(stage: Stage, data: Manifest | None = None) -> dict[str, Any]:
    """Returns what `stage.json` says of a stage before it runs."""
    teacher = getattr(stage.recipe, "teacher", None)
    packages = ("torch", "ray", "open_clip_torch", "timm", "transformers", "peft", "deepspeed")
    return {
        "kind": stage.kind,
        "key": stage.key,
        "name": stage.name,
        "inputs": list(stage.inputs),
        **stage.identity,
        "urls": getattr(getattr(stage.recipe, "data", None), "urls", None),
        "teacher": teacher.name if isinstance(teacher, TowerSpec) else None,
        "manifest": data and data.hash,
        "quarantined": data.causes() if data else {},
        "versions": {name: version(name) for name in packages} | {"kdscale": kdscale.__version__},
        "git": git_revision(),
    }


def git_revision() -> str | None:
    """Returns the checked-out revision of the source tree, None outside one."""
    root = os.path.dirname(os.path.dirname(kdscale.__file__))
    found = subprocess.run(
        ["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or None
