"""Is a cluster fit for sweeps: every node examined, their versions and clocks compared.

Where Ray is not connected to a cluster, this machine is the cluster.
"""

# pyright: basic
# (Ray carries too few types for strict checking)
from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kdscale.core.storage import Storage
from kdscale.core.types import StorageError
from kdscale.sweep.node_checks import Check, Node, examine, guarded, read_marks, versions
from kdscale.sweep.schedule import start_ray

MAX_SKEW_S = 5.0
TASK_TIMEOUT_S = 120.0
VALUE = 3.0
OTHERS = "sees others' files"
SIGNS = {True: "[green]ok[/]", False: "[bold red]no[/]", None: "[dim]-[/]"}


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What is known of a cluster.

    Attributes:
        nodes: One each, or what went wrong with it.
        across: Checks between nodes.
    """

    nodes: tuple[Node, ...]
    across: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        every = [*self.across, *(check for node in self.nodes for check in node.checks)]
        return all(check.ok is not False for check in every)

    def document(self) -> dict[str, Any]:
        """Returns it as JSON."""
        return {
            "ok": self.ok,
            "nodes": [
                {
                    "host": node.host,
                    "versions": dict(node.versions),
                    "checks": [vars(check) for check in node.checks],
                }
                for node in self.nodes
            ],
            "across": [vars(check) for check in self.across],
        }


def diagnose(storage: str, tracking_uri: str | None) -> Diagnosis:
    """Examines every node of the cluster, and what lies between them.

    Args:
        storage: Root of the stage store; a relative path means that of the driver.
        tracking_uri: MLflow's, None where nothing is to be asked.
    """
    start_ray()
    root = Storage(storage).root
    alive = [node for node in ray.nodes() if node["Alive"]]
    examined = {
        node["NodeID"]: _on(node).remote(
            examine, root, tracking_uri, wants_gpu=bool(node["Resources"].get("GPU"))
        )
        for node in alive
    }
    nodes = [_answer(examined[node["NodeID"]], node) for node in alive]
    marks = [node.mark for node in nodes if node.mark]
    nodes = [
        _with_others(node, partial(_reads_others, ray_node, root, marks, node.mark))
        for node, ray_node in zip(nodes, alive, strict=True)
    ]
    with suppress(OSError, StorageError):  # a row of the table tells of it
        Storage(root).remove("doctor")
    across = (
        compare_versions(nodes),
        guarded("clocks", lambda: compare_clocks(clocks(alive))),
        *(
            guarded(f"all-reduce by {backend}", partial(check_all_reduce, backend, pair))
            for backend, pair in pairs(alive).items()
        ),
    )
    return Diagnosis(nodes=tuple(nodes), across=across)


def _on(node: dict[str, Any]) -> Any:
    """Returns a remote function that calls another one on a node."""

    def call(function: Any, *args: Any, **options: Any) -> Any:
        return function(*args, **options)

    place: Any = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    return ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=place)(call)


def _answer(task: Any, node: dict[str, Any]) -> Node:
    """Waits for a node's answer; an error is what was found."""
    try:
        return ray.get(task, timeout=TASK_TIMEOUT_S)
    except Exception as error:
        last = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        check = Check(
            name="answers",
            ok=False,
            found=last,
            advice="is the same environment installed there? `ray status` shows the node",
        )
        host = node.get("NodeManagerHostname", "?")
        return Node(host=host, time=0.0, versions={}, checks=(check,))


def _with_others(node: Node, check: Callable[[], Check]) -> Node:
    """Adds to a node's checks whether it sees what the others have written."""
    return replace(node, checks=(*node.checks, guarded(OTHERS, check))) if node.mark else node


def _reads_others(node: dict[str, Any], root: str, marks: list[str], own: str) -> Check:
    """Asks a node for the files that the others have written."""
    others = [mark for mark in marks if mark != own]
    if not others:
        return Check(name=OTHERS, ok=None, found="no other node")
    missing = ray.get(_on(node).remote(read_marks, root, others), timeout=TASK_TIMEOUT_S)
    if missing:
        found = f"{len(missing)} of {len(others)} not"
        advice = "--storage must be one place for all nodes: a shared mount, or s3://"
        return Check(name=OTHERS, ok=False, found=found, advice=advice)
    return Check(name=OTHERS, ok=True, found=f"of {len(others)}")


def compare_versions(nodes: Sequence[Node]) -> Check:
    """Compares every node's packages with this process's."""
    own, wrong = versions(), []
    for node in nodes:
        for name, have in node.versions.items():
            if have != own.get(name, ""):
                wrong.append(f"{node.host}: {name} {have or 'absent'}, here {own[name]}")
    if wrong:
        shown = "; ".join(wrong[:4]) + (f"; {len(wrong) - 4} more" if len(wrong) > 4 else "")
        advice = "install requirements.lock on every node"
        return Check(name="versions", ok=False, found=shown, advice=advice)
    told = f"python {own['python']}, torch {own['torch']}, ray {own['ray']} everywhere"
    return Check(name="versions", ok=True, found=told)


