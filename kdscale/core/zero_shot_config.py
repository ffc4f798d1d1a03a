"""The zero-shot suite's recipe: one tower on one labelled or captioned image set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from kdscale.core.config import NOT_IN_KEY, DataSpec, Precision, Recipe, Spec, TowerSpec

Numbering = Literal["own", "imagenet"]
Captions = Literal["first", "all"]


@dataclass(frozen=True)
class ClassSet:
    """The classes of a labelled image set, in label order.

    Attributes:
        name: What people call the list.
        names: What the prompts say; may repeat.
        wnids: WordNet ids, empty for a list that is not ImageNet's.
        places: Each class's place among ImageNet's 1,000, ascending; empty likewise.
    """

    name: str
    names: tuple[str, ...]
    wnids: tuple[str, ...] = ()
    places: tuple[int, ...] = ()

    @property
    def num_distinct(self) -> int:
        """Classes that a text classifier can tell apart: those with a name of their own."""
        return len(set(self.names))


class ZeroShotSet(Spec):
    """An image set of the suite.

    Attributes:
        task: `classes` asks for the label, `retrieval` for the caption and for the image.
        classes: `imagenet`, the 200 of `imagenet_r` or `imagenet_a`, or names in label order.
            Only these compete for an image; other classes of ImageNet are left out.
        num_images: How many a whole set holds; None where nobody knows.
        split: Of caption files that hold several.
    """

    name: Annotated[str, Field(json_schema_extra=NOT_IN_KEY)]
    task: Literal["classes", "retrieval"] = "classes"
    classes: Literal["imagenet", "imagenet_r", "imagenet_a"] | tuple[str, ...] = "imagenet"
    num_images: Annotated[int | None, Field(gt=0, json_schema_extra=NOT_IN_KEY)] = None
    split: str = "test"


class ZeroShot(Recipe):
    """Evaluate a tower on one image set of the suite.

    Attributes:
        images: The set.
        data: Where it is (`urls`): WebDataset tars, Parquet files, or a folder of pictures;
            `max_bad_fraction` is the share of unreadable images that is tolerated.
        templates: `openai` (80 prompts a class), `simple` (1), or format strings with one `{}`.
        numbering: What an integer label counts: the set's `own` classes, or ImageNet's 1,000.
        captions: `all` is the usual protocol; `first` keeps one caption per image, as CLIP-KD's
            loader does.
        limit: Read only so many images, in the set's order; such a score passes no gate.
        published: Top-1 in percent that the score must meet; None for no gate.
    """

    kind: ClassVar[str] = "zero_shot"
    version: ClassVar[int] = 1

    tower: TowerSpec
    images: ZeroShotSet
    data: DataSpec
    templates: Literal["openai", "simple"] | tuple[str, ...] = "openai"
    numbering: Numbering = "own"
    captions: Captions = "all"
    precision: Precision = "fp32"
    limit: int | None = Field(default=None, gt=0)
    published: Annotated[float | None, Field(ge=0, le=100, json_schema_extra=NOT_IN_KEY)] = None

    @model_validator(mode="after")
    def _gate_fits(self) -> Self:
        if self.published is not None and self.images.task == "retrieval":
            raise ValueError("published is a top-1, and this set is one of retrieval")
        return self


class Gate(ZeroShot):
    """Stop a study whose teacher misses its published top-1.

    Another published value judges the same score anew.
    """

    kind: ClassVar[str] = "gate"
    version: ClassVar[int] = 1

    @model_validator(mode="after")
    def _has_a_mark(self) -> Self:
        if self.published is None or self.limit is not None:
            raise ValueError("a gate needs a published top-1 and the whole set")
        return self
