"""Recipes of the VLM stages: projector pretraining and fine-tuning.

TinyLLaVA Factory and Bunny are two settings of the same fields. Where the released code of the
paper's time and today's defaults differ, the field says which; `kdscale.core.vlm_recipes` holds
both as named recipes.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from kdscale.core.config import (
    NOT_IN_KEY,
    CkaSpec,
    DataSpec,
    Distill,
    MiniWorld,
    Mode,
    Precision,
    Pretrained,
    Recipe,
    Spec,
    TowerSpec,
)
from kdscale.core.types import ConfigError, unknown_field

Template = Literal["pretrain", "plain", "qwen2_base", "phi", "bunny", "qwen2_instruct", "llama"]
Trainable = Literal["projector", "projector+llm", "projector+lora"]
ImageMode = Literal["square", "pad"]
SiglipTokens = Literal["all", "drop_first"]
HierarchicalTokens = Literal["last", "stage3"]
FEATURES_STAGE = "features:"  # in front of the key of the stage that wrote the features
# What a VLM's stages are given by the plan, and what to say instead.
GIVEN = {
    "vision": "both stages have one tower: say vision=... of the Vlm",
    "llm": "both stages have one language model: say llm=... of the Vlm",
    "seed": "both stages have one seed: say seeds=(...) of the Sweep",
    "projector": "a plan fills in the projector that pretraining has trained",
    "features": "a plan fills in where they are: say feature_cache=True",
}


class LanguageModelSpec(Spec):
    """A causal language model for the VLM stages.

    Attributes:
        name: What people call it.
        weights: Hub id, a local directory in the hub's layout, `random`, or `stage:language/<key>`
            of the stage that trained it.
        config: A transformers config as a dictionary (`model_type` and its fields), for random
            weights alone; others are read with the config beside them.
        tokenizer: Hub id, local directory, or `mini_lm` for the packaged miniature one; None
            reads the one beside the weights.
        hidden: Width of its token embeddings.
        context_length: Positions that it was trained for.
        mparams: Parameters in millions, tied embeddings counted once.
    """

    name: Annotated[str, Field(json_schema_extra=NOT_IN_KEY)]
    weights: str = "random"
    config: dict[str, Any] | None = None
    tokenizer: str | None = None
    hidden: Annotated[int, Field(gt=0, json_schema_extra=NOT_IN_KEY)]
    context_length: Annotated[int, Field(gt=0, json_schema_extra=NOT_IN_KEY)]
    mparams: Annotated[float, Field(gt=0, json_schema_extra=NOT_IN_KEY)]


class Language(Recipe):
    """Train a language model on text, as one that images are to be joined to has been.

    Miniature models alone need this: adapters on a frozen model that has never read have nothing
    to adapt.

    Attributes:
        llm: The model, with random weights.
        data: Miniature worlds whose conversations and captions are the text, without any image.
        num_steps: Optimizer steps.
        batch_size: Blocks of one step.
        block_tokens: Tokens of a block; texts are put end to end and cut there.
        lr: Peak learning rate; cosine to zero.
        warmup_steps: Steps that warm up.
        seed: Draws the weights and the order of blocks.
    """

    kind: ClassVar[str] = "language"
    version: ClassVar[int] = 1

    llm: LanguageModelSpec
    data: tuple[MiniWorld, ...] = Field(min_length=1)
    num_steps: int = Field(default=256, gt=0)
    batch_size: int = Field(default=32, gt=0)
    block_tokens: int = Field(default=128, gt=1)
    lr: float = Field(default=2e-3, gt=0)
    warmup_steps: int = Field(default=16, ge=0)
    seed: int = 0


class Lora(Spec):
    """Low-rank adapters on every linear layer of the language model except its head.

    Defaults are Bunny's.
    """

    rank: int = Field(default=128, gt=0)
    alpha: int = Field(default=256, gt=0)
    dropout: float = Field(default=0.05, ge=0, lt=1)


class Features(Recipe):
    """Run a frozen tower once over the images of conversations and keep its features.

    They are what the projector of a VLM stage reads; `VlmStage` explains the fields of one name.

    Attributes:
        precision: What the tower computes in; the features are fp16.
        seed: Draws random weights; without a meaning for others.
    """

    kind: ClassVar[str] = "features"
    version: ClassVar[int] = 1

    vision: TowerSpec
    data: DataSpec
    image_mode: ImageMode = "square"
    siglip_tokens: SiglipTokens = "all"
    hierarchical_tokens: HierarchicalTokens = "last"
    precision: Precision = "fp32"
    seed: int = 0


class VlmStage(Recipe):
    """What both VLM stages say; see `Pretrain` and `Finetune`.

    Attributes:
        vision: The tower whose features the projector reads; frozen.
        llm: The language model.
        data: Shards whose `.json` carries `conversations`; images are optional.
        template: Text format (`kdscale.data.instruct.TEMPLATES`).
        trainable: What learns; everything else stays bit-identical.
        lora: Adapters, where `trainable` has them; merged at the end.
        image_mode: `square` is the tower's own processing, `pad` pads to a square first.
        siglip_tokens: `drop_first` repeats TinyLLaVA, which drops a patch as if it were a class
            token (728 of 729); `all` keeps them.
        hierarchical_tokens: Features of Swin, ConvNeXt and MobileViT: 7 x 7 of the last stage, or
            14 x 14 of the third.
        lr: Peak learning rate; `projector_lr` replaces it for the projector where given.
        global_batch_size: Samples of one optimizer step, whatever the number of workers.
        micro_batch_size: Samples of one forward pass. It changes numbers where losses are
            averaged per micro-batch, so it is not part of the execution.
        grad_clip: Largest gradient norm; None is off, as in the paper's DeepSpeed.
        loss_norm: `micro_batch` averages the mean losses of the micro-batches (upstream of the
            paper's time), `update` divides by all supervised tokens of the step.
        length_grouping: Draw neighbours of like modality and length into megabatches of
            `group_size` samples.
        warmup_ratio: Share of the steps that warm up; cosine to zero afterwards.
        max_length: Tokens after which a conversation is cut; at most the language model's
            `context_length`.
        max_steps: Stop after this many optimizer steps; the schedule ends there too.
        precision: None takes the scale's.
        zero_stage: DeepSpeed's ZeRO stage where the execution uses DeepSpeed.
        feature_cache: Read the tower's features from an own stage instead of running it.
        features: `features:<key>` of that stage; a plan fills it in where `feature_cache` is set.
        attention: `auto` takes flash-attention 2 where GPU and package are there, else SDPA.
    """

    kind: ClassVar[str]
    version: ClassVar[int] = 1

    vision: str | TowerSpec
    llm: str | LanguageModelSpec
    data: str | DataSpec
    template: Template = "qwen2_base"
    trainable: Trainable = "projector"
    lora: Lora | None = None
    image_mode: ImageMode = "square"
    siglip_tokens: SiglipTokens = "all"
    hierarchical_tokens: HierarchicalTokens = "last"
    lr: float = Field(default=1e-3, gt=0)
    projector_lr: float | None = Field(default=None, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    global_batch_size: int = Field(default=256, gt=0)
    micro_batch_size: int = Field(default=16, gt=0)
    grad_clip: float | None = Field(default=None, gt=0)
    loss_norm: Literal["micro_batch", "update"] = "micro_batch"
    length_grouping: bool = False
    group_size: int = Field(default=32, gt=0)
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    max_length: int = Field(default=2048, gt=1)
    epochs: int = Field(default=1, gt=0)
    max_steps: int | None = Field(default=None, gt=0)
    seed: int = 0
    precision: Precision | None = None
    zero_stage: Annotated[Literal[2, 3], Field(json_schema_extra=NOT_IN_KEY)] = 2
    feature_cache: Annotated[bool, Field(json_schema_extra=NOT_IN_KEY)] = False
    features: Annotated[
        str | None,
        Field(pattern=f"^{FEATURES_STAGE}[0-9a-f]{{16}}$", json_schema_extra=NOT_IN_KEY),
    ] = None
    attention: Annotated[
        Literal["auto", "sdpa", "flash_attention_2"], Field(json_schema_extra=NOT_IN_KEY)
    ] = "auto"

    def check_length(self) -> None:
        """Refuses conversations that are longer than the language model was trained for.

        Raises:
            ConfigError: With both lengths. Roles are not known yet, and not refused.
        """
        model = self.llm
        if isinstance(model, LanguageModelSpec) and self.max_length > model.context_length:
            raise ConfigError(
                f"max_length {self.max_length} goes beyond the {model.context_length} positions "
                f"that {model.name} was trained for: lower {self.kind}.max_length, or raise the "
                "model's context_length"
            )

    @model_validator(mode="after")
    def _sizes_and_parts_agree(self) -> Self:
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size {self.micro_batch_size} does not divide the global batch of "
                f"{self.global_batch_size}"
            )
        if (self.lora is not None) != (self.trainable == "projector+lora"):
            raise ValueError("lora is given exactly where trainable is 'projector+lora'")
        return self


class Pretrain(VlmStage):
    """Train the projector alone on image-caption pairs."""

    kind: ClassVar[str] = "pretrain"

    template: Template = "pretrain"


class Finetune(VlmStage):
    """Train projector and language model on conversations, from a pretrained projector.

    Attributes:
        projector: `stage:pretrain/<key>` of the stage that trained it; a plan fills it in. None
            starts from a random one.
    """

    kind: ClassVar[str] = "finetune"

    trainable: Trainable = "projector+llm"
    projector: str | None = Field(default=None, pattern="^stage:pretrain/[0-9a-f]{16}$")


# Settings in these names change one stage of a VLM.
VLM_STAGES: dict[str, type[VlmStage]] = {"pretrain": Pretrain, "finetune": Finetune}


def checked_settings(stage: type[VlmStage], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings of one stage of a VLM, all of them fields that are its own to set.

    Raises:
        UnknownField: With the nearest names.
        ConfigError: With where to say it instead.
    """
    for name in settings:
        if name in GIVEN:
            raise ConfigError(f"{stage.kind}.{name} cannot be set: {GIVEN[name]}")
        if name not in stage.model_fields:
            known = stage.model_fields.keys() - GIVEN.keys()
            raise unknown_field(f"a VLM's {stage.kind} stage", name, known)
    return dict(settings)


PretrainSettings = Annotated[dict[str, Any], AfterValidator(partial(checked_settings, Pretrain))]
FinetuneSettings = Annotated[dict[str, Any], AfterValidator(partial(checked_settings, Finetune))]


class QuestionsSpec(Spec):
    """Questions with images and gold answers, which a VLM is asked.

    Attributes:
        mini: The miniature world to ask about.
        max_new_tokens: Length of an answer.
    """

    name: Annotated[str, Field(json_schema_extra=NOT_IN_KEY)]
    mini: MiniWorld
    max_new_tokens: int = Field(default=16, gt=0)


class SuiteSpec(Spec):
    """Benchmarks that a finished VLM is asked, with its images and without them.

    Attributes:
        name: What people call it, and where `--data NAME=DIR` puts its files.
        benchmarks: Their names in `kdscale.eval`, empty for all 16.
        mini: The miniature world that draws them; None reads the real ones.
        num_items: Questions of each miniature benchmark.
        data: Directory of the real ones.
        mode: How they are asked and scored.
        blind: Ask once more without the images.
        limit: Ask the first so many of each; None for all.
        max_new_tokens: Longest answer to any question; None leaves the benchmarks' own.
        batch_size: Questions at once.
        precision: What the model is loaded and computed in.
    """

    name: str
    benchmarks: tuple[str, ...] = ()
    mini: MiniWorld | None = None
    num_items: int = Field(default=96, gt=0)
    data: str | None = None
    mode: Mode = "paper"
    blind: bool = True
    limit: int | None = Field(default=None, gt=0)
    max_new_tokens: int | None = Field(default=None, gt=0)
    batch_size: int = Field(default=16, gt=0)
    precision: Precision = "fp32"


class Evaluate(Recipe):
    """Ask a VLM questions, with the images and without them.

    Attributes:
        model: `stage:finetune/<key>` of the VLM, which holds its template and image processing.
    """

    kind: ClassVar[str] = "evaluate"
    version: ClassVar[int] = 1

    model: str = Field(pattern="^stage:finetune/[0-9a-f]{16}$")
    questions: QuestionsSpec
    precision: Precision = "fp32"


class Vlm(Recipe):
    """A VLM from a vision tower: projector pretraining, fine-tuning, questions.

    A plan expands it to a `Pretrain`, a `Finetune`, an `Evaluate` and, for each benchmark of a
    suite, `Answers` and, with `cka_with`, a `Cka`.

    Attributes:
        vision: A role, a tower, a student trained elsewhere, or that of a recipe of the same sweep:
            `distill.output`, `distill.at_epoch(32)`.
        llm: A role or a language model.
        recipe: A name in `kdscale.core.vlm_recipes.VLM_RECIPES`.
        pretrain: Fields of `Pretrain` that differ from the recipe's; each may hold a choice.
        finetune: Fields of `Finetune` that differ.
        questions: What the finished model is asked, None for nothing.
        suite: Benchmarks that it is asked: a role (`paper16`), a suite, or None.
        cka_with: A role or tower that its tower is compared with (`distill.teacher`), on the images
            of the suite and of the zero-shot benchmark; None for no comparison.
        cka: On what, and how.
    """

    kind: ClassVar[str] = "vlm"
    version: ClassVar[int] = 1

    vision: str | TowerSpec | Pretrained | Distill
    llm: str | LanguageModelSpec = "qwen2_0_5b"
    recipe: str = "tinyllava"
    pretrain: PretrainSettings = Field(default_factory=dict)
    finetune: FinetuneSettings = Field(default_factory=dict)
    questions: str | QuestionsSpec | None = None
    suite: str | SuiteSpec | None = None
    cka_with: str | TowerSpec | None = None
    cka: CkaSpec = CkaSpec()
    seed: int = 0