def clocks(alive: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Returns how far each node's clock is off ours at least; what lies on the way is left out."""
    skews: dict[str, float] = {}
    for node in alive:
        began = time.time()
        theirs: Any = ray.get(_on(node).remote(time.time), timeout=TASK_TIMEOUT_S)
        name = f"{node.get('NodeManagerHostname', '?')} ({node['NodeManagerAddress']})"
        skews[name] = max(began - theirs, theirs - time.time(), 0.0)
    return skews


def compare_clocks(skews: Mapping[str, float]) -> Check:
    """Tells whether a clock is too far off."""
    worst = max(skews, key=lambda name: skews[name])
    ok = skews[worst] <= MAX_SKEW_S
    found = (
        f"none off by more than {skews[worst]:.1f} s"
        if ok
        else (f"{worst} is off by {skews[worst]:.0f} s")
    )
    advice = "" if ok else "run chrony or ntpd there: object stores refuse requests of other times"
    return Check(name="clocks", ok=ok, found=found, advice=advice)


def pairs(alive: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Returns {backend: two nodes} that sums are to go between; one node twice if it is alone.

    NCCL is tried where two nodes have GPUs.
    """
    with_gpus = [node for node in alive if node["Resources"].get("GPU")]
    found = {"gloo": [*alive, *alive][:2] if len(alive) == 1 else list(alive[:2])}
    return found | ({"nccl": with_gpus[:2]} if len(with_gpus) > 1 else {})


def check_all_reduce(backend: str, nodes: Sequence[dict[str, Any]]) -> Check:
    """Sums a tensor over two processes, on two nodes where there are two."""
    member = ray.remote(num_cpus=0, num_gpus=1 if backend == "nccl" else 0)(Member)
    places: list[Any] = [NodeAffinitySchedulingStrategy(node["NodeID"], False) for node in nodes]
    members = [member.options(scheduling_strategy=place).remote() for place in places]
    address = ray.get(members[0].listen.remote(), timeout=TASK_TIMEOUT_S)
    tasks = [member.add.remote(backend, rank, *address) for rank, member in enumerate(members)]
    sums = ray.get(tasks, timeout=TASK_TIMEOUT_S)
    alone = nodes[0]["NodeID"] == nodes[1]["NodeID"]
    ok = sums == [VALUE, VALUE]
    return Check(
        name=f"all-reduce by {backend}",
        ok=ok,
        found="between two processes of the only node" if alone else "between two nodes",
        advice="" if ok else "open all ports between the nodes, and set NCCL_SOCKET_IFNAME",
    )


class Member:
    """One of two processes that add, as the workers of a stage do."""

    def listen(self) -> tuple[str, int]:
        """Opens the store by which both find each other; returns where."""
        from kdscale.stages import rendezvous  # with torch

        address = ray.util.get_node_ip_address()
        return address, rendezvous.listen(address)

    def add(self, backend: str, rank: int, address: str, port: int) -> float:
        """Takes part in a sum of 1 and 2."""
        import torch
        import torch.distributed as dist

        from kdscale.stages import rendezvous

        rendezvous.join(rank, 2, address, port, backend, round(TASK_TIMEOUT_S / 2))
        try:
            device = "cuda" if backend == "nccl" else "cpu"
            tensor = torch.tensor([float(rank + 1)], device=device)
            dist.all_reduce(tensor)
            return float(tensor[0])
        finally:
            dist.destroy_process_group()


def print_diagnosis(found: Diagnosis, console: Console) -> None:
    """Prints a row for each check, a column for each node, and what to do."""
    names = list(dict.fromkeys(check.name for node in found.nodes for check in node.checks))
    table = Table("check", *(escape(node.host) for node in found.nodes), title="Nodes")
    for name in names:
        cells = [next((c for c in node.checks if c.name == name), None) for node in found.nodes]
        table.add_row(name, *(_cell(check) for check in cells))
    console.print(table)
    across = Table("check", "found", title="Between them")
    for check in found.across:
        across.add_row(check.name, _cell(check))
    console.print(across)
    for where, check in _wrong(found):
        console.print(f"[red]{escape(where)}[/] {check.name}: {escape(check.advice)}")
    console.print("all well" if found.ok else "[bold red]not fit for sweeps yet[/]")


def _cell(check: Check | None) -> str:
    """Writes a check's sign and what was found."""
    return "" if check is None else f"{SIGNS[check.ok]} {escape(check.found)}"


def _wrong(found: Diagnosis) -> list[tuple[str, Check]]:
    """Returns the checks that failed, each with where."""
    every = [(node.host, check) for node in found.nodes for check in node.checks]
    every += [("cluster", check) for check in found.across]
    return [(where, check) for where, check in every if check.ok is False]


def default_uri() -> str | None:
    """Returns the MLflow server that runs would use without being told."""
    return os.environ.get("MLFLOW_TRACKING_URI")
