"""The gate in a plan: a pretrained teacher must reach its published top-1 before it teaches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kdscale.core.config import STAGE_WEIGHTS, Distill, TowerSpec
from kdscale.core.scale import Scale, benchmark_of
from kdscale.core.storage import Storage
from kdscale.core.zero_shot_config import Gate, ZeroShotSet
from kdscale.data.evalsets import content_digest, find_eval_shards, num_items
from kdscale.data.labels import Labels
from kdscale.eval.classes import class_set
from kdscale.stages.inputs import Source, fingerprint, read_manifest
from kdscale.stages.labelled import files_of
from kdscale.sweep.absent import no_path

if TYPE_CHECKING:
    from kdscale.sweep.plan import Planner

FOR_GATES = "; the gates of pretrained teachers read it, --no-gates leaves them out"
BENCHMARK = "imagenet"  # the scale's zero-shot benchmark that published values are of


def add_gate(planner: Planner, recipe: Distill, path: list[str]) -> None:
    """Adds the gate of a distillation's teacher, shared by all that it teaches.

    Nothing is held against a teacher that a stage has trained, that is random or of which no
    published value is known. What is finished needs no gate; one that has passed is shown.

    Args:
        planner: Receives the stage.
        recipe: The distillation, resolved.
        path: The trial's, before anything that uses the teacher.
    """
    scale = planner.plan.scale
    if BENCHMARK in scale.zero_shot:  # its path is no mistake where no gate is left to pass
        planner.expect_data(scale.zero_shot[BENCHMARK].data.name)
    gate = gate_of(recipe, scale) if scale.gates else None
    if gate is None:
        return
    finished = planner.is_trained(recipe)
    if gate.data.urls is None:
        note = no_path(gate.data, scale, "labels") + FOR_GATES
        if not finished and note not in planner.plan.missing:
            planner.plan.missing.append(note)
    source = None if finished else planner.gate_source(gate)
    note = source and not_whole(gate, source)
    if note and note not in planner.plan.missing:
        planner.plan.missing.append(note)
    if not finished or planner.is_done(gate):
        planner.add_stage(Gate.kind, gate.tower.name, gate, path)


def gate_of(recipe: Distill, scale: Scale) -> Gate | None:
    """Returns the gate that a distillation would have to pass, None for none."""
    teacher = recipe.teacher
    # A path for all data sets is one of training data: it must be named for this one.
    named = {name: path for name, path in scale.data_paths.items() if name}
    spec = benchmark_of(scale.zero_shot.get(BENCHMARK), scale.replace(data_paths=named))
    if not isinstance(teacher, TowerSpec) or spec is None:
        return None
    published = teacher.facts.zero_shot_top1
    if (
        published is None
        or teacher.weights == "random"
        or teacher.weights.startswith(STAGE_WEIGHTS)
    ):
        return None
    if spec.classnames != "imagenet" or spec.templates == "mini":
        return None
    return Gate(
        tower=teacher,
        images=ZeroShotSet(name=spec.name, num_images=spec.data.num_samples),
        data=spec.data.replace(urls=_patterns(spec.data.urls)),
        templates=spec.templates,
        published=published,
        run=recipe.run,
    )


def _patterns(urls: str | None) -> str | None:
    """Names the shards of a manifest, which a set's reader does not know."""
    if urls is None or not urls.endswith(".json"):
        return urls
    shards = read_manifest(urls, content="labels").shards
    return "{" + ",".join(dict.fromkeys(shard.path for shard in shards)) + "}"


def gate_source(recipe: Gate, storage: Storage) -> Source:
    """Finds the set of a gate and names its content: every byte is read, once.

    Raises:
        NoShards: It is not there.
        DataError: It cannot be used; see `kdscale.data.evalsets`.
    """
    urls = recipe.data.urls
    assert urls is not None
    kept = "manifests", f"{fingerprint(files_of(urls))}-content.json"
    known: Any = storage.read_json(*kept) if storage.exists(*kept) else {}
    if "images" not in known:
        labels = Labels(class_set(recipe.images.classes), recipe.numbering, recipe.images.name)
        shards = find_eval_shards(urls, labels)
        images = sum(num_items(shard, labels) for shard in shards)
        known = {"digest": content_digest(shards), "shards": len(shards), "images": images}
        storage.write_json(known, *kept)
    count, shards = known["images"], known["shards"]
    return Source(recipe.data, storage, count, shards, known["digest"], "labels")


def not_whole(recipe: Gate, source: Source) -> str | None:
    """Says that a gate's set lacks images, without which it decides nothing; None where all are."""
    wanted = recipe.images.num_images
    if wanted in (None, source.num_samples):
        return None
    return (
        f"{recipe.data.urls} holds {source.num_samples:,} of the {wanted:,} images of "
        f"{recipe.images.name}: a gate needs them all; complete them, or say --no-gates"
    )
