"""Leases: one writer a stage at a time, among processes that share nothing but the storage."""

# pyright: basic
# (heartbeats are JSON)
from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdscale.core.storage import StageStore
from kdscale.core.types import LeaseLost, StorageError

HEARTBEAT_S = 5.0
LEASE_TIMEOUT_S = 45.0
SETTLE_S = 2.0
LEASE = "LEASE-"


def check_lease(stage: StageStore, token: str | None) -> None:
    """Checks that a stage is still this writer's; called before anything final is written.

    Args:
        stage: The stage.
        token: Its lease's token, None where there is no other writer.

    Raises:
        LeaseLost: Somebody else has taken it over.
    """
    if token is not None and _newest(stage).token != token:
        raise LeaseLost(f"{stage.url()} was taken over by another writer; stopping here")


class Lease:
    """The right to write one stage, kept alive by a thread.

    Leases of a stage are numbered, and the newest holds. A dead writer's is left as it is and the
    next number created, which of any number of processes one can do; a writer that was taken for
    dead and wakes can therefore not overwrite its successor's.

    Use `Lease.acquire`; leave the `with` block to release it.
    """

    def __init__(
        self, stage: StageStore, number: int, run: str = "", after: StageStore | None = None
    ) -> None:
        self._stage, self._number = stage, number
        self._more = {} if after is None else {"after": [after.kind, after.key]}
        self.token = ".".join(filter(None, (run, uuid.uuid4().hex)))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True, name="lease")

    @classmethod
    def acquire(
        cls, stage: StageStore, run: str = "", after: StageStore | None = None
    ) -> Lease | None:
        """Returns the lease, or None while another living writer holds it.

        Args:
            stage: What is to be written.
            run: Name of the driver's run, with which the lease's token begins; it may be asked
                to stop as a whole (`kdscale.core.stop`).
            after: What the same writer does just before it, None where it begins at once.

        A holder is taken for dead when it ran on this host and its process is gone, or when its
        heartbeat has stood still for `LEASE_TIMEOUT_S` (watched for on this host's clock, so
        clock skew between hosts does not matter).

        Who acquires a lease looks for `DONE` again: another may have finished meanwhile.
        """
        before = _newest(stage)
        if before.number and not _is_dead(stage, before):
            return None
        lease = cls(stage, before.number + 1, run, after)
        created = stage.storage.create(lease._beat(), *_place(stage, lease._number))
        if created and not stage.storage.is_local:
            time.sleep(SETTLE_S)  # of two that create at once all the same, the last one keeps it
        if lease._follows(before):
            return lease
        if _read(stage, lease._number).token == lease.token:
            stage.storage.remove(*_place(stage, lease._number))
        return None

    @staticmethod
    def seems_held(stage: StageStore) -> bool:
        """Tells at a glance whether a living writer holds the stage; for display only.

        On this host its process is looked for; elsewhere the age of its last heartbeat counts,
        which is wrong where the hosts' clocks differ by more than `LEASE_TIMEOUT_S`.
        """
        holder = _newest(stage).beat
        if not holder:
            return False
        if holder.get("host") == _host():
            return _process_start(holder["pid"]) == holder["started"]
        return time.time_ns() - holder.get("beat", 0) < LEASE_TIMEOUT_S * 1e9

    @staticmethod
    def waits(stage: StageStore) -> bool:
        """Tells whether the stage's holder does another one before it; for display only."""
        after = _newest(stage).beat.get("after")
        return after is not None and not StageStore(stage.storage, *after).is_done()

    @staticmethod
    def is_left(stage: StageStore) -> bool:
        """Tells whether a writer holds the stage or has died holding it."""
        return bool(_numbers(stage))

    def __enter__(self) -> Lease:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if _newest(self._stage).token == self.token:
            for number in _numbers(self._stage):
                if number <= self._number:
                    self._stage.storage.remove(*_place(self._stage, number))

    def _follows(self, before: _Holder) -> bool:
        """Tells whether this is the newest lease and the one before it still that dead one."""
        numbers = _numbers(self._stage)
        if numbers[-1:] != [self._number] or _newest(self._stage).token != self.token:
            return False
        last = numbers[-2] if len(numbers) > 1 else 0
        return last == 0 or _read(self._stage, last) == before

    def _keep(self) -> None:
        """Beats until released or lost; a storage fault is retried at the next beat."""
        while not self._stop.wait(HEARTBEAT_S):
            try:
                if _newest(self._stage).token != self.token:
                    return
                self._stage.storage.write(self._beat(), *_place(self._stage, self._number))
            except (OSError, StorageError):
                continue

    def _beat(self) -> bytes:
        """Encodes a heartbeat: who, where, a counter that changes, and what is done before."""
        beat = {
            "token": self.token,
            "host": _host(),
            "pid": os.getpid(),
            "started": _process_start(os.getpid()),
            "beat": time.time_ns(),
        }
        return json.dumps(beat | self._more).encode()


