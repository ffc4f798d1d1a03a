"""What a stage has said, from the storage: logs of its processes, its journal, how it ended."""

from __future__ import annotations

import time

from rich.console import Console
from rich.text import Text

from kdscale.core.journal import JournalReader, Line
from kdscale.core.stage_log import LogReader
from kdscale.core.storage import StageStore
from kdscale.sweep.progress import describe_line
from kdscale.sweep.status import unfinished_state

LOOK_EVERY_S = 2.0


def print_logs(stage: StageStore, console: Console) -> None:
    """Prints a stage's logs, the oldest first, its journal by attempts, and how it stands.

    Args:
        stage: The stage, finished or not.
        console: Where to.
    """
    _print(console, f"{stage.kind} {stage.key} in {stage.url()}", "bold")
    found = LogReader(stage).new_lines()
    for name, lines in found.items():
        _print(console, f"-- {_who(name)}", "cyan")
        for line in lines:
            _print(console, line)
    if not found:
        _print(
            console,
            "no log: it has not begun, has said nothing, or an older version ran it",
        )
    for lines in _attempts(stage).values():
        _print(console, f"-- journal, {len(lines)} lines", "cyan")
        for line in dict.fromkeys((0, len(lines) - 1)):
            _print(console, _journal_line(lines[line]))
    _print(console, state_line(stage), "bold")


def follow_logs(stage: StageStore, console: Console, every_s: float = LOOK_EVERY_S) -> None:
    """Prints what a stage says, from the beginning, until it is finished or has failed for good.

    Args:
        stage: The stage.
        console: Where to.
        every_s: Seconds between two looks.
    """
    logs, journal = LogReader(stage), JournalReader(stage)
    while True:
        has_ended = stage.is_done() or (stage.failure() or {}).get("final", False)
        for name, lines in logs.new_lines().items():
            for line in lines:
                _print(console, f"{_who(name)}: {line}")
        for line in journal.new_lines()[-1:]:
            _print(console, f"journal: {_journal_line(line)}")
        if has_ended:
            _print(console, state_line(stage), "bold")
            return
        time.sleep(every_s)


def state_line(stage: StageStore) -> str:
    """Says how a stage stands."""
    if stage.is_done():
        return f"{stage.kind} {stage.record().get('name') or stage.key}: done"
    state, detail = unfinished_state(stage)
    return f"{stage.kind} {stage.key}: {state}" + (f" ({detail})" if detail else "")


def _attempts(stage: StageStore) -> dict[str, list[Line]]:
    """Returns the lines of a stage's journal by attempt, the oldest first."""
    found: dict[str, list[Line]] = {}
    for line in JournalReader(stage).new_lines():
        found.setdefault(line["attempt"], []).append(line)
    return found


def _journal_line(line: Line) -> str:
    """Puts a line of the journal in words, with its time."""
    return f"{_clock(line['time'])} {describe_line(line, None)}"


def _who(name: str) -> str:
    """Names the process of a log file and when its attempt began."""
    at, _, who = name.removesuffix(".log").partition("-")
    return f"{_clock(int(at) / 1e9)} {who}"


def _clock(seconds: float) -> str:
    """Writes a time as logs do, in UTC."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))


def _print(console: Console, text: str, style: str = "") -> None:
    """Prints a line as it is."""
    console.print(Text(text, style), soft_wrap=True)
