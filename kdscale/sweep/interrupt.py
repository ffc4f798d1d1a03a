"""SIGTERM and Ctrl-C to a driver: its stages write checkpoints and stop; a second one ends it."""

from __future__ import annotations

import signal
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack, suppress

from kdscale.core.checkpoints import Checkpoints
from kdscale.core.journal import read_steps
from kdscale.core.signals import Notice, own_handlers, take_notice
from kdscale.core.stop import ask_run_to_stop, forget_run
from kdscale.core.types import Interrupted, StorageError
from kdscale.sweep.budget import running_stages
from kdscale.sweep.kept import is_finished
from kdscale.sweep.plan import Plan
from kdscale.sweep.stage import Stage

SIGNALS = (signal.SIGTERM, signal.SIGINT)
LOOK_EVERY_S = 0.2


class Interrupt:
    """Turns the first signal to a driver into a request to all attempts of its run to stop.

    A signal may come between any two instructions of the main thread, whatever locks it holds: it
    is only noted there, and a thread does the rest. Used outside the main thread it does nothing.

    Args:
        plan: What is run.
        say: Told in a line what happens.

    Attributes:
        run: Name of the run, for whoever takes leases in it.
    """

    def __init__(self, plan: Plan, say: Callable[[str], None]) -> None:
        self._plan, self._say = plan, say
        self._notice = Notice()
        self._stack = ExitStack()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True, name="interrupt")
        self._begun: list[Stage] = []
        self.run = uuid.uuid4().hex

    @property
    def has_come(self) -> bool:
        """Whether a signal has come."""
        return bool(self._notice.name)

    def __enter__(self) -> Interrupt:
        self._stack.enter_context(own_handlers(*SIGNALS))
        if threading.current_thread() is threading.main_thread():
            self._notice = take_notice(*SIGNALS)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._stack.close()
        if self.has_come:
            forget_run(self._plan.storage, self.run)

    def raise_if_stopped(self, command: str) -> None:
        """Says what is kept, and how it goes on.

        Args:
            command: Runs the rest.

        Raises:
            Interrupted: A signal has come before all stages were finished.
        """
        left = [s for s in self._plan.remaining() if not is_finished(s, self._plan.storage)]
        if not self.has_come or not left:
            return
        kept = [self._kept(stage) for stage in left if stage in self._begun]
        raise Interrupted(
            f"{self._notice.name}: {len(left)} of {len(self._plan.stages)} stages are not "
            f"finished{'; kept: ' if kept else ''}{', '.join(kept)}. To go on: {command}"
        )

    def _loop(self) -> None:
        """Waits for a signal, and asks the run to stop until the storage has it."""
        while not self.has_come:
            if self._over.wait(LOOK_EVERY_S):
                return
        reason = self._notice.name
        self._say(f"[yellow]{reason}[/]: what runs writes a checkpoint and stops; twice ends it")
        while not self._over.is_set():
            with suppress(OSError, StorageError):
                ask_run_to_stop(self._plan.storage, self.run, reason)
                self._begun = running_stages(self._plan)
                return
            time.sleep(LOOK_EVERY_S)

    def _kept(self, stage: Stage) -> str:
        """Says how far a stage is for whoever goes on with it."""
        store = stage.store(self._plan.storage)
        lines = read_steps(store)
        step = Checkpoints(store, keep=1).latest_step() or (lines[-1]["step"] if lines else 0)
        return f"{stage.kind} {stage.name} at step {step}"
