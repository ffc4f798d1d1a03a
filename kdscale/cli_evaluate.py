"""`kdscale evaluate`: ask a VLM benchmarks, with the images and without, and score its answers."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from kdscale.core.config import Execution, Mode
from kdscale.core.storage import Storage
from kdscale.core.types import ConfigError
from kdscale.terminal import AsJson, StorageRoot, console, guarded, progress_bar

if TYPE_CHECKING:
    from kdscale.eval.scores import Score
    from kdscale.sweep.ask import Asked, Progress, Request

MME, NUM_BENCHMARKS = "mme_p", 16
CONSTANT_FROM = 0.95
PRINT_EVERY_S = 10.0
MAX_PLACES = 3
OneOfMode = Annotated[
    Literal["paper", "corrected"],
    typer.Option("--mode", help="paper: the reference rules, oddities included."),
]
Files = Annotated[Path | None, typer.Option("--data", help="Folder of their files; else the hub.")]
PrecisionName = Annotated[
    Literal["fp32", "bf16", "fp16"], typer.Option("--precision", help="Of the model.")
]
Revisions = Annotated[
    list[str] | None, typer.Option("--revision", help="BENCHMARK=COMMIT on the hub; repeatable.")
]


@dataclass(frozen=True)
class Row:
    """One benchmark's scores, and where its answers are."""

    benchmark: str
    seeing: Score
    blind: Score | None
    answers: str
    limited: bool

    def document(self) -> dict[str, Any]:
        """Returns the row as JSON; the scores of single items stay with the answers."""
        from kdscale.sweep.benchmark_outcomes import interval_of

        kept: dict[str, Any] = {"answers": self.answers, "limited": self.limited}
        for name, score in (("score", self.seeing), ("blind", self.blind)):
            kept[name] = score and {k: v for k, v in asdict(score).items() if k != "item_scores"}
            if score is not None:
                interval = interval_of(self.benchmark, score)
                kept[name]["interval"] = [interval.low, interval.high]
        return kept


def evaluate(
    model: Annotated[str, typer.Argument(help="Directory, key of a finetune stage, or hub id.")],
    benchmarks: Annotated[str, typer.Option("--benchmarks", help="a,b,... or all.")],
    data: Files = None,
    revision: Revisions = None,
    blind: Annotated[bool, typer.Option("--blind", help="Ask without the images, too.")] = False,
    mode: OneOfMode = "paper",
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only the first N.")] = None,
    actors: Annotated[int, typer.Option("--actors", min=0, help="0: this process.")] = 0,
    gpus: Annotated[float | None, typer.Option("--gpus", min=0, help="Per actor.")] = None,
    precision: PrecisionName = "fp32",
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Questions at once.")] = 16,
    storage: StorageRoot = "runs",
    as_json: AsJson = False,
) -> None:
    """Ask a VLM benchmarks and score its answers; what was answered before is not asked again."""
    with guarded():
        from kdscale.sweep.ask import Request

        request = Request(
            model=model,
            benchmarks=tuple(benchmarks.split(",")),
            storage=Storage(storage),
            data=None if data is None else str(data.expanduser().resolve()),
            revisions=_revisions(revision or []),
            blind=blind,
            mode=mode,
            limit=limit,
            precision=precision,
            batch_size=batch_size,
            run=_execution(actors, gpus, as_json),
        )
        rows, average = _evaluated(request, as_json)
        if as_json:
            print(json.dumps(_document(request, rows, average), indent=2))
            return
        console.print(_table(rows, average, mode, limit))
        _explain(rows)
        _next(request, rows)


def _revisions(given: Sequence[str]) -> dict[str, str]:
    """Reads `BENCHMARK=COMMIT`."""
    pairs = [text.partition("=") for text in given]
    if wrong := ["".join(pair) for pair in pairs if not (pair[0] and pair[2])]:
        raise ConfigError(f"--revision {wrong[0]} is not of the form BENCHMARK=COMMIT")
    return {name: commit for name, _, commit in pairs}


def _execution(actors: int, gpus: float | None, as_json: bool) -> Execution:
    """Returns how many actors answer, and what each takes; on one machine no more than fit."""
    if not actors:
        return Execution(num_workers=0, gpus_per_worker=gpus or 0.0)
    import torch

    each = float(torch.cuda.is_available()) if gpus is None else gpus
    run = Execution(num_workers=actors, gpus_per_worker=each)
    if "RAY_ADDRESS" in os.environ:  # a cluster may grow
        return run
    cores = os.cpu_count() or 1
    room = int(cores / run.cpus_per_worker)
    if each and torch.cuda.is_available():
        room = min(room, int(torch.cuda.device_count() / each))
    if actors > (room := max(1, room)):
        target = Console(stderr=True) if as_json else console
        what = f"{room} of the {actors} actors fit this machine ({cores} cores): {room} answer"
        target.print(what, highlight=False, soft_wrap=True)
        return run.replace(num_workers=room)
    return run


def _evaluated(request: Request, as_json: bool) -> tuple[list[Row], float | None]:
    """Asks and scores; the Average where it means something."""
    from kdscale.eval import average, score
    from kdscale.eval.answers import load_items
    from kdscale.sweep.ask import ask_all, prepare
    from kdscale.sweep.benchmark_outcomes import is_limited

    with _telling(as_json) as tell:
        asked = prepare(request, tell)
        ask_all(asked, request.storage, tell)
        rows: list[Row] = []
        by_name: dict[str, list[Asked]] = {}
        for one in asked:
            by_name.setdefault(one.recipe.benchmark, []).append(one)
        for number, (name, parts) in enumerate(by_name.items()):
            tell(f"scoring {name}", number, len(by_name))
            stores = [one.store(request.storage) for one in parts]
            scores = [score(name, load_items(store), request.mode) for store in stores]
            unseeing = scores[1] if request.blind else None
            cut = is_limited(parts[0].recipe, parts[0].count)
            rows.append(Row(name, scores[0], unseeing, stores[0].url("output"), cut))
    if any(row.limited for row in rows) or len(rows) < NUM_BENCHMARKS:
        return rows, None
    return rows, average({row.benchmark: row.seeing for row in rows})


