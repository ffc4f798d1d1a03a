"""The faults: each waits for its moment and does one thing to a sweep that is under way.

A moment is a stage and one of its steps, drawn from the row's seed; who does the work then is the
victim.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from faults.processes import Process, below, doing, kill, wait_for

if TYPE_CHECKING:
    from faults.row import Run

TRAINING = ("distill", "pretrain", "finetune")
ANY = ("embed", *TRAINING)
CUT_S, AWAY_S, READ_ONLY_S, FULL_S, GRACE_S, SHORT_S = 60, 120, 60, 60, 120, 30
FULL_BELOW = 0.02  # what the memory monitor is shown as free, of all


@dataclass(frozen=True)
class Fault:
    """One line of the matrix.

    Attributes:
        name: For the command line.
        title: For the table.
        inject: Disturbs a run, and tells what it did.
        apart: On two machines with namespaces of their own rather than on one node.
        mounted: On a storage that is a mount of its own.
        server: With an MLflow server rather than a file.
        again: Why the command may be given again, as a user would; empty where it must not be.
        told: Whether it is announced, so that no step must be done twice.
    """

    name: str
    title: str
    inject: Callable[[Run], str]
    apart: bool = False
    mounted: bool = False
    server: bool = False
    again: str = ""
    told: bool = False

    def lacking(self) -> str:
        """Says what this machine lacks for it."""
        needs_root = self.apart or self.mounted
        if needs_root and os.geteuid() != 0:
            return "only root can make the namespaces and mounts that it needs"
        programs = ("unshare", "nsenter", "mount", *(("ip",) if self.apart else ()))
        paths = [Path(folder) for folder in os.get_exec_path()]
        lacks = [p for p in programs if not any((path / p).exists() for path in paths)]
        return f"lacks {', '.join(lacks)}" if needs_root and lacks else ""


def nothing(run: Run) -> str:
    """Disturbs nothing."""
    return "nothing"


def signal_one(
    kind: str, kinds: tuple[str, ...] = TRAINING, sent: signal.Signals = signal.SIGKILL
) -> Callable[[Run], str]:
    """Returns a fault that sends a signal to a process that does a kind of work, as in `TITLES`."""

    def inject(run: Run) -> str:
        moment = run.until_moment(kinds)
        return f"{_send(run, kind, sent)} {moment}"

    return inject


def kill_reader(run: Run) -> str:
    """Kills a task that reads for a stage: it has done so before the first step is told of."""
    stage = run.until_before(TRAINING)
    return f"{_send(run, 'reader', signal.SIGKILL)} for {stage}"


def _send(run: Run, kind: str, sent: signal.Signals) -> str:
    """Signals one of the processes that do a kind of work as soon as there is one."""
    found = run.wait_for(lambda: doing(os.getpid(), kind), f"a {kind}")
    victim: Process = run.drawn.choice(found)
    kill([victim], sent)
    return f"{sent.name} to {victim.name}"


def kill_driver(run: Run) -> str:
    """Kills the command that was given."""
    moment = run.until_moment(ANY)
    kill([run.driver()])
    return f"SIGKILL to the driver {moment}"


def kill_raylet(run: Run) -> str:
    """Kills the raylet of the node that works; another node takes its place."""
    moment = run.until_moment(ANY)
    node = run.cluster.nodes[1]
    raylet = node.raylet()
    assert raylet is not None
    kill([raylet])
    return f"SIGKILL to the raylet {moment}"


def kill_head(run: Run) -> str:
    """Kills all that a head consists of: Ray's books, its raylet and what they have started."""
    moment = run.until_moment(ANY)
    driver = run.driver()
    own = {driver.pid, *(process.pid for process in below(driver.pid))}
    kill(process for process in run.cluster.nodes[0].processes() if process.pid not in own)
    return f"SIGKILL to the head's processes {moment}"


def cut(run: Run) -> str:
    """Loses everything that is sent between head and node."""
    moment = run.until_moment(ANY)
    run.cluster.cut()
    run.sleep(CUT_S)
    run.cluster.mend()
    return f"no packet came through for {CUT_S} s {moment}"


def server_down(run: Run) -> str:
    """Kills MLflow's server, and starts it again."""
    moment = run.until_moment(ANY)
    run.stop_server()
    time.sleep(AWAY_S)  # also where the run ends meanwhile
    run.start_server()
    return f"no MLflow server for {AWAY_S} s {moment}"


def read_only(run: Run) -> str:
    """Makes the storage read-only; the kernel allows it when no file is open for writing."""
    moment = run.until_moment(ANY)

    def remount(how: str) -> Callable[[], bool]:
        command = ["mount", "-o", f"remount,{how}", run.storage.root]
        return lambda: run.call(*command).returncode == 0

    wait_for(remount("ro"), "a moment when nothing is written", 60 * run.patience)
    time.sleep(READ_ONLY_S)
    wait_for(remount("rw"), "the storage to be writable again", 60)
    return f"storage read-only for {READ_ONLY_S} s {moment}"


