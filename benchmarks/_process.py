"""What processes hold: memory and open files, from /proc."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Held:
    """What one process holds.

    Attributes:
        resident_mib: Memory of its own that is resident; shared memory is Ray's object store.
        files: Open file descriptors.
        threads: Threads.
    """

    resident_mib: float
    files: int
    threads: int


def resident_mib(pid: int | None = None) -> float:
    """Returns a process's unshared resident memory, this one's by default."""
    return held(os.getpid() if pid is None else pid).resident_mib


def held(pid: int) -> Held:
    """Returns what a process holds; OSError where it is gone."""
    place = Path(f"/proc/{pid}")
    status = dict(
        line.split(":", 1) for line in (place / "status").read_text().splitlines() if ":" in line
    )
    kib = int(status["RssAnon"].split()[0])
    return Held(kib / 1024, len(os.listdir(place / "fd")), int(status["Threads"]))


def children(root: int) -> dict[int, str]:
    """Returns {process: command line} of all that a process has started, and they in turn."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            parents[int(entry.name)] = int(fields[1])
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return {pid: _command(pid) for pid in found[1:]}


def _command(pid: int) -> str:
    """Returns a process's command line, empty where it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except OSError:
        return ""
