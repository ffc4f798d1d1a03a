"""The journal: what a stage did, step by step, as small files in its own directory.

Rank 0 writes it; trackers and reports read it. A segment is written whole and never changed, so
it works on object stores. A step that was done twice, because a process was killed after it and
before the next checkpoint, stands in two attempts: readers take the last, and can count the
repetition.
"""

from __future__ import annotations

import json
import time
from typing import Any

from kdscale.core.storage import StageStore

Line = dict[str, Any]


class JournalWriter:
    """Appends lines to a stage's journal.

    Args:
        stage: The stage's directory.
        flush_every: Lines kept in memory before a segment is written.
    """

    def __init__(self, stage: StageStore, flush_every: int) -> None:
        self._stage, self._flush_every = stage, flush_every
        self._attempt = f"{time.time_ns():020d}"
        self._num_segments = 0
        self._lines: list[Line] = []

    def append(self, line: Line) -> None:
        """Adds a line, which must hold `step`, and says when that was."""
        self._lines.append({**line, "time": round(time.time(), 3)})
        if len(self._lines) >= self._flush_every:
            self.flush()

    def flush(self) -> None:
        """Writes what is in memory as one segment."""
        if not self._lines:
            return
        text = "".join(json.dumps(line) + "\n" for line in self._lines)
        name = f"{self._attempt}-{self._num_segments:06d}.jsonl"
        self._stage.storage.write(text.encode(), *self._stage.parts, "journal", name)
        self._num_segments += 1
        self._lines = []


class JournalReader:
    """Reads a stage's journal, each segment once."""

    def __init__(self, stage: StageStore) -> None:
        self._stage = stage
        self._seen: set[str] = set()

    def new_lines(self) -> list[Line]:
        """Returns the lines written since the last call, oldest first, repeated steps included."""
        lines: list[Line] = []
        for name in _segments(self._stage):
            if name in self._seen:
                continue
            text = self._stage.storage.read(*self._stage.parts, "journal", name).decode()
            attempt = name.split("-", 1)[0]
            lines += [json.loads(row) | {"attempt": attempt} for row in text.splitlines()]
            self._seen.add(name)
        return lines


def read_steps(stage: StageStore) -> list[Line]:
    """Returns one line a step in step order; the last attempt's where a step was repeated."""
    by_step: dict[int, Line] = {}
    for line in JournalReader(stage).new_lines():
        by_step[line["step"]] = by_step.get(line["step"], {}) | line
    return [by_step[step] for step in sorted(by_step)]


def noted(stage: StageStore, name: str) -> set[int]:
    """Returns the numbers that the lines of a stage's journal have under a name."""
    return {line[name] for line in JournalReader(stage).new_lines() if name in line}


def span(stage: StageStore) -> tuple[float, float] | None:
    """Returns when the first attempt began and when the last line was written.

    In seconds since 1970, without reading more than one segment; None where there is no line.
    """
    names = _segments(stage)
    if not names:
        return None
    text = stage.storage.read(*stage.parts, "journal", names[-1]).decode()
    last = json.loads(text.splitlines()[-1]).get("time", 0.0)
    return int(names[0].split("-", 1)[0]) / 1e9, float(last)


def _segments(stage: StageStore) -> list[str]:
    """Lists the names of a journal's segments, oldest first."""
    names = stage.storage.names(*stage.parts, "journal")
    return [name for name in names if name.endswith(".jsonl") and not name.startswith(".")]
