"""What all commands share: the console, common options, and errors as one line."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kdscale.core.types import (
    Interrupted,
    KdscaleError,
    LimitReached,
    StageFailed,
    StageStopped,
)

console = Console()

StorageRoot = Annotated[
    str, typer.Option("--storage", envvar="KDSCALE_STORAGE", help="Where stages live.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


@contextmanager
def guarded() -> Generator[None]:
    """Turns our errors into a line a person can act on.

    The exit code is 2 for input, 1 for failed stages, 3 for what has reached its limit or
    was interrupted.
    """
    try:
        yield
    except KdscaleError as error:
        Console(stderr=True).print(f"[bold red]{type(error).__name__}[/]: ", end="")
        Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(str(error))
        stopped = isinstance(error, Interrupted | LimitReached | StageStopped)
        raise typer.Exit(1 if isinstance(error, StageFailed) else 3 if stopped else 2) from error


@contextmanager
def progress_bar(as_json: bool = False) -> Generator[Callable[[str, int, int | None], None]]:
    """Shows a progress bar; yields what is told (what is done, how many, of how many or None)."""
    words = TextColumn("{task.description}", markup=False)
    columns = (words, BarColumn(), MofNCompleteColumn())
    target = Console(stderr=True) if as_json else console
    with Progress(
        *columns,
        TimeRemainingColumn(),
        console=target,
        transient=True,
        disable=not target.is_terminal,
    ) as progress:
        task = progress.add_task("starting", total=None)

        def show(what: str, done: int, total: int | None) -> None:
            """Moves the bar."""
            progress.update(task, description=what, completed=done, total=total)

        yield show
