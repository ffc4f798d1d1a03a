"""Recipes of the stages that only measure, and the models that nothing but measures them."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from kdscale.core.config import (
    NOT_IN_KEY,
    DataSpec,
    Layers,
    Mode,
    Precision,
    Recipe,
    Spec,
    Tap,
    TowerSpec,
)


class ImageModelSpec(Spec):
    """An image model without a text tower, with the input processing that its library gives it.

    A VLM is one, too: its tower and projector.

    Attributes:
        name: What people call it.
        library: Which one loads it.
        model: timm's name of it (`vit_tiny_patch16_224.augreg_in21k`), where timm knows one.
        weights: `pretrained` or `random` with `model`; else `hf-hub:org/name`, or a local
            directory in the hub's layout; `stage:finetune/<key>` of a VLM.
    """

    name: Annotated[str, Field(json_schema_extra=NOT_IN_KEY)]
    library: Literal["timm", "transformers", "vlm"]
    model: str | None = None
    weights: str = "pretrained"

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.model is not None) != (self.weights in ("pretrained", "random")):
            raise ValueError("give `model` with weights 'pretrained' or 'random', and only then")
        return self


class BenchmarkImages(Spec):
    """The distinct images that a VLM benchmark asks about.

    Attributes:
        name: The benchmark's, as in `kdscale.eval.benchmarks`.
        digest: Names the set of contents (`kdscale.data.image_sets.set_hash`).
        num_images: How many they are.
        data: The directory that the questions are read from, None for the hub.
        mode: How they are read.
        limit: The first so many questions only; None for all.
    """

    name: str
    digest: str
    num_images: Annotated[int | None, Field(json_schema_extra=NOT_IN_KEY)] = None
    data: Annotated[str | None, Field(json_schema_extra=NOT_IN_KEY)] = None
    mode: Annotated[Mode, Field(json_schema_extra=NOT_IN_KEY)] = "paper"
    limit: Annotated[int | None, Field(gt=0, json_schema_extra=NOT_IN_KEY)] = None


class Cka(Recipe):
    """Compare what two models make of the same images, by linear CKA.

    Attributes:
        a: A tower, an image model, or a name that `kdscale.models.named.resolve` takes; a plan
            replaces names by specs.
        b: The other one.
        images: Shards (tar or Parquet), a folder of images, or those of a benchmark; each content
            counts once.
        tap: Which vector stands for an image (`kdscale.models.taps`).
        layers: `final` compares the final layers alone, `all` every block with every other, and
            a number that many blocks, evenly spaced.
        n: Images to compare on, drawn by content hash; None for all.
    """

    kind: ClassVar[str] = "cka"
    version: ClassVar[int] = 1

    a: str | TowerSpec | ImageModelSpec
    b: str | TowerSpec | ImageModelSpec
    images: DataSpec | BenchmarkImages
    tap: Tap = "patch_mean"
    layers: Layers = "final"
    precision: Precision = "fp32"
    n: int | None = Field(default=None, ge=4)
