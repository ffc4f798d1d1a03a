"""`kdscale cka`: how alike two models see the same images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from kdscale.core.config import DataSpec
from kdscale.core.eval_config import Cka
from kdscale.core.storage import Storage
from kdscale.core.types import ConfigError
from kdscale.terminal import AsJson, StorageRoot, console, guarded, progress_bar

if TYPE_CHECKING:
    from kdscale.stages.cka_result import CkaOutcome

TOO_FEW, FEW_IMAGES = 200, 500


class TapName(StrEnum):
    """Which vector stands for an image."""

    PATCH_MEAN = "patch_mean"
    POOLED = "pooled"
    VLM = "vlm"


class PrecisionName(StrEnum):
    """What the towers compute in."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


Model = Annotated[
    str,
    typer.Argument(
        help="Role, open_clip ARCH/TAG, timm name, hf-hub:ORG/NAME, directory, or a stage's key."
    ),
]
Number = Annotated[
    int | None, typer.Option("--n", min=4, help="Images, drawn by content hash; else all.")
]


def cka(
    a: Model,
    b: Model,
    images: Annotated[
        str, typer.Option("--images", help="A folder of images, or tars or Parquet files.")
    ],
    tap: Annotated[TapName, typer.Option("--tap", help="Vector of an image.")] = TapName.PATCH_MEAN,
    layers: Annotated[
        str, typer.Option("--layers", help="final, all, or how many blocks, evenly spaced.")
    ] = "final",
    n: Number = None,
    precision: Annotated[PrecisionName, typer.Option("--precision")] = PrecisionName.FP32,
    out: Annotated[Path, typer.Option("--out", help="Folder of the results.")] = Path("cka"),
    storage: StorageRoot = "runs",
    as_json: AsJson = False,
) -> None:
    """Compare two models by linear CKA on any images: final layers, or all with a heat map."""
    with guarded():
        recipe = Cka(
            a=a,
            b=b,
            images=DataSpec(name=images, urls=images),
            tap=tap.value,
            layers=_layers(layers),
            precision=precision.value,
            n=n,
        )
        outcome = _compare(recipe, Storage(storage), as_json)
        written = _write(outcome, out)
        if as_json:
            print(json.dumps(outcome.document() | {"files": written}, indent=2))
            return
        _print(outcome, written, recipe)


def _layers(text: str) -> Any:
    """Reads `--layers`."""
    if text in ("final", "all"):
        return text
    if not text.isdigit() or int(text) < 2:
        raise ConfigError(f"--layers takes final, all, or a number from 2 on, got {text!r}")
    return int(text)


def _compare(recipe: Cka, store: Storage, as_json: bool) -> CkaOutcome:
    """Surveys the images and compares, with a progress bar."""
    from kdscale.stages.cka import compare_named

    with progress_bar(as_json) as progress:
        return compare_named(recipe, store, progress)


def _write(outcome: CkaOutcome, out: Path) -> list[str]:
    """Writes the files of a comparison, and returns their paths."""
    from kdscale.stages.cka_result import documents

    store, found = Storage(str(out)), documents(outcome)
    for name, data in found.items():
        store.write(data, name)
    return [store.url(name) for name in found]


def _print(outcome: CkaOutcome, written: Sequence[str], recipe: Cka) -> None:
    """Shows the final layers, what was left out, and what to do next."""
    result = outcome.result
    table = Table(title=f"CKA, {outcome.tap}", show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    left_out = ", ".join(f"{cause} {count}" for cause, count in outcome.faults.items())
    rows = {
        "a": f"{outcome.names[0]}, {len(result.p)} layer(s), final width p = {result.p[-1]}",
        "b": f"{outcome.names[1]}, {len(result.q)} layer(s), final width q = {result.q[-1]}",
        "images": f"n = {result.n:,}; {outcome.num_duplicates:,} duplicates left out",
        "unreadable": left_out or "none",
        "biased": f"{outcome.biased:.4f}",
        "debiased": f"{outcome.debiased:.4f}",
        "files": "\n".join(written),
    }
    for name, value in rows.items():
        table.add_row(name, Text(value))  # brackets in a path are no markup
    console.print(table)
    for note in outcome.notes():
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"next: {_next(outcome, recipe)}", highlight=False, markup=False, soft_wrap=True)


def _next(outcome: CkaOutcome, recipe: Cka) -> str:
    """Says what to look at next."""
    if outcome.result.n < TOO_FEW:
        return (
            f"compare on more images: with {outcome.result.n} neither figure can be trusted, the "
            "biased one rises by itself and the debiased one needs some hundreds to be stable"
        )
    if outcome.result.n < FEW_IMAGES:
        return "trust the debiased figure: with so few images the biased one rises by itself"
    if recipe.layers == "final":
        return "--layers all compares every block with every other and draws a heat map"
    return "open the heat map; --tap vlm compares what a VLM's connector reads"
