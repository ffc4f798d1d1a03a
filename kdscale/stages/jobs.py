"""What a worker is told to do: picklable, and light enough for processes that only pass it on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kdscale.core.answers_config import Answers
from kdscale.core.checkpoints import Checkpoints
from kdscale.core.config import EMBED_STAGE, Distill, Embed
from kdscale.core.eval_config import Cka
from kdscale.core.keys import content_key
from kdscale.core.stage_log import StageLog
from kdscale.core.storage import StageStore, Storage
from kdscale.core.trained import missing_epochs
from kdscale.core.vlm_config import FEATURES_STAGE, Evaluate, Features, Language, VlmStage
from kdscale.core.zero_shot_config import Gate
from kdscale.data.features import FeatureRef, find_features
from kdscale.data.image_sets import ImageSet
from kdscale.data.samples import Crop
from kdscale.data.shards import Manifest
from kdscale.data.sidecars import CacheRef

CKA_IMAGES = 2048


class Job:
    """What all jobs have: a stage to write, and a lease on it."""

    kind: str
    key: str
    storage_root: str
    record: dict[str, Any]
    lease: str | None

    @property
    def stage(self) -> StageStore:
        """The stage's directory."""
        return StageStore(Storage(self.storage_root), self.kind, self.key)

    def log(self, who: str, *, quiet: bool = False) -> StageLog:
        """Returns a process's part of this attempt's log; arguments as of `StageLog`."""
        return StageLog(self.stage, who, title=self.record.get("name", ""), quiet=quiet)


@dataclass(frozen=True)
class DistillJob(Job):
    """Everything a worker needs to run the stage; picklable.

    Attributes:
        kind: `teacher` or `distill`.
        key: Content key.
        storage_root: Where the stage store is.
        recipe: Resolved recipe.
        total_steps: Optimizer steps.
        data: Manifest of the training data.
        zero_shot_data: Manifest of the benchmark's images.
        record: What `stage.json` will say.
        lease: Token of the lease under which it runs, None where nobody else can write.
    """

    kind: str
    key: str
    storage_root: str
    recipe: Distill
    total_steps: int
    data: Manifest
    zero_shot_data: Manifest | None
    record: dict[str, Any]
    lease: str | None = None

    @property
    def kept_epochs(self) -> dict[int, int]:
        """{epoch whose student is kept: the step after which it is}; at most the last step."""
        per_epoch = self.data.num_samples // self.recipe.global_batch_size
        return {e: min(e * per_epoch, self.total_steps) for e in self.recipe.keep_epochs}

    def rewind(self) -> None:
        """Drops the checkpoints from which training would miss a student that is to be kept.

        They are those of an earlier attempt that was not to keep it.
        """
        missing = missing_epochs(self.stage, self.recipe.keep_epochs)
        if missing:
            first = min(self.kept_epochs[epoch] for epoch in missing)
            Checkpoints(self.stage, keep=1).forget_from(first)

    @property
    def cache(self) -> CacheRef | None:
        """The teacher cache that this stage reads, None where the teacher runs along."""
        outputs = self.recipe.teacher_outputs
        if not outputs.startswith(EMBED_STAGE):
            return None
        return cache_ref(embed_recipe(self.recipe), self._store_of(outputs))

    @property
    def eval_cache(self) -> CacheRef | None:
        """The teacher's features of the benchmark's images, where a stage has stored them."""
        outputs = self.recipe.eval_outputs
        if outputs is None:
            return None
        return cache_ref(features_recipe(self.recipe), self._store_of(outputs))

    def _store_of(self, outputs: str) -> StageStore:
        """Returns the stage that `embed:<key>` names."""
        key = outputs.removeprefix(EMBED_STAGE)
        return StageStore(Storage(self.storage_root), Embed.kind, key)


@dataclass(frozen=True)
class VlmInputs:
    """What data tasks need of a VLM's models.

    Attributes:
        tokenizer: The language model's, pickled.
        num_image_tokens: Visual tokens of one image.
    """

    tokenizer: bytes
    image_token_id: int
    num_image_tokens: int


@dataclass(frozen=True)
class VlmJob(Job):
    """Everything a worker needs to run a VLM stage; picklable. Attributes as of `DistillJob`."""

    kind: str
    key: str
    storage_root: str
    recipe: VlmStage
    total_steps: int
    data: Manifest
    inputs: VlmInputs
    record: dict[str, Any]
    lease: str | None = None

    @property
    def features(self) -> FeatureRef | None:
        """The cached features that this stage reads, None where the tower runs along.

        Raises:
            CacheMissing, CacheMismatch, CacheCorrupt: They are not those of this stage.
        """
        if self.recipe.features is None:
            return None
        key = self.recipe.features.removeprefix(FEATURES_STAGE)
        store = StageStore(Storage(self.storage_root), Features.kind, key)
        return find_features(store.url("output"), tower_of(vlm_features(self.recipe)))


