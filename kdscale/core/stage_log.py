"""The log of a stage: what its processes print, warn and fail with, kept beside its journal.

Ray's own log files lie on the node that ran the process and go with it; these are in the storage.
Each process writes one file an attempt, `log/<time>-<who>.log`, whole, every few seconds and at the
end. A storage that cannot be written to never stops the stage. Secrets are hidden.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any

from kdscale.core.redaction import redacted, secret_values, without_secrets
from kdscale.core.storage import StageStore, Storage
from kdscale.core.types import LeaseLost, StageStopped, StorageError

FOLDER, SUFFIX = "log", ".log"
FLUSH_EVERY_S = 5.0
HEAD_LINES, TAIL_LINES, MOST_CHARACTERS = 1000, 2000, 500
_LEFT_OUT = re.compile(r"\.\.\. (\d+) lines left out \.\.\.")


class StageLog:
    """One process's part of an attempt's log; inside its `with` blocks all output is copied to it.

    Inside a block of the same stage in the same process, another one is that one.

    Args:
        stage: The stage.
        who: Names the process within the attempt: `worker0`, `actor`, `trial`.
        title: What the stage is, for people.
        quiet: Write no file unless there is something to tell.
    """

    def __init__(
        self, stage: StageStore, who: str, *, title: str = "", quiet: bool = False
    ) -> None:
        self._stage, self._quiet = stage, quiet
        self._secrets = secret_values()
        self._name = f"{time.time_ns():020d}-{who}{SUFFIX}"
        self._head: list[str] = []
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._num_lines = self._num_written = 0
        self._lock = threading.Lock()
        self._outer: StageLog | None = None
        self._copies: list[_Copied] = []
        self._told: BaseException | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        place = f"{who} on {_node()}, process {os.getpid()}"
        self.say(f"{stage.kind} {stage.key} {title}".rstrip() + f": {place}")

    def __enter__(self) -> StageLog:
        copies = _copies()
        inside = [log for copy in copies for log in copy.logs if log.is_of(self._stage)]
        self._outer = inside[0] if inside else None
        if self._outer is not None:
            return self._outer
        self._copies, self._stop = copies, threading.Event()
        for copy in copies:
            copy.logs.append(self)
        self._thread = threading.Thread(target=self._keep, daemon=True, name="stage log")
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._outer is not None:
            return
        for copy in self._copies:
            copy.logs.remove(self)
        if error is not None:
            self.tell(error)
        assert self._thread is not None
        self._stop.set()
        self._thread.join()
        self._flush()

    def is_of(self, stage: StageStore) -> bool:
        """Tells whether this is the log of a stage."""
        return self._stage.url() == stage.url()

    def say(self, text: str) -> None:
        """Adds lines, with the time."""
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
        with self._lock:
            for line in without_secrets(text, self._secrets).splitlines():
                kept = self._head if self._num_lines < HEAD_LINES else self._tail
                kept.append(f"{at} {line[:MOST_CHARACTERS]}")
                self._num_lines += 1

    def tell(self, error: BaseException) -> None:
        """Adds an error with its traceback, once; of an orderly end its words."""
        if error is self._told:
            return
        self._told = error
        if isinstance(error, StageStopped | LeaseLost):
            self.say(str(error))
        else:
            self.say("".join(traceback.format_exception(error)))

    def _keep(self) -> None:
        """Writes what is new until the block ends."""
        while not self._stop.wait(FLUSH_EVERY_S):
            self._flush()

    def _flush(self) -> None:
        """Writes the file if there is something new; a storage fault is left to the next time."""
        with self._lock:
            total, left_out = self._num_lines, self._num_lines - len(self._head) - len(self._tail)
            if total == self._num_written or (self._quiet and total == 1):
                return
            note = [f"... {left_out} lines left out ..."] if left_out else []
            text = "".join(f"{line}\n" for line in [*self._head, *note, *self._tail])
        with suppress(OSError, StorageError):
            data = text.encode(errors="backslashreplace")  # names of files may not be UTF-8
            self._stage.storage.write(data, *self._stage.parts, FOLDER, self._name)
            self._num_written = total


def _node() -> str:
    """Names this machine, as its cloud does where Ray's autoscaler has brought it."""
    instance = os.environ.get("RAY_CLOUD_INSTANCE_ID")
    return socket.gethostname() + (f", node {instance}" if instance else "")


class _Copied:
    """A stream of this process whose complete lines are copied to logs, unless it is a terminal."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.logs: list[StageLog] = []
        self._rest = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Writes, and copies the lines that are complete; of a progress bar the last state."""
        written = self.stream.write(text)
        if self.logs and not self.stream.isatty():
            *lines, self._rest = (self._rest + text).split("\n")
            self._rest = self._rest.rpartition("\r")[2]
            for line in filter(None, (line.rstrip("\r").rpartition("\r")[2] for line in lines)):
                for log in list(self.logs):
                    log.say(line)
        return written


def _copies() -> list[_Copied]:
    """Returns this process's output streams, which copy to logs from the first call on.

    They stay: handlers of loggers keep the stream that they have found.
    """
    found: list[_Copied] = []
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            continue
        if not isinstance(stream, _Copied):
            copy = _Copied(stream)
            setattr(sys, name, copy)
            for handler in _handlers():
                if getattr(handler, "stream", None) is stream:
                    handler.setStream(copy)
            stream = copy
        found.append(stream)
    return found


def _handlers() -> Iterator[logging.StreamHandler[Any]]:
    """Yields the handlers of all loggers that write to a stream."""
    for logger in [logging.root, *list(logging.root.manager.loggerDict.values())]:
        for handler in getattr(logger, "handlers", ()):  # some only hold a name's place
            if isinstance(handler, logging.StreamHandler):
                yield handler


def logs_command(key: str, storage: Storage) -> str:
    """Returns the command that shows a stage's log."""
    return shlex.join(["kdscale", "logs", key, "--storage", redacted(storage.root)])


class LogReader:
    """Reads a stage's logs, each line once."""

    def __init__(self, stage: StageStore) -> None:
        self._stage = stage
        self._read: dict[str, int] = {}

    def new_lines(self) -> dict[str, list[str]]:
        """Returns {file's name: lines written since the last call}, the oldest file first."""
        found: dict[str, list[str]] = {}
        for name in self._stage.storage.names(*self._stage.parts, FOLDER):
            if name.startswith(".") or not name.endswith(SUFFIX):
                continue
            text = self._stage.storage.read(*self._stage.parts, FOLDER, name).decode()
            known = self._read.get(name, 0)
            new = [line for number, line in _numbered(text) if number > known]
            if new:
                found[name] = new
                self._read[name] = max(number for number, _ in _numbered(text))
        return found


def _numbered(text: str) -> Iterator[tuple[int, str]]:
    """Yields the lines of a log with their numbers, counting those that were left out."""
    number = 0
    for line in text.splitlines():
        left_out = _LEFT_OUT.fullmatch(line)
        number += int(left_out[1]) if left_out else 1
        yield number, line