def clear(stage: StageStore) -> None:
    """Removes a stage's files but for leases; first what says that it is finished."""
    stage.storage.remove(*stage.parts, "DONE")
    for name in stage.storage.names(*stage.parts):
        if not name.startswith(LEASE):
            stage.storage.remove(*stage.parts, name)


def holder_token(stage: StageStore) -> str | None:
    """Returns the token of a stage's lease, None where nobody holds it."""
    return _newest(stage).token


def own_token(stage: StageStore) -> str | None:
    """Returns the token of a stage's lease where this process holds it, else None."""
    holder = _newest(stage)
    own = (holder.beat.get("host"), holder.beat.get("pid")) == (_host(), os.getpid())
    return holder.token if own else None


@dataclass(frozen=True)
class _Holder:
    """A lease's number, 0 where there is none, and its last heartbeat as it was read."""

    number: int = 0
    beat: dict[str, Any] = field(default_factory=dict)

    @property
    def token(self) -> str | None:
        """Its writer's token."""
        return self.beat.get("token")


def _place(stage: StageStore, number: int) -> tuple[str, ...]:
    """Returns where a lease lies."""
    return (*stage.parts, f"{LEASE}{number}")


def _numbers(stage: StageStore) -> list[int]:
    """Lists a stage's leases, the newest last."""
    names = stage.storage.names(*stage.parts)
    return sorted(int(name[len(LEASE) :]) for name in names if name.startswith(LEASE))


def _newest(stage: StageStore) -> _Holder:
    """Reads the lease that holds."""
    numbers = _numbers(stage)
    return _read(stage, numbers[-1]) if numbers else _Holder()


def _read(stage: StageStore, number: int) -> _Holder:
    """Reads a lease; an absent one is none, one that is being created has no beat yet.

    Raises:
        StorageError: The storage cannot be read, so that nothing is known of the holder.
    """
    try:
        return _Holder(number, json.loads(stage.storage.read(*_place(stage, number))))
    except StorageError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        return _Holder()
    except ValueError:
        return _Holder(number)


def _host() -> str:
    """Names this machine since its start, and the process numbers that hold here."""
    parts = [socket.gethostname()]
    with suppress(OSError):  # hosts and containers of one name must not judge each other's
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _is_dead(stage: StageStore, holder: _Holder) -> bool:
    """Tells whether the lease's holder no longer lives."""
    if holder.beat.get("host") == _host():
        return _process_start(holder.beat["pid"]) != holder.beat["started"]
    deadline = time.monotonic() + LEASE_TIMEOUT_S
    while time.monotonic() < deadline:
        time.sleep(HEARTBEAT_S / 2)
        if _newest(stage) != holder:
            return False
    return True


def _process_start(pid: int) -> str | None:
    """Returns a process's start time as the kernel counts it, None if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        try:
            os.kill(pid, 0)
        except (ProcessLookupError, PermissionError):
            return None
        return "alive"
    return None if fields[0] == "Z" else fields[19]
