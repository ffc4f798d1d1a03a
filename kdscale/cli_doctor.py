"""`kdscale doctor`: is this machine, or the cluster at RAY_ADDRESS, fit for sweeps?"""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console

from kdscale.terminal import AsJson, StorageRoot, console, guarded

Uri = Annotated[
    str | None, typer.Option("--tracking-uri", help="MLflow server; MLFLOW_TRACKING_URI else.")
]


def doctor(
    storage: StorageRoot = "runs", tracking_uri: Uri = None, as_json: AsJson = False
) -> None:
    """Examine every node: versions, GPUs, decoder, disk, shared memory, storage, MLflow, network.

    The exit code is 1 where something is wrong.
    """
    with guarded():
        from kdscale.sweep.doctor import default_uri, diagnose, print_diagnosis

        found = diagnose(storage, tracking_uri or default_uri())
        if as_json:
            print(json.dumps(found.document(), indent=2))
        else:
            print_diagnosis(found, console if console.is_terminal else Console(width=120))
        if not found.ok:
            raise typer.Exit(1)
