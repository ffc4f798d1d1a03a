"""What stages cost: floating-point operations, bytes, and what a teacher cache saves.

Shape suffixes do not occur here; work is counted per sample in GFLOP, 2 per multiply-add.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from kdscale.core.config import Distill, Embed, TowerSpec
from kdscale.core.keys import content_key
from kdscale.stages.jobs import embed_recipe

EFFECTIVE_TFLOPS = 400.0
ASSUMED_VIEWS = 5  # MobileCLIP-DR (arXiv 2311.17049) finds 5 crops enough for some 30 epochs
_KEY_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class Work:
    """A recipe beside the amount of data that it runs over.

    Attributes:
        recipe: Resolved recipe.
        num_samples: Samples of the data set, None where nothing is known of it.
        total_steps: Optimizer steps, likewise.
    """

    recipe: Distill | Embed
    num_samples: int | None
    total_steps: int | None


@dataclass(frozen=True, kw_only=True)
class Saving:
    """The same distillations with the teacher online and from a cache.

    Attributes:
        online_flops: Student and teacher at every step.
        cached_flops: Student at every step, and each teacher once per view.
        bytes_stored: Size of all caches.
        views: Crops per sample; `ASSUMED_VIEWS` where a recipe draws a new one each epoch.
    """

    online_flops: float
    cached_flops: float
    bytes_stored: float
    views: tuple[int, ...]

    def document(self) -> dict[str, Any]:
        """Returns the comparison as JSON."""
        return {
            "online_gpu_hours": gpu_hours(self.online_flops),
            "cached_gpu_hours": gpu_hours(self.cached_flops),
            "bytes_stored": self.bytes_stored,
            "views": list(self.views),
        }


def gpu_hours(flops: float) -> float:
    """Returns hours on an accelerator that sustains `EFFECTIVE_TFLOPS`."""
    return flops / (EFFECTIVE_TFLOPS * 1e12) / 3600


def flops(work: Work) -> float | None:
    """Returns a stage's operations: student three times forward, an online teacher once."""
    recipe = work.recipe
    if isinstance(recipe, Embed):
        return _embed_flops(recipe, work.num_samples)
    own = _forward_gflop(recipe.student)
    online = recipe.teacher_outputs == "online"
    frozen = _forward_gflop(recipe.teacher) if online and recipe.teacher is not None else 0.0
    if own is None or frozen is None or work.total_steps is None:
        return None
    return (3 * own + frozen) * 1e9 * work.total_steps * recipe.global_batch_size


def bytes_out(work: Work) -> float | None:
    """Returns the size of a stage's output: the student in fp32, or fp16 embeddings."""
    recipe = work.recipe
    if isinstance(recipe, Embed):
        if work.num_samples is None:
            return None
        covered = min(work.num_samples, recipe.max_samples or work.num_samples)
        parts = recipe.views + recipe.captions
        wide = 2 * parts * recipe.teacher.embed_dim if parts else 4 * recipe.teacher.width
        return covered * (wide + _KEY_BYTES * max(1, parts))
    assert isinstance(recipe.student, TowerSpec)
    facts = recipe.student.facts
    if facts.image_mparams is None or facts.text_mparams is None:
        return None
    return 4e6 * (facts.image_mparams + facts.text_mparams)


def saving(works: Iterable[Work]) -> Saving | None:
    """Compares online with cached teachers for all distillations of a plan.

    Returns:
        None where no stage has a teacher, or a tower's work or the data are unknown.
    """
    online = cached = 0.0
    caches: dict[str, Work] = {}
    for work in works:
        recipe = work.recipe
        if not isinstance(recipe, Distill) or not isinstance(recipe.teacher, TowerSpec):
            continue
        views = recipe.views or ASSUMED_VIEWS
        both = [
            flops(Work(recipe=variant, num_samples=work.num_samples, total_steps=work.total_steps))
            for variant in (
                recipe.replace(teacher_outputs="online"),
                recipe.replace(teacher_outputs="cached", views=views),
            )
        ]
        if both[0] is None or both[1] is None:
            return None
        online, cached = online + both[0], cached + both[1]
        embed = embed_recipe(recipe.replace(views=views))
        key = content_key(embed.kind, embed.version, embed, {})
        caches[key] = Work(recipe=embed, num_samples=work.num_samples, total_steps=None)
    if not caches:
        return None
    stored = [bytes_out(work) for work in caches.values()]
    views_used = sorted({work.recipe.views or 0 for work in caches.values()})
    return Saving(
        online_flops=online,
        cached_flops=cached + sum(flops(work) or 0.0 for work in caches.values()),
        bytes_stored=sum(size or 0.0 for size in stored),
        views=tuple(views_used),
    )


def _embed_flops(recipe: Embed, num_samples: int | None) -> float | None:
    """Returns the operations of running a teacher over a data set once."""
    facts = recipe.teacher.facts
    if facts.image_gflop is None or facts.text_gflop is None or num_samples is None:
        return None
    each = max(1, recipe.views) * facts.image_gflop + recipe.captions * facts.text_gflop
    return each * 1e9 * min(num_samples, recipe.max_samples or num_samples)


def _forward_gflop(tower: Any) -> float | None:
    """Returns a pair's forward work per sample."""
    facts = tower.facts
    if facts.image_gflop is None or facts.text_gflop is None:
        return None
    return facts.image_gflop + facts.text_gflop
