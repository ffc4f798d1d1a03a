"""What all commands share: the console, common options, and errors as one line."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console

from kdscale.core.types import KdscaleError, StageFailed

console = Console()

StorageRoot = Annotated[str, typer.Option("--storage", help="Where stages live.")]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


@contextmanager
def guarded() -> Generator[None]:
    """Turns our errors into a line a person can act on: exit 2 for input, 1 for failed stages."""
    try:
        yield
    except KdscaleError as error:
        Console(stderr=True).print(f"[bold red]{type(error).__name__}[/]: ", end="")
        Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(str(error))
        raise typer.Exit(1 if isinstance(error, StageFailed) else 2) from error
