"""The notice that a process is to end soon: SIGTERM, of spot nodes, Kubernetes and Slurm."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType


class Notice:
    """A signal handler that only notes the first signal; the second one ends the process.

    Attributes:
        name: Of the signal that has come, or another reason; empty while none has.
    """

    def __init__(self) -> None:
        self.name = ""

    def __call__(self, number: int, _: FrameType | None) -> None:
        """Is called by Python in the main thread, between two of its instructions."""
        if self.name:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.name = signal.Signals(number).name


def take_notice(*numbers: signal.Signals) -> Notice:
    """Lets this process note signals, in place of ending; called in its main thread."""
    notice = Notice()
    for number in numbers:
        signal.signal(number, notice)
    return notice


def note(reason: str) -> None:
    """Notes in a process that takes notice what no signal has told."""
    found = signal.getsignal(signal.SIGTERM)
    if isinstance(found, Notice):
        found.name = found.name or reason


def was_noticed() -> bool:
    """Tells whether SIGTERM has come to a process that notes it; from any of its threads."""
    found = signal.getsignal(signal.SIGTERM)
    return isinstance(found, Notice) and bool(found.name)


@contextmanager
def notice_kept() -> Generator[None]:
    """Puts a notice of SIGTERM back, on leaving, that a library has put its own handler in for."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if isinstance(before, Notice) and signal.getsignal(signal.SIGTERM) is not before:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def own_handlers(*numbers: signal.Signals) -> Generator[None]:
    """Puts back, on leaving, the handlers that signals had; does nothing in other threads."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
