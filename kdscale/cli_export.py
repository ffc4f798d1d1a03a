"""`kdscale export`: a finished stage's model as a directory that other programs open."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from kdscale.core.find import find_stage
from kdscale.core.storage import StageStore, Storage
from kdscale.terminal import AsJson, StorageRoot, console, guarded

if TYPE_CHECKING:
    from kdscale.models.export import ExportReport


class Target(StrEnum):
    """Whose layout an export has."""

    HF = "hf"
    OPEN_CLIP = "open_clip"


KINDS = {Target.HF: ("finetune",), Target.OPEN_CLIP: ("distill", "teacher")}


def export(
    key: Annotated[str, typer.Argument(help="Key of a finished stage, or its first digits.")],
    to: Annotated[
        Target, typer.Option("--to", help="hf: a VLM. open_clip: a student or teacher CLIP.")
    ],
    out: Annotated[Path, typer.Option("--out", help="New or empty directory.")],
    storage: StorageRoot = "runs",
    as_json: AsJson = False,
) -> None:
    """Write a finished stage's model for transformers or open_clip, and prove it by opening it."""
    with guarded():
        store = Storage(storage)
        stage = find_stage(store, key, KINDS[to], f"--to {to}")
        if not as_json:
            console.print(f"exporting {stage.kind} {stage.key}, then opening it with {to}")
        report = _export(stage, to, out)
        if as_json:
            print(json.dumps(asdict(report) | {"kind": stage.kind, "key": stage.key}, indent=2))
            return
        console.print(_table(report, stage))
        console.print("next, in Python:", highlight=False)
        console.print(_indented(report.code), soft_wrap=True, highlight=False, markup=False)


def _export(stage: StageStore, to: Target, out: Path) -> ExportReport:
    """Writes the model that a stage has left."""
    from kdscale.models.export import export_hf, export_open_clip
    from kdscale.models.towers import read_spec

    with stage.storage.local_directory(*stage.parts, "output", "model") as directory:
        if to is Target.HF:
            return export_hf(directory, out)
        return export_open_clip(read_spec(directory), stage.storage, out)


def _table(report: ExportReport, stage: StageStore) -> Table:
    """Arranges what was written and how it compared."""
    table = Table(title="Exported", show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    reader = "a process of its own" if report.library == "transformers" else "open_clip itself"
    rows = {
        "stage": f"{stage.kind} {stage.key}",
        "directory": report.directory,
        "opened by": f"{report.library}, in {reader}",
        "logits": f"differ by {report.max_difference:.2g} at most; {report.tolerance:.2g} would be "
        "an error",
    }
    if report.library == "transformers":
        rows["greedy answer"] = "the same"
        rows["needs kdscale"] = _needs(report)
    else:
        rows["tokenizer"] = "kdscale's own" if report.own_tokenizer else "in open_clip"
    for name, value in rows.items():
        table.add_row(name, Text(value))  # brackets in a path are no markup
    return table


def _needs(report: ExportReport) -> str:
    """Says what must be imported before transformers opens the directory."""
    if report.extra_import is None:
        return "no: transformers' own classes"
    return f"one import, `import {report.extra_import}`: its tower is no class of transformers"


def _indented(code: str) -> str:
    """Sets code off from the words around it."""
    return "\n".join(f"    {line}" if line else "" for line in code.splitlines())
