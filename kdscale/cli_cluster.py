"""`kdscale cluster`: manifests of a cluster, and what is wrong with one before it costs money."""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import yaml

from kdscale.core.types import ConfigError
from kdscale.sweep.cluster import load_cluster
from kdscale.sweep.cluster_check import check_config, read_config
from kdscale.sweep.cluster_kube import rayjob
from kdscale.sweep.cluster_ray import ray_on_aws, ray_on_this_machine
from kdscale.sweep.spot_notice import METADATA, drain_this_node, wait_for_notice
from kdscale.sweep.upload import find_upload, mebibytes
from kdscale.terminal import console, guarded

cluster_app = typer.Typer(no_args_is_help=True, help=__doc__)
Source = Annotated[Path, typer.Option("--source", help="The cluster's description.")]
NOTICE_S = 120.0  # what EC2 promises
HEADER = (
    "# Made by `kdscale cluster render --kind {kind}` from {source}: change that file instead.\n"
)


@cluster_app.command("render")
def render(
    kind: Annotated[
        Literal["ray", "local", "kuberay"], typer.Option("--kind", help="Who is to read it.")
    ] = "ray",
    source: Source = Path("cluster.toml"),
    entrypoint: Annotated[
        str, typer.Option("--entrypoint", help="With kuberay: what the job runs, in /kdscale.")
    ] = "python sweeps/quickstart.py",
    out: Annotated[Path | None, typer.Option("--out", help="Instead of the screen.")] = None,
) -> None:
    """Print the manifest of a cluster."""
    with guarded():
        cluster = load_cluster(source)
        if kind == "kuberay":
            document = rayjob(cluster, entrypoint)
        else:
            document = ray_on_aws(cluster) if kind == "ray" else ray_on_this_machine(cluster)
        text = HEADER.format(kind=kind, source=source.name) + as_yaml(document)
        if out is None:
            print(text, end="")
        else:
            try:
                out.write_text(text)
            except OSError as error:
                raise ConfigError(f"cannot write {out}: {error.strerror}") from error
            console.print(f"wrote {out}", highlight=False)


@contextmanager
def without_remarks() -> Generator[None]:
    """Keeps Ray's remarks on a configuration from the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@cluster_app.command("check")
def check(
    file: Annotated[Path, typer.Argument(help="A configuration of Ray's cluster launcher.")] = Path(
        "cluster.yaml"
    ),
) -> None:
    """Check a cluster: Ray's schema, doors, token, idle time-out, storage, locks."""
    with without_remarks(), guarded():
        check_config(read_config(file), str(file))
        console.print(f"{file}: nothing public, one storage, one lock for all", highlight=False)


@cluster_app.command("check-upload")
def check_upload(
    directory: Annotated[Path, typer.Argument(help="What --working-dir will be.")] = Path("."),
) -> None:
    """Check that `ray job submit --working-dir DIRECTORY` would not be refused as too big."""
    with without_remarks(), guarded():
        upload = find_upload(directory)
        upload.check()
        size, cap = mebibytes(upload.size_bytes), mebibytes(upload.cap_bytes)
        console.print(f"{len(upload.files):,} files, {size} of {cap}", highlight=False)


class _Plain(yaml.SafeDumper):
    """Writes lists and dictionaries that occur twice twice: anchors are hard to read."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def as_yaml(document: dict[str, Any]) -> str:
    """Returns a document as YAML, in its own order."""
    return yaml.dump(document, Dumper=_Plain, sort_keys=False, width=1000)


@cluster_app.command("watch")
def watch(
    metadata: Annotated[str, typer.Option("--metadata", help="Where the node asks.")] = METADATA,
    every_s: Annotated[float, typer.Option("--every", help="Seconds.", min=0.1)] = 5.0,
) -> None:
    """On a spot node: wait for the cloud's notice, and have Ray drain the node in time."""
    left = wait_for_notice(metadata, every_s)
    seconds = NOTICE_S if left is None else left
    console.print(
        f"this node goes in {seconds:.0f} s: its stages write a checkpoint", highlight=False
    )
    drain_this_node(seconds)
