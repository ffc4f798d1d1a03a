"""What stages cost: floating-point operations, bytes, and what caches of frozen towers save.

Shape suffixes do not occur here; work is counted per sample in GFLOP, 2 per multiply-add.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from kdscale.core.config import Distill, Embed, Recipe, TowerSpec
from kdscale.core.eval_config import Cka
from kdscale.core.keys import content_key
from kdscale.core.vlm_config import Features, Language, LanguageModelSpec, VlmStage
from kdscale.core.zero_shot_config import Gate
from kdscale.stages.jobs import embed_recipe, vlm_features
from kdscale.sweep.prices import Rates

ASSUMED_VIEWS = 5  # MobileCLIP-DR (arXiv 2311.17049) finds 5 crops enough for some 30 epochs
PRETRAIN_TOKENS, FINETUNE_TOKENS = 30, 300  # of text, on average
QUESTION_TOKENS, ANSWER_TOKENS = 80, 10  # of text: a question with options, a few words
_KEY_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class Work:
    """A recipe beside the amount of data that it runs over.

    Attributes:
        recipe: Resolved recipe.
        num_samples: Samples of the data set, None where nothing is known of it.
        total_steps: Optimizer steps, likewise.
    """

    recipe: Recipe
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

    def document(self, rates: Rates) -> dict[str, Any]:
        """Returns the comparison as JSON."""
        compared = _compared(self.online_flops, self.cached_flops, rates)
        return compared | {"bytes_stored": self.bytes_stored, "views": list(self.views)}


@dataclass(frozen=True, kw_only=True)
class FeatureSaving:
    """The same VLM stages with the tower online and from a feature cache.

    Attributes:
        online_flops: Everything at every step.
        cached_flops: All but the tower at every step, and each tower once per sample.
        bytes_stored: Size of all caches, were there an image in every sample.
        share_saved: {kind of stage: the tower's share of its work}.
    """

    online_flops: float
    cached_flops: float
    bytes_stored: float
    share_saved: dict[str, float]

    def document(self, rates: Rates) -> dict[str, Any]:
        """Returns the comparison as JSON."""
        compared = _compared(self.online_flops, self.cached_flops, rates)
        return compared | {"bytes_stored": self.bytes_stored, "share_saved": self.share_saved}


def flops(work: Work) -> float | None:
    """Returns a stage's operations: student three times forward, an online teacher once."""
    recipe = work.recipe
    if isinstance(recipe, Embed):
        return _embed_flops(recipe, work.num_samples)
    if isinstance(recipe, Features):
        gflop, count = recipe.vision.facts.image_gflop, work.num_samples
        return None if gflop is None or count is None else gflop * 1e9 * count
    if isinstance(recipe, VlmStage):
        return _vlm_flops(recipe, work.total_steps)
    if isinstance(recipe, Language):
        tokens = recipe.num_steps * recipe.batch_size * recipe.block_tokens
        return 6e6 * recipe.llm.mparams * tokens
    if isinstance(recipe, Cka | Gate):
        return _forward_flops(recipe, work.num_samples)
    if not isinstance(recipe, Distill):
        return 0.0  # a few thousand short answers; those to benchmarks: `answers_flops`
    own = _forward_gflop(recipe.student)
    online = recipe.teacher_outputs == "online"
    frozen = _forward_gflop(recipe.teacher) if online and recipe.teacher is not None else 0.0
    if own is None or frozen is None or work.total_steps is None:
        return None
    return (3 * own + frozen) * 1e9 * work.total_steps * recipe.global_batch_size


def answers_flops(model: VlmStage, num_questions: int, *, blind: bool) -> float | None:
    """Returns the operations of asking a VLM a benchmark.

    Forward alone: 2 operations a parameter of the language model and token, read or written, and
    the tower once a question; projectors and attention are left out. Assumed are an image in every
    question with all its tokens in the prompt, `QUESTION_TOKENS` of text and `ANSWER_TOKENS` of
    answer; OCR lists (TextVQA) and reasoning (MathVista) cost more. Padding is not counted, nor
    that decoding token by token uses a GPU badly.

    Args:
        model: The stage that trains it.
        num_questions: Questions of the benchmark.
        blind: Without the images.

    Returns:
        None where the tower's work is not known.
    """
    tower, llm = model.vision, model.llm
    assert isinstance(tower, TowerSpec)
    assert isinstance(llm, LanguageModelSpec)
    if tower.facts.image_gflop is None:
        return None
    seen = 0 if blind else image_tokens(tower, model.hierarchical_tokens)
    looking = 0.0 if blind else tower.facts.image_gflop * 1e9
    tokens = seen + QUESTION_TOKENS + ANSWER_TOKENS
    return num_questions * (2 * llm.mparams * 1e6 * tokens + looking)


def bytes_out(work: Work) -> float | None:
    """Returns the size of a stage's output: its students in fp32, or fp16 embeddings."""
    recipe = work.recipe
    if isinstance(recipe, Embed):
        if work.num_samples is None:
            return None
        covered = min(work.num_samples, recipe.max_samples or work.num_samples)
        parts = recipe.views + recipe.captions
        wide = 2 * parts * recipe.teacher.embed_dim if parts else 4 * recipe.teacher.width
        return covered * (wide + _KEY_BYTES * max(1, parts))
    if isinstance(recipe, Features):
        if work.num_samples is None:
            return None
        return float(work.num_samples * _feature_bytes(recipe))
    if isinstance(recipe, VlmStage | Language):
        model: Any = recipe.llm
        return 4e6 * model.mparams
    if not isinstance(recipe, Distill):
        return 0.0
    assert isinstance(recipe.student, TowerSpec)
    facts = recipe.student.facts
    if facts.image_mparams is None or facts.text_mparams is None:
        return None
    students = 1 + len(recipe.keep_epochs)
    return 4e6 * students * (facts.image_mparams + facts.text_mparams)


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
    views_used = sorted({views_of(work.recipe) for work in caches.values()})
    return Saving(
        online_flops=online,
        cached_flops=cached + sum(flops(work) or 0.0 for work in caches.values()),
        bytes_stored=sum(size or 0.0 for size in stored),
        views=tuple(views_used),
    )


def feature_saving(works: Iterable[Work]) -> FeatureSaving | None:
    """Compares towers online with cached features for all VLM stages of a plan.

    Returns:
        None where no stage is of a VLM, or a tower's work or the data are unknown.
    """
    spent: dict[str, tuple[float, float]] = {}
    caches: dict[str, Work] = {}
    for work in works:
        recipe = work.recipe
        if not isinstance(recipe, VlmStage):
            continue
        both = [_vlm_flops(recipe, work.total_steps, cached=cached) for cached in (False, True)]
        if both[0] is None or both[1] is None or work.num_samples is None:
            return None
        before = spent.get(recipe.kind, (0.0, 0.0))
        spent[recipe.kind] = before[0] + both[0], before[1] + both[1]
        features = vlm_features(recipe)
        key = content_key(features.kind, features.version, features, {})
        caches[key] = Work(recipe=features, num_samples=work.num_samples, total_steps=None)
    if not spent:
        return None
    online, cached = (sum(column) for column in zip(*spent.values(), strict=True))
    return FeatureSaving(
        online_flops=online,
        cached_flops=cached + sum(flops(work) or 0.0 for work in caches.values()),
        bytes_stored=sum(bytes_out(work) or 0.0 for work in caches.values()),
        share_saved={kind: 1 - without / whole for kind, (whole, without) in spent.items()},
    )


def total(values: Iterable[float | None]) -> float | None:
    """Adds numbers; None where one is not known."""
    known = list(values)
    return None if None in known else float(sum(value or 0.0 for value in known))


def views_of(recipe: Recipe) -> int:
    """Returns how many crops per sample a cache holds."""
    return recipe.views if isinstance(recipe, Embed) else 0


def image_tokens(tower: TowerSpec, hierarchical_tokens: str = "last") -> int:
    """Returns about how many tokens an image takes: patches, or places of a feature map."""
    stride = tower.patch_px or (32 if hierarchical_tokens == "last" else 16)
    return max(1, tower.image_px // stride) ** 2


def _feature_bytes(recipe: Features) -> int:
    """Returns the size of an image's features; a hierarchical tower's third stage is half as wide.

    MobileViT's is narrower still.
    """
    tower = recipe.vision
    third = tower.patch_px is None and recipe.hierarchical_tokens == "stage3"
    return 2 * image_tokens(tower, recipe.hierarchical_tokens) * tower.width // (2 if third else 1)


def _vlm_flops(
    recipe: VlmStage, total_steps: int | None, cached: bool | None = None
) -> float | None:
    """Returns a VLM stage's operations, activations recomputed; `cached` as planned by default.

    Forward and backward through the language model cost 2 and 4 operations a parameter and token
    where it learns, forward, recomputing and the gradient of its inputs 6 where it does not.
    """
    tower, model = recipe.vision, recipe.llm
    assert isinstance(tower, TowerSpec)
    assert isinstance(model, LanguageModelSpec)
    if total_steps is None or tower.facts.image_gflop is None:
        return None
    words = PRETRAIN_TOKENS if recipe.trainable == "projector" else FINETUNE_TOKENS
    factor = 8 if recipe.trainable == "projector+llm" else 6
    tokens = image_tokens(tower, recipe.hierarchical_tokens) + words
    own = factor * model.mparams * 1e6 * tokens
    reads = recipe.features is not None if cached is None else cached
    frozen = 0.0 if reads else tower.facts.image_gflop * 1e9
    return (own + frozen) * total_steps * recipe.global_batch_size


def _embed_flops(recipe: Embed, num_samples: int | None) -> float | None:
    """Returns the operations of running a teacher over a data set once."""
    facts = recipe.teacher.facts
    if facts.image_gflop is None or facts.text_gflop is None or num_samples is None:
        return None
    each = max(1, recipe.views) * facts.image_gflop + recipe.captions * facts.text_gflop
    return each * 1e9 * min(num_samples, recipe.max_samples or num_samples)


def _forward_flops(recipe: Cka | Gate, num_images: int | None) -> float | None:
    """Returns the operations of looking at some images; models of unknown size count nothing."""
    models = [recipe.tower] if isinstance(recipe, Gate) else [recipe.a, recipe.b]
    if num_images is None:
        return 0.0 if isinstance(recipe, Cka) else None
    towers = [model for model in models if isinstance(model, TowerSpec)]
    return sum(tower.facts.image_gflop or 0.0 for tower in towers) * 1e9 * num_images


def _forward_gflop(tower: Any) -> float | None:
    """Returns a pair's forward work per sample."""
    facts = tower.facts
    if facts.image_gflop is None or facts.text_gflop is None:
        return None
    return facts.image_gflop + facts.text_gflop


def _compared(online_flops: float, cached_flops: float, rates: Rates) -> dict[str, Any]:
    """Puts the same work with frozen towers online and cached side by side."""
    online, cached = rates.gpu_hours(online_flops), rates.gpu_hours(cached_flops)
    return {
        "online_gpu_hours": online,
        "cached_gpu_hours": cached,
        "online_money": rates.money(online),
        "cached_money": rates.money(cached),
    }