@dataclass(frozen=True)
class EvaluateJob(Job):
    """Everything a worker needs to ask a VLM questions; picklable.

    Attributes:
        questions: Where the Parquet file of the questions is.
    """

    key: str
    storage_root: str
    recipe: Evaluate
    questions: str
    record: dict[str, Any]
    lease: str | None = None
    kind: str = Evaluate.kind


@dataclass(frozen=True)
class LanguageJob(Job):
    """Everything a worker needs to train a language model; attributes as of `DistillJob`."""

    key: str
    storage_root: str
    recipe: Language
    record: dict[str, Any]
    lease: str | None = None
    kind: str = Language.kind


@dataclass(frozen=True)
class EmbedJob(Job):
    """Everything an actor needs to embed shards; picklable.

    Attributes:
        key: Content key.
        storage_root: Where the stage store is.
        recipe: Resolved recipe.
        data: Manifest of the data.
        record: What `stage.json` will say.
        lease: As of `DistillJob`.
    """

    key: str
    storage_root: str
    recipe: Embed
    data: Manifest
    record: dict[str, Any]
    lease: str | None = None
    kind: str = Embed.kind

    @property
    def cache(self) -> CacheRef:
        """The cache that this stage writes."""
        return cache_ref(self.recipe, self.stage)


@dataclass(frozen=True)
class FeaturesJob(Job):
    """Everything an actor needs to compute a tower's features; attributes as of `EmbedJob`."""

    key: str
    storage_root: str
    recipe: Features
    data: Manifest
    record: dict[str, Any]
    lease: str | None = None
    kind: str = Features.kind


@dataclass(frozen=True)
class AnswersJob(Job):
    """Everything an actor needs to answer questions; attributes as of `EmbedJob`."""

    key: str
    storage_root: str
    recipe: Answers
    record: dict[str, Any]
    lease: str | None = None
    kind: str = Answers.kind


@dataclass(frozen=True)
class CkaJob(Job):
    """Everything a worker needs to compare two models; attributes as of `EmbedJob`.

    Attributes:
        images: Survey of the images.
    """

    key: str
    storage_root: str
    recipe: Cka
    images: ImageSet
    record: dict[str, Any]
    lease: str | None = None
    kind: str = Cka.kind


@dataclass(frozen=True)
class GateJob(Job):
    """Everything a worker needs to judge a teacher; attributes as of `EmbedJob`."""

    key: str
    storage_root: str
    recipe: Gate
    record: dict[str, Any]
    lease: str | None = None
    kind: str = Gate.kind


ShardJob = EmbedJob | FeaturesJob


def vlm_features(recipe: VlmStage) -> Features:
    """Returns the recipe of the features that a VLM stage reads."""
    vision: Any = recipe.vision
    data: Any = recipe.data
    return Features(
        vision=vision,
        data=data,
        image_mode=recipe.image_mode,
        siglip_tokens=recipe.siglip_tokens,
        hierarchical_tokens=recipe.hierarchical_tokens,
        precision=recipe.precision or "fp32",
        seed=recipe.seed if vision.weights == "random" else 0,
        run=recipe.run,
    )


def tower_of(recipe: Features) -> str:
    """Names a tower with all that decides its features of an image."""
    key = content_key("tower", Features.version, recipe.vision, {})
    tokens = f"{recipe.siglip_tokens}-{recipe.hierarchical_tokens}"
    return f"{key}-{recipe.precision}-{recipe.image_mode}-{tokens}-{recipe.seed}"


def embed_recipe(recipe: Distill) -> Embed:
    """Returns the recipe of the cache that a distillation reads."""
    teacher: Any = recipe.teacher
    data: Any = recipe.data
    return Embed(
        teacher=teacher,
        data=data,
        views=recipe.views or 0,
        captions=recipe.captions,
        crop_scale=recipe.crop_scale,
        crop_seed=recipe.crop_seed,
        precision=recipe.precision or "fp32",
        run=recipe.run,
    )


def features_recipe(recipe: Distill) -> Embed:
    """Returns the recipe of the teacher's features that a distillation compares with."""
    benchmark: Any = recipe.zero_shot
    return embed_recipe(recipe).replace(
        data=benchmark.data, views=0, captions=0, max_samples=CKA_IMAGES
    )


def cache_ref(recipe: Embed, stage: StageStore) -> CacheRef:
    """Returns what a cache's files must say of themselves."""
    teacher = content_key("tower", Embed.version, recipe.teacher, {}) + f"-{recipe.precision}"
    crop = Crop(seed=recipe.crop_seed, scale=recipe.crop_scale)
    return CacheRef(stage.url("output"), teacher, crop, recipe.views, recipe.captions)
