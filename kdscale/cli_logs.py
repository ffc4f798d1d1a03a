"""`kdscale logs`: what a stage has said, from any machine that sees the storage."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated

import typer

from kdscale.core.find import find_any
from kdscale.core.storage import Storage
from kdscale.terminal import StorageRoot, console, guarded

Key = Annotated[str, typer.Argument(metavar="KEY", help="Of the stage, or its first digits.")]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Go on until the stage has ended.")]


def logs(key: Key, storage: StorageRoot = "runs", follow: Follow = False) -> None:
    """Show what a stage's processes have said, its journal by attempts, and how it stands.

    Keys are in `kdscale status`. Times are UTC.
    """
    with guarded():
        from kdscale.sweep.logs import follow_logs, print_logs

        place = Storage(storage)
        place.check_made("`kdscale run SWEEP.py`")
        stage = find_any(place, key)
        if follow:
            with suppress(KeyboardInterrupt):
                follow_logs(stage, console)
        else:
            print_logs(stage, console)