@contextmanager
def _telling(as_json: bool) -> Generator[Progress]:
    """Shows progress: a bar on a terminal, else a line whenever something else begins."""
    target = Console(stderr=True) if as_json else console
    if target.is_terminal:
        with progress_bar(as_json) as show:
            yield show
        return
    last: tuple[str, float] = ("", 0.0)

    def tell(what: str, done: int, total: int | None) -> None:
        """Prints what is done where it has changed, or after a while."""
        nonlocal last
        now = time.monotonic()
        if what != last[0] or now - last[1] > PRINT_EVERY_S or done == total:
            place = "" if total is None else f" ({done:,} of {total:,})"
            target.print(f"{what}{place}", highlight=False, markup=False, soft_wrap=True)
            last = what, now

    yield tell


def _table(rows: Sequence[Row], average: float | None, mode: Mode, limit: int | None) -> Table:
    """Arranges the scores, with intervals as in reports."""
    from kdscale.sweep.benchmark_outcomes import counted, interval_of

    limited = limit is not None and any(row.limited for row in rows)
    cut = f", the first {limit:,} questions each" if limited else ""
    look: Any = {"box": box.SIMPLE_HEAD, "show_edge": False, "padding": (0, 1, 0, 0)}
    table = Table(title=f"Scores, {mode} rules{cut}", **look)
    table.add_column("benchmark", style="cyan", no_wrap=True)
    for name in ("score", "95 % interval", "n", "blind", "chance", "constant", "unread"):
        # Where a terminal is narrow, an interval takes two lines; no number is ever cut.
        table.add_column(name, justify="right", no_wrap=not name.endswith("interval"))
    for row in rows:
        found, interval = row.seeing, interval_of(row.benchmark, row.seeing)
        mark = "*" if row.limited and row.benchmark == MME else ""
        table.add_row(
            row.benchmark,
            f"{found.value:.2f}{mark}",
            f"{interval.low:.2f} – {interval.high:.2f}",
            counted(row.benchmark, mode, found),
            "" if row.blind is None else f"{row.blind.value:.2f}",
            f"{found.chance:.2f}",
            f"{found.constant_share:.0%}{'!' if _is_constant(found) else ''}",
            f"{found.unparsed_share:.0%}",
        )
    if average is not None:
        table.add_section()
        table.add_row("Average", f"{average:.2f}", end_section=True)
    return table


def _is_constant(score: Score) -> bool:
    """Whether a model says the same to nearly everything."""
    return score.constant_share > CONSTANT_FROM


def _explain(rows: Sequence[Row]) -> None:
    """Says what the marks mean."""
    if any(row.limited and row.benchmark == MME for row in rows):
        _say("* a sum over the categories that --limit has reached, not comparable with any other")
    constant = [row.benchmark for row in rows if _is_constant(row.seeing)]
    if constant:
        _say(
            f"! one answer to more than {CONSTANT_FROM:.0%} of the questions: {', '.join(constant)}"
        )
    if len(rows) < NUM_BENCHMARKS and not any(row.limited for row in rows):
        _say(f"no Average: it is the mean of all {NUM_BENCHMARKS} benchmarks")


def _next(request: Request, rows: Sequence[Row]) -> None:
    """Says where the answers are and what to do next."""
    for row in rows[:MAX_PLACES]:
        _say(f"answers of {row.benchmark}: {row.answers}")
    if len(rows) > MAX_PLACES:
        _say("and so on; --json names the others")
    if any(row.limited for row in rows):
        _say(f"next, all questions: {_command(replace(request, limit=None))}")
    elif not request.blind:
        _say(f"next, what the images add: {_command(replace(request, blind=True))}")
    else:
        other = "corrected" if request.mode == "paper" else "paper"
        _say(f"next, under the other rules: {_command(replace(request, mode=other))}")


def _command(request: Request) -> str:
    """Returns the command that asks what a request asks."""
    given = {
        "--benchmarks": ",".join(request.benchmarks),
        "--data": request.data,
        "--mode": request.mode if request.mode != "paper" else None,
        "--limit": request.limit,
        "--actors": request.run.num_workers or None,
        "--precision": request.precision if request.precision != "fp32" else None,
        "--batch-size": request.batch_size if request.batch_size != 16 else None,
        "--storage": request.storage.root,
    }
    words = ["kdscale", "evaluate", request.model]
    for name, commit in request.revisions.items():
        words += ["--revision", f"{name}={commit}"]
    for option, value in given.items():
        words += [] if value is None else [option, str(value)]
    return shlex.join([*words, "--blind"] if request.blind else words)


def _say(text: str) -> None:
    """Prints a line to be read or copied as it is."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _document(request: Request, rows: Sequence[Row], average: float | None) -> dict[str, Any]:
    """Returns everything as JSON."""
    return {
        "model": request.model,
        "mode": request.mode,
        "revisions": dict(request.revisions),
        "limit": request.limit,
        "precision": request.precision,
        "benchmarks": {row.benchmark: row.document() for row in rows},
        "average": average,
    }
