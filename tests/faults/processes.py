"""The processes of a row: found by what they do, killed, and none left over.

A row adopts what its processes leave behind (`PR_SET_CHILD_SUBREAPER`), so all that it has ever
started is below it, whoever ended in between. Ray overwrites the environment of its workers with
their titles: nothing there would tell whose they are.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PR_SET_CHILD_SUBREAPER = 36
EVERY_S = 0.02
# What a Ray process that does something calls itself.
TITLES: dict[str, tuple[str, ...]] = {
    "reader": ("Read", "MapBatches", "Repartition"),
    "worker": ("RayTrainWorker",),
    "controller": ("TrainController",),
    "trial": ("ImplicitFunc",),
}
NOT_READERS = ("MapWorker", "_StatsActor")  # actors of Ray Data's


@dataclass(frozen=True)
class Process:
    """A living process and how it was called."""

    pid: int
    command: str

    @property
    def name(self) -> str:
        """What people call it."""
        return self.command[:120]


def adopt() -> None:
    """Makes this process the parent of all that is orphaned below it."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def below(root: int) -> list[Process]:
    """Returns the living processes below one, parents first; zombies are not among them."""
    parents = {pid: parent for pid, (parent, _) in _all().items()}
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return _living(found[1:])


def beside(pid: int) -> list[Process]:
    """Returns the other living processes in a process's table, wherever they were entered from."""
    own = os.readlink(f"/proc/{pid}/ns/pid")
    found: list[int] = []
    for other in _all():
        with suppress(OSError):
            if other != pid and os.readlink(f"/proc/{other}/ns/pid") == own:
                found.append(other)
    return _living(found)


def _all() -> dict[int, tuple[int, str]]:
    """Returns every process's parent and state."""
    found: dict[int, tuple[int, str]] = {}
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            found[int(entry.name)] = int(fields[1]), fields[0]
    return found


def _living(pids: Iterable[int]) -> list[Process]:
    """Returns those that are there and no zombies."""
    known = _all()
    return [
        Process(pid, command_of(pid)) for pid in pids if pid in known and known[pid][1] not in "ZX"
    ]


def command_of(pid: int) -> str:
    """Returns a process's command line or title; empty where it is gone."""
    with suppress(OSError):
        text = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
        return text.decode(errors="replace").strip()
    return ""


def doing(root: int, kind: str) -> list[Process]:
    """Returns Ray's processes below one that do a kind of work, as in `TITLES`."""
    return [
        process
        for process in below(root)
        if process.command.startswith("ray::")
        and any(word in process.command for word in TITLES[kind])
        and not any(word in process.command for word in NOT_READERS)
    ]


def kill(processes: Iterable[Process], number: int = signal.SIGKILL) -> None:
    """Sends a signal to processes, some of which may be gone."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process.pid, number)


def wait_for(
    condition: Callable[[], Any], what: str, timeout_s: float, every_s: float = EVERY_S
) -> Any:
    """Returns a condition's first true value.

    Raises:
        TimeoutError: There was none in time.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(every_s)
    raise TimeoutError(f"waited {timeout_s:.0f} s in vain for {what}")


def end_all(but: Collection[int] = ()) -> None:
    """Kills everything below this process.

    Namespaces end when nothing is left in their table of processes, zombies included.

    Args:
        but: Children that go on, with all below them; somebody waits for them.
    """
    while own := [pid for pid, (parent, _) in _all().items() if parent == os.getpid()]:
        if not (ours := set(own) - set(but)):
            return
        kill(process for pid in ours for process in (Process(pid, ""), *below(pid)))
        for pid in ours:
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.05)
