"""Recipes and specs: frozen, validated, with the paper's values as defaults.

A recipe says what to compute; a spec says what a name stands for. Both are pydantic models
that refuse unknown fields. A field marked `NOT_IN_KEY` does not change any number and so
stays out of the content key (`kdscale.core.keys`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from kdscale.core.spec import IN_KEY_UNLESS_DEFAULT, NOT_IN_KEY, Choice, Spec

Precision = Literal["fp32", "bf16", "fp16"]
Mode = Literal["paper", "corrected"]
Tap = Literal["patch_mean", "pooled", "vlm"]
Layers = Literal["final", "all"] | Annotated[int, Field(ge=2)]
STAGE_WEIGHTS = "stage:"  # in front of <kind>/<key> of the stage that trained the tower
EMBED_STAGE = "embed:"  # in front of the key of the stage that wrote the cache
_EMBED = f"{EMBED_STAGE}[0-9a-f]{{16}}"
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


class TowerFacts(Spec):
    """What is known of a CLIP pair without building it; used for plans and gates.

    Counts are in millions of parameters, work in GFLOP per sample (2 per multiply-add).
    """

    image_mparams: float | None = None
    text_mparams: float | None = None
    image_gflop: float | None = None
    text_gflop: float | None = None
    zero_shot_top1: float | None = None


class TowerSpec(Spec):
    """A CLIP pair (image tower and text tower) and everything that its inputs need.

    Attributes:
        name: What people call it.
        clip_config: An architecture name that open_clip knows, or a whole open_clip model
            config (`embed_dim`, `vision_cfg`, `text_cfg`).
        weights: `random`, an open_clip tag (`openai`), `hf-hub:org/name`, or a local directory
            in the hub's layout.
        resize: `shortest` (then centre crop) or `squash`, at evaluation.
        interpolation: Filter of that resizing.
        tokenizer: `clip_bpe`, `siglip`, a miniature one (`mini_bpe`, `mini_sp`), or a directory.
        width: Width of the image tower's trunk.
        patch_px: Side of a patch, None for hierarchical towers.
    """

    name: Annotated[str, Field(json_schema_extra=NOT_IN_KEY)]
    clip_config: str | dict[str, Any]
    weights: str = "random"
    image_px: int = Field(default=224, gt=0)
    mean: tuple[float, float, float] = OPENAI_MEAN
    std: tuple[float, float, float] = OPENAI_STD
    resize: Literal["shortest", "squash"] = "shortest"
    interpolation: Annotated[
        Literal["bicubic", "bilinear"], Field(json_schema_extra=IN_KEY_UNLESS_DEFAULT)
    ] = "bicubic"
    tokenizer: str = "clip_bpe"
    context_length: int = Field(default=77, gt=1)
    embed_dim: int = Field(default=512, gt=0)
    width: Annotated[int, Field(gt=0, json_schema_extra=NOT_IN_KEY)]
    patch_px: Annotated[int | None, Field(json_schema_extra=NOT_IN_KEY)] = None
    facts: Annotated[TowerFacts, Field(json_schema_extra=NOT_IN_KEY)] = TowerFacts()

    @property
    def tokens_name(self) -> str:
        """Names the token ids that this tower reads; towers with equal names share them."""
        return f"{self.tokenizer}:{self.context_length}"


class MiniWorld(Spec):
    """A procedurally drawn data set; see `kdscale.mini`.

    Attributes:
        split: `train` leaves the held-out compositions out, `eval` draws only them.
        num_samples: Images in the split.
        image_px: Side of the drawn images.
        caption_noise: Fraction of the captions that describe another scene.
        content: `captions` pairs each image with a caption; `pretrain` puts the same pairs into
            one-question conversations as well; `instruct` holds conversations of several rounds
            on scenes of its own, some without an image.
    """

    split: Literal["train", "eval"] = "train"
    num_samples: int = Field(default=8192, gt=0)
    samples_per_shard: int = Field(default=512, gt=0)
    image_px: int = Field(default=64, gt=7)
    caption_noise: float = Field(default=0.0, ge=0.0, le=1.0)
    content: Annotated[
        Literal["captions", "pretrain", "instruct"], Field(json_schema_extra=IN_KEY_UNLESS_DEFAULT)
    ] = "captions"
    seed: int = 0


class DataSpec(Spec):
    """Image-text pairs in WebDataset tars or Parquet, or a miniature world to be drawn.

    Attributes:
        urls: Glob or brace pattern of the shards, local or on an object store; or a manifest
            (`.json`) that `kdscale data` wrote. The path itself does not enter the content key:
            the manifest's hash does.
        mini: The world to draw instead.
        max_bad_fraction: Share of unusable samples above which nothing starts.
        num_samples: How many there are said to be, for plans made before the data are at hand.
    """

    name: Annotated[str, Field(json_schema_extra=NOT_IN_KEY)]
    urls: Annotated[str | None, Field(json_schema_extra=NOT_IN_KEY)] = None
    mini: MiniWorld | None = None
    max_bad_fraction: Annotated[float, Field(ge=0, le=1, json_schema_extra=NOT_IN_KEY)] = 0.05
    num_samples: Annotated[int | None, Field(json_schema_extra=NOT_IN_KEY)] = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.urls is not None and self.mini is not None:
            raise ValueError("give either urls or mini, not both")
        return self


class ZeroShotSpec(Spec):
    """A zero-shot classification benchmark.

    Attributes:
        data: Shards whose `.json` carries an integer `label`.
        classnames: `imagenet`, `mini`, or the names in label order.
        templates: `openai` (80), `simple` (1), `mini`, or format strings with one `{}`.
    """

    name: Annotated[str, Field(json_schema_extra=NOT_IN_KEY)]
    data: DataSpec
    classnames: Literal["imagenet", "mini"] | tuple[str, ...] = "imagenet"
    templates: Literal["openai", "simple", "mini"] | tuple[str, ...] = "openai"


class CkaSpec(Spec):
    """On what, and how, a plan compares a trial's tower with the one that `cka_with` names.

    Attributes:
        suite: Role of the suite on whose benchmarks' images they are compared; None takes the
            VLM's own, and none for a distillation.
        zero_shot: Compare on the zero-shot benchmark's images, too.
        taps: Which vectors stand for an image, one comparison each (`kdscale.models.taps`). Of a
            VLM `vlm` is what its projector gives out.
        layers: `final`, `all` blocks, or a number of evenly spaced ones.
        n: Images of each set, drawn by content hash; None for all.
    """

    suite: str | None = None
    zero_shot: bool = True
    taps: tuple[Tap, ...] = Field(default=("patch_mean",), min_length=1)
    layers: Layers = "all"
    n: int | None = Field(default=None, ge=4)


class Execution(Spec):
    """How a stage is run: nothing here changes a number beyond rounding.

    Attributes:
        num_workers: Training processes; 0 trains in the trial's own process (Ray Train's local
            mode), which saves a laptop the minute that a group of workers takes to start.
        min_workers: Go on with as few training processes while no more find room, in place of
            waiting for all; what every step computes stays the same. None: always `num_workers`.
        data_cpus: What all reading and decoding tasks of the stage may use together.
        micro_batch_size: Samples per forward pass of one worker; None means all of its share.
        checkpoint_every: Optimizer steps between checkpoints (and evaluations).
        log_every: Steps between two flushes of the journal.
        deepspeed: Train VLM stages under DeepSpeed, at the ZeRO stage of their recipe.
    """

    num_workers: int = Field(default=1, ge=0)
    min_workers: int | None = Field(default=None, gt=0)
    cpus_per_worker: float = Field(default=1.0, ge=0)
    gpus_per_worker: float = Field(default=0.0, ge=0)
    cpus_per_data_task: float = Field(default=1.0, gt=0)
    data_cpus: float = Field(default=1.5, gt=0)
    threads_per_worker: int | None = Field(default=None, gt=0)
    micro_batch_size: int | None = Field(default=None, gt=0)
    checkpoint_every: int = Field(default=1000, gt=0)
    keep_checkpoints: int = Field(default=2, gt=0)
    log_every: int = Field(default=50, gt=0)
    deepspeed: bool = False
    max_failures: int = Field(default=3, ge=-1)

    @property
    def world_size(self) -> int:
        """Processes that share a global batch, at most."""
        return max(1, self.num_workers)

    @model_validator(mode="after")
    def _min_is_no_more(self) -> Self:
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(
                f"min_workers is {self.min_workers}, num_workers only {self.num_workers}: give the "
                "fewest and the most"
            )
        return self


class Recipe(Spec):
    """Base of stage recipes: any field may also hold a `Choice`, validated option by option.

    Attributes:
        run: How the stage is run; None takes the scale's.
    """

    kind: ClassVar[str]
    version: ClassVar[int]

    run: Annotated[Execution | None, Field(json_schema_extra=NOT_IN_KEY)] = None

    @field_validator("*", mode="wrap")
    @classmethod
    def _open_choices(cls, value: Any, handler: Callable[[Any], Any]) -> Any:
        if not isinstance(value, Choice):
            return handler(value)
        for option in value.options:
            handler(option)
        return value

    def choices(self) -> dict[str, Choice]:
        """Returns the fields that still hold a choice."""
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: value for name, value in fields.items() if isinstance(value, Choice)}


class Pretrained(Spec):
    """A student trained elsewhere: `Pretrained("swin.pt", student="swin_t")`.

    As `student` of a `Distill` training goes on from its weights; as `vision` of a `Vlm` it sees.

    Attributes:
        path: A directory in the hub's layout, or a checkpoint file (`kdscale.models.weights`
            says which). The file's hash is part of the content key, its place is not.
        student: The architecture: a role or a `TowerSpec`.
    """

    path: str
    student: str | TowerSpec

    def __init__(self, path: str, **fields: Any) -> None:
        super().__init__(path=path, **fields)

    @property
    def name(self) -> str:
        """What people call it."""
        return f"{getattr(self.student, 'name', self.student)} of {self.path}"


class Embed(Recipe):
    """Run a frozen teacher once over a data set and keep its embeddings beside the shards.

    Attributes:
        views: Crops per sample; 0 means the evaluation crop alone, whose patch features CKA
            compares.
        captions: Captions per sample, 0 for none.
        crop_seed: Seed of the crops, shared by every training seed that reads the cache.
        max_samples: Embed whole shards until so many samples are covered; None for all.
    """

    kind: ClassVar[str] = "embed"
    version: ClassVar[int] = 3

    teacher: TowerSpec
    data: DataSpec
    views: int = Field(default=1, ge=0)
    captions: int = Field(default=1, ge=0)
    crop_scale: tuple[float, float] = (0.9, 1.0)
    crop_seed: int = 0
    precision: Precision = "fp32"
    max_samples: int | None = Field(default=None, gt=0)


class Distill(Recipe):
    """Train a student CLIP on image-text pairs, with a frozen teacher or without one.

    Defaults are the paper's (arXiv 2511.17886, appendix table 6) where it prints a value and
    CLIP-KD's otherwise; `global_batch_size` reads the printed 256 as per GPU on 16 GPUs.

    Attributes:
        student: A role of the catalogue, a `TowerSpec`, or a student trained elsewhere.
        teacher: A role, a `TowerSpec`, the student of another recipe, or None for training
            without a teacher.
        loss: A recipe's name, a mapping {term: weight}, or a function importable on the workers.
        mode: `paper` repeats the released code's behaviour, `corrected` its formulae.
        flags: Single quirks that differ from the mode (`kdscale.losses.recipes.LossFlags`).
        max_steps: Stop after this many optimizer steps; the schedule ends there too.
        bn_group: Samples of the global batch that share BatchNorm statistics; None takes
            `default_bn_group` of the scale's batch: 256 of the paper's 4096.
        views: Distinct crops per sample; None draws a new one each epoch.
        captions: Captions per sample that the epochs take in turn: the sample's own, then those
            that its metadata lists under `captions`.
        teacher_outputs: `online` runs the teacher at every step; `cached` reads what an embed
            stage has stored, which needs `views`. A plan turns `cached` into `embed:<key>`.
        eval_outputs: `embed:<key>` of the teacher's features of the benchmark's images; a plan
            fills it in.
        precision: None takes the scale's.
        zero_shot: Benchmark read at every checkpoint, None for none.
        cka_with: A role or tower that the finished student is compared with, None for none.
        cka: On what, and how.
        keep_epochs: Keep the student at the end of these epochs, too.
        read_epoch: Which of its students the recipe stands for: that at the end of this epoch,
            which is kept; None for the last one. `at_epoch` sets it.
    """

    kind: ClassVar[str] = "distill"
    version: ClassVar[int] = 3

    student: str | TowerSpec | Pretrained
    teacher: str | TowerSpec | Distill | None = None
    data: str | DataSpec = "cc12m"
    loss: str | dict[str, float] | Callable[..., Any] = "clip_kd"
    mode: Mode = "corrected"
    flags: dict[str, Any] = Field(default_factory=dict)
    epochs: int = Field(default=32, gt=0)
    max_steps: int | None = Field(default=None, gt=0)
    global_batch_size: int = Field(default=4096, gt=0)
    lr: float = Field(default=5e-4, gt=0)
    warmup_steps: int = Field(default=2000, ge=0)
    weight_decay: float = Field(default=0.1, ge=0)
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = Field(default=1e-6, gt=0)
    grad_clip: float | None = Field(default=None, gt=0)
    bn_group: int | None = Field(default=None, gt=1)
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    crop_scale: tuple[float, float] = (0.9, 1.0)
    crop_seed: int = 0
    views: int | None = Field(default=None, gt=0)
    captions: int = Field(default=1, gt=0)
    teacher_outputs: str = Field(default="online", pattern=f"^(online|cached|{_EMBED})$")
    eval_outputs: str | None = Field(default=None, pattern=f"^{_EMBED}$")
    seed: int = 0
    precision: Precision | None = None
    zero_shot: str | ZeroShotSpec | None = "imagenet"
    cka_with: Annotated[str | TowerSpec | None, Field(json_schema_extra=NOT_IN_KEY)] = None
    cka: Annotated[CkaSpec, Field(json_schema_extra=NOT_IN_KEY)] = CkaSpec()
    keep_epochs: Annotated[tuple[int, ...], Field(json_schema_extra=NOT_IN_KEY)] = ()
    read_epoch: Annotated[int | None, Field(json_schema_extra=NOT_IN_KEY)] = None

    @property
    def output(self) -> Distill:
        """The student that this recipe trains, for the `vision` of a VLM in the same sweep."""
        return self

    def at_epoch(self, epoch: int | Choice) -> Distill:
        """Returns the student at the end of an epoch, its learning rate still on the way down."""
        return self.replace(read_epoch=epoch)

    @model_validator(mode="after")
    def _teacher_and_loss_agree(self) -> Self:
        if self.teacher is None and self.loss in ("clip_kd", "mse", "icl", "kl"):
            raise ValueError(
                f"loss {self.loss!r} compares with a teacher and none is given; "
                "use loss='clip' for a run without one"
            )
        return self

    @model_validator(mode="after")
    def _kept_epochs_are_trained(self) -> Self:
        if any(isinstance(v, Choice) for v in (self.epochs, self.keep_epochs, self.read_epoch)):
            return self
        read = () if self.read_epoch is None else (self.read_epoch,)
        beyond = [epoch for epoch in (*self.keep_epochs, *read) if not 0 < epoch <= self.epochs]
        if beyond:
            raise ValueError(f"no student is there to keep at epochs {beyond} of {self.epochs}")
        return self
