"""Look after image-text data: verify, inspect, prepare and mix shards."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from kdscale.core.config import DataSpec
from kdscale.core.storage import Storage
from kdscale.core.types import ConfigError, TooManyBadSamples
from kdscale.terminal import AsJson, StorageRoot, console, guarded, progress_bar

if TYPE_CHECKING:
    from kdscale.data.mix import MixedSource
    from kdscale.data.prepare import Prepared
    from kdscale.data.shards import Content, Manifest, ShardEntry
    from kdscale.data.survey import Survey

data_app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)

MAX_EXAMPLES = 3
BAR_CHARACTERS = 30

Pattern = Annotated[str, typer.Argument(help="Shards: a glob, {00000..00999}.tar, or a folder.")]
BadFraction = Annotated[
    float,
    typer.Option("--max-bad-fraction", min=0, max=1, help="Share of bad samples that is let pass."),
]
Talks = Annotated[
    bool, typer.Option("--conversations", help="Of conversations, with images or without.")
]
Labelled = Annotated[bool, typer.Option("--labelled", help="Require a label, not a caption.")]


@data_app.command("verify")
def verify(
    pattern: Pattern,
    out: Annotated[Path | None, typer.Option("--out", help="Manifest to write as well.")] = None,
    storage: StorageRoot = "runs",
    labelled: Labelled = False,
    conversations: Talks = False,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="One per core.")] = None,
    max_bad_fraction: BadFraction = 0.05,
    as_json: AsJson = False,
) -> None:
    """Decode every image once, and keep the manifest where `run` looks for it."""
    with guarded():
        from kdscale.data.shards import build_manifest
        from kdscale.stages.inputs import as_shards, manifest_place

        # The share of bad samples is judged below, so that the table shows what is wrong.
        spec = DataSpec(name="data", urls=pattern, max_bad_fraction=1.0)
        content = _content(labelled, conversations)
        store = Storage(storage)
        spec = as_shards(spec, store) if labelled else spec
        place = manifest_place(str(spec.urls), content=content)
        began = time.perf_counter()
        with _shard_bar(str(spec.urls), as_json) as advance:
            manifest = build_manifest(spec, content=content, num_threads=threads, progress=advance)
        document = _verified_document(manifest, time.perf_counter() - began)
        if out is not None:
            _write_file(out, manifest.to_json().encode())
        error = _too_many(manifest, max_bad_fraction)
        if error is None:
            store.write(manifest.to_json().encode(), *place)
        kept = None if error else store.url(*place)
        _show(document | {"manifest": kept}, _verified_table, as_json)
        if error:
            raise error
        if not as_json:
            _next("kdscale", "plan", "SWEEP.py", "--storage", storage, "--data", f"NAME={pattern}")


def _content(labelled: bool, conversations: bool) -> Content:
    """Returns what the samples are to be verified for."""
    if labelled and conversations:
        raise ConfigError("give --labelled or --conversations, not both")
    return "labels" if labelled else "conversations" if conversations else "captions"


def _too_many(manifest: Manifest, allowed: float) -> TooManyBadSamples | None:
    """Returns the error that too many bad samples are, None where they are few."""
    from kdscale.data.shards import check_fraction

    try:
        check_fraction(manifest, allowed)
    except TooManyBadSamples as error:
        return error
    return None


def _verified_document(manifest: Manifest, seconds: float) -> dict[str, Any]:
    """Returns what verification found as JSON."""
    causes = manifest.causes()
    examples: dict[str, list[str]] = {cause: [] for cause in causes}
    for shard in manifest.distinct:
        for _, key, cause in shard.quarantine:
            if len(examples[cause]) < MAX_EXAMPLES:
                examples[cause].append(f"{key} in {Path(shard.path).name}")
    looked = manifest.num_samples + sum(causes.values())
    return {
        "shards": len(manifest.shards),
        "samples": manifest.num_samples,
        "bytes": manifest.num_bytes,
        "seconds": round(seconds, 3),
        "samples_per_s": round(looked / seconds, 1),
        "quarantined": causes,
        "examples": examples,
        "hash": manifest.hash,
    }


def _verified_table(document: dict[str, Any]) -> Table:
    """Arranges what verification found."""
    table = _table("Verified")
    _row(table, "shards", f"{document['shards']:,}")
    _row(table, "usable samples", f"{document['samples']:,}")
    _row(table, "size", _size(document["bytes"]))
    _row(table, "speed", f"{document['samples_per_s']:,.0f} samples/s")
    _row(table, "quarantined", f"{sum(document['quarantined'].values()):,}")
    for cause, count in sorted(document["quarantined"].items(), key=lambda item: -item[1]):
        _row(table, f"  {cause}", f"{count:,}: {', '.join(document['examples'][cause])}")
    _row(table, "manifest hash", document["hash"])
    _row(table, "manifest", document["manifest"] or "not kept: too many bad samples")
    return table


@data_app.command("inspect")
def inspect(
    pattern: Pattern,
    out: Annotated[Path, typer.Option("--out", help="Contact sheet.")] = Path("contact.png"),
    samples: Annotated[int, typer.Option("--samples", min=1, help="Images on the sheet.")] = 48,
    seed: Annotated[int, typer.Option("--seed", help="Decides which shards and samples.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Show sizes, captions and a contact sheet; of large sets, of some shards drawn at random."""
    with guarded():
        from kdscale.data.contact import contact_sheet
        from kdscale.data.survey import survey

        with progress_bar(as_json) as show:
            found = survey(
                pattern,
                num_picked=samples,
                seed=seed,
                progress=lambda done, total: show("looking into shards", done, total),
            )
        seen = f"{found.num_samples:,} samples in {found.looked_shards:,} of {found.num_shards:,}"
        title = f"{len(found.picked)} of {seen} shards, {_size(found.num_bytes)} in all"
        _write_file(out, contact_sheet(found.picked, _short(pattern), title))
        _show(found.document() | {"sheet": str(out)}, lambda _: _survey_table(found), as_json)
        if not as_json:
            console.print(f"contact sheet: {out}", soft_wrap=True, markup=False)
            _next("kdscale", "data", "verify", pattern)


