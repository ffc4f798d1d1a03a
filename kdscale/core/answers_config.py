"""The recipe of a VLM's answers to one benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from kdscale.core.config import (
    IN_KEY_UNLESS_DEFAULT,
    NOT_IN_KEY,
    STAGE_WEIGHTS,
    Mode,
    Precision,
    Recipe,
)
from kdscale.core.keys import digest, folder_contents, identity


class Answers(Recipe):
    """Ask a VLM the questions of one benchmark, greedily, and keep what it says.

    Answers are kept, not scores: another rule of scoring needs no other run.

    Attributes:
        model: `stage:finetune/<key>`, or a directory in the hub's layout. The path does not enter
            the key: the hash of its files does.
        benchmark: One of the 16 names of `kdscale.eval.benchmarks`.
        questions: What decides the questions: `kdscale.eval.answers.questions_digest` of them.
        data: The directory that they are read from, None for the hub.
        revision: Commit on the hub, None for that of `kdscale.eval.benchmarks`.
        mode: How they are read; where it changes them, `questions` differs.
        blind: Ask without the images.
        limit: Ask the first so many only; None for all.
        max_new_tokens: Longest answer to any question; None leaves the benchmark's own.
        precision: What the model is loaded and computed in.
        batch_size: Questions at once. In fp32 it changes no answer; elsewhere rounding may, and
            it is in the key.
        attention: transformers' name of the attention implementation; in the key likewise.
    """

    kind: ClassVar[str] = "answers"
    version: ClassVar[int] = 1

    model: Annotated[str, Field(min_length=1, json_schema_extra=NOT_IN_KEY)]
    benchmark: str
    questions: str
    data: Annotated[str | None, Field(json_schema_extra=NOT_IN_KEY)] = None
    revision: Annotated[str | None, Field(json_schema_extra=NOT_IN_KEY)] = None
    mode: Annotated[Mode, Field(json_schema_extra=NOT_IN_KEY)] = "paper"
    blind: bool = False
    limit: int | None = Field(default=None, gt=0)
    max_new_tokens: Annotated[int | None, Field(gt=0, json_schema_extra=IN_KEY_UNLESS_DEFAULT)] = (
        None
    )
    precision: Precision = "fp32"
    batch_size: Annotated[int, Field(gt=0, json_schema_extra=NOT_IN_KEY)] = 16
    attention: Annotated[
        Literal["sdpa", "eager", "flash_attention_2"], Field(json_schema_extra=NOT_IN_KEY)
    ] = "sdpa"


def beside_answers(recipe: Answers) -> dict[str, Any]:
    """Returns what decides the answers beside the fields in the key: `more` of `content_key`."""
    model: Any = recipe.model
    if not recipe.model.startswith(STAGE_WEIGHTS):
        model = folder_contents(Path(recipe.model))
    if recipe.precision == "fp32":
        return {"model": model}
    return {"model": model, "batch_size": recipe.batch_size, "attention": recipe.attention}


def answers_key(recipe: Answers) -> str:
    """Returns the content key of the answers."""
    return digest(answers_identity(recipe))


def answers_identity(recipe: Answers) -> dict[str, Any]:
    """Returns everything that decides the answers (`kdscale.core.keys.identity`)."""
    return identity(recipe.kind, recipe.version, recipe, {}, beside_answers(recipe))
