"""Before a run: everything that its stages read is drawn and verified."""

from __future__ import annotations

from typing import Any

from kdscale.core.answers_config import Answers
from kdscale.core.config import Distill
from kdscale.core.eval_config import Cka
from kdscale.core.storage import Storage
from kdscale.core.types import MissingBenchmark
from kdscale.core.vlm_config import Evaluate, Language, VlmStage
from kdscale.core.zero_shot_config import Gate
from kdscale.data.shards import Content, check_labels
from kdscale.stages.images import NOT_AT_HAND, find_images
from kdscale.stages.inputs import content_of, find_source, questions_file
from kdscale.sweep.outcomes import num_classes
from kdscale.sweep.plan import Plan


def prepare(plan: Plan, progress: Any) -> None:
    """Draws and verifies all data that the remaining stages read, before any trial starts.

    Raises:
        NoShards: If data are not at hand.
        StageFailed: Never; kept apart from trials so that data errors name the data.
    """
    for stage in plan.remaining():
        recipe = stage.recipe
        if isinstance(recipe, Answers):
            if recipe.questions == NOT_AT_HAND:
                raise MissingBenchmark(
                    f"where are the files of benchmark {recipe.benchmark}? Say --data NAME=DIR, "
                    "NAME being the suite's"
                )
        elif isinstance(recipe, Evaluate):
            questions_file(recipe.questions.mini, plan.storage, progress)
        elif isinstance(recipe, Cka):
            find_images(recipe.images, plan.storage)
        elif not isinstance(
            recipe, Gate | Language
        ):  # images are known, text is made as it is read
            _prepare_training(recipe, plan.storage, progress)


def _prepare_training(recipe: Any, storage: Storage, progress: Any) -> None:
    """Draws and verifies what a stage trains on or embeds, and its benchmark."""
    if isinstance(recipe, VlmStage):
        from kdscale.stages.streams import vlm_inputs

        vlm_inputs(recipe)  # refuses a template that teaches nothing with this tokenizer
    wanted: list[tuple[Any, Content]] = [(recipe.data, content_of(recipe))]
    if isinstance(recipe, Distill) and recipe.zero_shot is not None:
        zero_shot: Any = recipe.zero_shot
        wanted.append((zero_shot.data, "labels"))
    for spec, needed in wanted:
        source = find_source(spec, storage, content=needed, progress=progress)
        manifest = source.manifest(progress)
        if needed == "labels" and isinstance(recipe, Distill):
            benchmark: Any = recipe.zero_shot
            check_labels(manifest, num_classes(benchmark), benchmark.name)