def _survey_table(found: Survey) -> Table:
    """Arranges what an inspection saw."""
    document = found.document()
    note = "all" if found.whole else "drawn at random; the numbers below are theirs"
    table = _table("Inspected")
    _row(table, "shards", f"{found.num_shards:,}, {_size(found.num_bytes)}")
    _row(
        table,
        "looked at",
        f"{found.num_samples:,} samples in {found.looked_shards:,} shards ({note})",
    )
    _row(table, "formats", ", ".join(f"{k} {v:,}" for k, v in document["formats"].items()))
    if document["non_jpeg"] is not None:
        _row(table, "not JPEG", f"{document['non_jpeg']:.2%}")
    _row(table, "width, px", _spread(document["width"], "min", "median", "max"))
    _row(table, "height, px", _spread(document["height"], "min", "median", "max"))
    most = max((count for _, count in found.megapixels()), default=0)
    for edge, count in found.megapixels():
        if count:
            bar = "█" * max(1, round(BAR_CHARACTERS * count / most))
            _row(table, f"  from {edge:g} megapixels", f"{bar} {count:,}")
    names = ("min", "median", "p95", "max")
    _row(table, "bytes per image", _spread(document["image_bytes"], *names))
    _row(table, "caption, characters", _spread(document["caption_characters"], *names))
    _row(table, "caption, words", _spread(document["caption_words"], *names))
    for fault, count in document["faults"].items():
        _row(table, f"  {fault}", f"{count:,}")
    return table


def _spread(quantiles: dict[str, float] | None, *names: str) -> str:
    """Writes quantiles in a line."""
    if quantiles is None:
        return "none"
    return "  ".join(f"{name} {quantiles[name]:,.0f}" for name in names)


@data_app.command("prepare")
def prepare(
    source: Annotated[str, typer.Argument(help="Captions: .tsv, .csv, .json or .jsonl.")],
    images: Annotated[str, typer.Option("--images", help="Folder of the images.")],
    out: Annotated[str, typer.Option("--out", help="Folder for the shards.")],
    kind: Annotated[
        str, typer.Option("--format", help="auto, table, cc12m (url TAB caption) or llava.")
    ] = "auto",
    conversations: Annotated[
        bool, typer.Option("--conversations", help="Whole conversations of LLaVA's format.")
    ] = False,
    px: Annotated[
        int | None, typer.Option("--px", help="Longest shorter side; 256, of conversations 512.")
    ] = None,
    quality: Annotated[int, typer.Option("--quality", help="Of JPEGs encoded anew.")] = 90,
    samples_per_shard: Annotated[int, typer.Option("--samples-per-shard")] = 5000,
    seed: Annotated[int, typer.Option("--seed", help="Order of conversations.")] = 0,
    workers: Annotated[int | None, typer.Option("--workers", help="One per core.")] = None,
    max_bad_fraction: BadFraction = 0.05,
) -> None:
    """Make WebDataset shards of a captions file and a folder of images; safe to repeat."""
    with guarded():
        from kdscale.data import prepare as work

        kind = _format(kind, conversations)
        options: dict[str, Any] = {
            "source": source, "images": images, "out": out, "format": kind, "px": px,
            "quality": quality, "samples_per_shard": samples_per_shard, "seed": seed,
            "workers": workers, "max_bad_fraction": max_bad_fraction,
        }  # fmt: skip
        began = time.perf_counter()
        with progress_bar() as show:
            outcome = work.prepare(work.Preparation(**options), show)
        console.print(_prepared_table(outcome, out, time.perf_counter() - began))
        what = ["--conversations"] if kind == "conversations" else []
        _next("kdscale", "data", "verify", f"{out.rstrip('/')}/*.tar", *what)


def _format(kind: str, conversations: bool) -> str:
    """Returns the format that two options name together."""
    from kdscale.data.captions import FORMATS

    if kind not in FORMATS:
        raise ConfigError(f"--format is one of {', '.join(FORMATS)}, got {kind!r}")
    if conversations and kind not in ("auto", "llava", "conversations"):
        raise ConfigError(f"--conversations reads LLaVA's format, not {kind}")
    return "conversations" if conversations else kind


