"""`kdscale data bench`: how fast shards become batches here."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from kdscale.core.config import DataSpec
from kdscale.core.storage import Storage
from kdscale.terminal import AsJson, StorageRoot, console, guarded

Consumer = Annotated[
    float | None,
    typer.Option("--consumer", min=0.1, help="Samples/s of the training step to imitate."),
]


def bench(
    pattern: Annotated[str, typer.Argument(help="Shards: a glob, {00000..00999}.tar, a folder.")],
    storage: StorageRoot = "runs",
    px: Annotated[int, typer.Option("--px", min=8, help="Side of the crops.")] = 224,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Samples per batch.")] = 256,
    seconds: Annotated[float, typer.Option("--seconds", min=1.0, help="Time to measure.")] = 20.0,
    consumer: Consumer = None,
    as_json: AsJson = False,
) -> None:
    """Measure the stream: samples/s, per core, and the share of time a consumer waits."""
    with guarded():
        from kdscale.stages.inputs import find_source
        from kdscale.sweep.throughput import measure

        source = find_source(
            DataSpec(name="data", urls=pattern), Storage(storage), progress=console.print
        )
        if not as_json:
            console.print(f"streaming {source.num_samples:,} samples for {seconds:g} s")
        found = measure(
            source.manifest(),
            image_px=px,
            batch_size=batch,
            seconds=seconds,
            consumer_samples_per_s=consumer,
        )
        if as_json:
            print(json.dumps(asdict(found) | {"samples_per_s_per_core": found.per_core}))
            return
        table = Table("figure", "value", title=f"Stream, {px} px, batches of {batch}")
        table.add_row("samples/s", f"{found.samples_per_s:,.0f}")
        table.add_row(f"samples/s per core of {found.cores}", f"{found.per_core:,.0f}")
        table.add_row("data_wait", f"{found.data_wait:.0%}")
        table.add_row("first batch", f"{found.first_batch_s:.1f} s, processes started included")
        table.add_row("measured over", f"{found.num_samples:,} samples")
        console.print(table)
        if consumer is None:
            console.print(
                "next: --consumer N with your step's samples/s shows whether it would wait"
            )