def disk_full(run: Run) -> str:
    """Fills the disk of the node that works: Ray's files and all temporary ones."""
    moment = run.until_moment(ANY)
    node = run.cluster.machines[1]
    run.call(*node.command("sh", "-c", f"cat /dev/zero > {node.folder}/fill"))
    run.sleep(FULL_S)
    node.run("rm", f"{node.folder}/fill")
    return f"the node's disk full for {FULL_S} s {moment}"


def out_of_memory(run: Run) -> str:
    """Shows the node's memory monitor a machine that is full, until it has ended somebody."""
    moment = run.until_moment(TRAINING)
    before = {process.pid: process for process in _busy(run)}
    shown = run.folder / "meminfo"
    usual = shown.read_text()
    shown.write_text(full(usual))
    try:
        gone = run.wait_for(
            lambda: before.keys() - {process.pid for process in _busy(run)},
            "Ray to end a worker",
            SHORT_S * run.patience,
        )
    finally:
        shown.write_text(usual)
    names = ", ".join(before[pid].name for pid in sorted(gone))
    return f"memory short, Ray ended {names} {moment}"


def _busy(run: Run) -> list[Process]:
    """Returns the workers of the node that do something."""
    found = run.cluster.nodes[1].processes()
    return [p for p in found if p.command.startswith("ray::") and "IDLE" not in p.command]


def full(meminfo: str) -> str:
    """Returns `/proc/meminfo` of a machine that has next to nothing left."""
    lines = [line.split() for line in meminfo.splitlines()]
    total = next(int(words[1]) for words in lines if words[0] == "MemTotal:")
    left = {"MemFree:", "MemAvailable:", "Cached:", "Buffers:", "SReclaimable:"}
    return "".join(
        f"{words[0]} {int(total * FULL_BELOW / len(left))} kB\n"
        if words[0] in left
        else " ".join(words) + "\n"
        for words in lines
    )


def terminate(run: Run) -> str:
    """Sends SIGTERM to the command that was given, as a notice of two minutes."""
    moment = run.until_moment(TRAINING)
    driver = run.driver()
    kill([driver], signal.SIGTERM)
    began = time.monotonic()
    with suppress(TimeoutError):
        wait_for(lambda: run.ended(), "the driver's end", GRACE_S)
    if not run.ended():
        kill([driver, *below(driver.pid)])
        return f"SIGTERM to the driver {moment}; it had not ended after {GRACE_S} s and was killed"
    return f"SIGTERM to the driver {moment}; it ended after {time.monotonic() - began:.0f} s"


def drain(run: Run) -> str:
    """Drains the node that works, two minutes before it is taken; another one has come."""
    moment = run.until_moment(TRAINING)
    node = run.cluster.nodes[1]
    run.cluster.add()
    run.wait_for(lambda: run.cluster.nodes[2].raylet(), "another node")
    words = ["ray", "drain-node", "--address", run.cluster.address, "--node-id", node.id()]
    words += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    words += ["--deadline-remaining-seconds", str(GRACE_S)]
    words[0] = str(Path(sys.executable).with_name("ray"))
    done = run.call(*run.cluster.machines[0].command(*words))
    assert done.returncode == 0, done.stderr[-300:]
    run.sleep(GRACE_S)
    kill(node.processes())
    return f"the node drained {GRACE_S} s before it is killed {moment}"


AGAIN = "the driver has ended"
CONTROL = Fault("control", "none (control)", nothing)
FAULTS = {
    fault.name: fault
    for fault in (
        Fault("reader", "SIGKILL of a reader task", kill_reader),
        Fault("worker", "SIGKILL of a Train worker", signal_one("worker")),
        Fault("controller", "SIGKILL of the Train controller", signal_one("controller")),
        Fault("trial", "SIGKILL of the Tune trial", signal_one("trial", ANY)),
        Fault("driver", "SIGKILL of the driver", kill_driver, again=AGAIN),
        Fault("raylet", "SIGKILL of the raylet of a node", kill_raylet, apart=True),
        Fault("head", "SIGKILL of the head", kill_head, apart=True, again=AGAIN),
        Fault("network", "network between two nodes cut for 60 s", cut, apart=True),
        Fault(
            "mlflow",
            "MLflow's server down for 2 minutes",
            server_down,
            server=True,
            again="the driver has ended before the server was back",
        ),
        Fault("read_only", "storage read-only for 1 minute", read_only, mounted=True),
        Fault("disk_full", "disk full for 1 minute on the node that works", disk_full, apart=True),
        Fault(
            "sigterm", "SIGTERM to the driver, with 2 minutes", terminate, again=AGAIN, told=True
        ),
        Fault(
            "sigterm_worker",
            "SIGTERM to a Train worker",
            signal_one("worker", sent=signal.SIGTERM),
            told=True,
        ),
        Fault("drain", "node drained 2 minutes before its end", drain, apart=True, told=True),
        Fault("memory", "Ray's memory monitor ends a worker", out_of_memory, apart=True),
    )
}