def _prepared_table(outcome: Prepared, out: str, seconds: float) -> Table:
    """Arranges what preparation made."""
    table = _table(f"Prepared ({outcome.format})")
    _row(table, "rows", f"{outcome.num_rows:,} in {seconds:,.1f} s")
    kept = f"{outcome.num_kept:,} images kept as they were"
    _row(table, "samples", f"{outcome.num_samples:,}, {kept}")
    _row(table, "shards", f"{outcome.num_shards:,}, {outcome.num_reused:,} of an earlier run")
    _row(table, "size", _size(outcome.num_bytes))
    _row(table, "rejected", f"{sum(outcome.causes.values()):,}")
    for cause, count in outcome.causes.items():
        _row(table, f"  {cause}", f"{count:,}")
    if outcome.causes:
        _row(table, "  list", f"{out.rstrip('/')}/rejected.jsonl")
    return table


@data_app.command("mix")
def mix(
    out: Annotated[Path, typer.Argument(help="Manifest to write, .json.")],
    source: Annotated[
        list[str], typer.Option("--source", help="PATTERN=WEIGHT, passes per epoch; repeatable.")
    ],
    storage: StorageRoot = "runs",
    conversations: Talks = False,
    max_bad_fraction: BadFraction = 0.05,
) -> None:
    """Write a manifest that draws on several data sets, each as often as its weight says."""
    with guarded():
        from kdscale.data import mix as work
        from kdscale.stages.inputs import verified

        if out.suffix != ".json":
            raise ConfigError(f"a mix is a manifest and ends with .json, got {out}")
        sources: list[MixedSource] = []
        for pattern, weight in work.parse_sources(source).items():
            spec = DataSpec(name=pattern, urls=pattern, max_bad_fraction=max_bad_fraction)
            with _shard_bar(pattern) as advance:
                manifest = verified(
                    spec,
                    Storage(storage),
                    content=_content(False, conversations),
                    each_shard=advance,
                )
            sources.append(work.MixedSource(pattern, manifest, weight))
        mixed = work.mix(sources)
        _write_file(out, mixed.to_json().encode())
        console.print(_mix_table(sources, mixed))
        _next("kdscale", "plan", "SWEEP.py", "--storage", storage, "--data", f"NAME={out}")


def _mix_table(sources: list[MixedSource], mixed: Manifest) -> Table:
    """Arranges a mix: what every source gives to an epoch."""
    table = Table(title="Mix")
    table.add_column("source", overflow="fold")
    for name in ("shards", "usable", "weight", "samples per epoch", "share"):
        table.add_column(name, justify="right")
    for source in sources:
        manifest = source.manifest
        table.add_row(
            Text(source.pattern),
            f"{len(manifest.shards):,}",
            f"{manifest.num_samples:,}",
            f"{source.weight:g}",
            f"{source.num_samples:,}",
            f"{source.num_samples / mixed.num_samples:.1%}",
        )
    table.add_section()
    usable = sum(source.manifest.num_samples for source in sources)
    total = f"{mixed.num_samples:,}"
    table.add_row("mix", f"{len(mixed.distinct):,}", f"{usable:,}", "", total, "100.0%")
    return table


@contextmanager
def _shard_bar(pattern: str, as_json: bool = False) -> Generator[Callable[[ShardEntry], None]]:
    """Shows how many shards are verified; yields what is told of each."""
    from kdscale.data.shards import expand

    total = None if pattern.endswith(".json") else len(expand(pattern))
    with progress_bar(as_json) as show:
        done = 0

        def advance(_: ShardEntry) -> None:
            """Counts one more shard."""
            nonlocal done
            done += 1
            show(f"verifying {_short(pattern)}", done, total)

        yield advance


def _show(
    document: dict[str, Any], arrange: Callable[[dict[str, Any]], Table], as_json: bool
) -> None:
    """Prints a result as a table or as JSON."""
    if as_json:
        print(json.dumps(document, indent=2))
    else:
        console.print(arrange(document))


def _table(title: str) -> Table:
    """Returns an empty table of names and values."""
    table = Table(title=title, show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _row(table: Table, name: str, value: str) -> None:
    """Adds a row; brackets in a path or key are no markup."""
    table.add_row(name, Text(value))


def _next(*command: str) -> None:
    """Prints the command to type next."""
    text = shlex.join(command)
    console.print(f"next: {text}", soft_wrap=True, highlight=False, markup=False)


def _write_file(path: Path, data: bytes) -> None:
    """Writes a file of the user's, whole or not at all."""
    target = path.absolute()
    Storage(str(target.parent)).write(data, target.name)


def _short(text: str, limit: int = 60) -> str:
    """Returns the end of a long text."""
    return text if len(text) <= limit else f"…{text[1 - limit :]}"


def _size(num_bytes: int) -> str:
    """Writes a number of bytes for people."""
    value = float(num_bytes)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.3g} TB"
