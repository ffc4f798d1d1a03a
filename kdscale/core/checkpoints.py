"""Checkpoints of a running stage: written in the background, complete or absent."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from kdscale.core.storage import StageStore
from kdscale.core.types import CheckpointError


class Checkpoints:
    """Checkpoints of one stage, kept by step.

    Args:
        stage: The stage's directory.
        keep: How many of the newest to keep.
    """

    def __init__(self, stage: StageStore, keep: int) -> None:
        self._stage, self._keep = stage, keep
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, step: int, state: bytes) -> None:
        """Writes a checkpoint in the background, after the previous one is on storage.

        Raises:
            StorageError: If the previous checkpoint could not be written.
        """
        self.wait()
        self._pending = self._pool.submit(self._write, step, state)

    def wait(self) -> None:
        """Returns when everything is on storage."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def latest_step(self) -> int:
        """Returns the step of the newest checkpoint, 0 if there is none."""
        steps = self._steps()
        return steps[-1] if steps else 0

    def load(self, step: int) -> bytes:
        """Reads a checkpoint."""
        return self._stage.storage.read(*self._stage.parts, "checkpoints", _name(step))

    def save_part(self, step: int, rank: int, state: bytes) -> None:
        """Writes what another worker adds to a checkpoint, before the first one completes it."""
        self._stage.storage.write(state, *self._stage.parts, "checkpoints", _part(step, rank))

    def load_part(self, step: int, rank: int) -> bytes:
        """Reads what `save_part` wrote."""
        return self._stage.storage.read(*self._stage.parts, "checkpoints", _part(step, rank))

    def damaged(self, step: int, found: Exception, rank: int = 0) -> CheckpointError:
        """Builds the error for a checkpoint that cannot be read.

        Args:
            step: The checkpoint's.
            found: What reading it came upon.
            rank: The worker whose part it was.
        """
        before = [other for other in self._steps() if other < step]
        then = f"goes on from step {before[-1]}" if before else "begins anew"
        whole = self._stage.url("checkpoints", _name(step))
        part = f"'s part of worker {rank}" if rank else ""
        why = str(found).partition("\n")[0] or type(found).__name__
        return CheckpointError(
            f"the checkpoint {whole}{part} is damaged ({why}): remove that file, and the stage "
            f"{then}"
        )

    def forget_from(self, step: int) -> None:
        """Removes the checkpoints of this step and of later ones."""
        for late in self._steps():
            if late >= step:
                self._remove(late)

    def _write(self, step: int, state: bytes) -> None:
        self._stage.storage.write(state, *self._stage.parts, "checkpoints", _name(step))
        for old in self._steps()[: -self._keep]:
            self._remove(old)

    def _remove(self, step: int) -> None:
        storage, parts = self._stage.storage, (*self._stage.parts, "checkpoints")
        storage.remove(*parts, _name(step))
        for name in storage.names(*parts):
            if name.startswith(f"step-{step:09d}-") and name.endswith(".part"):
                storage.remove(*parts, name)

    def _steps(self) -> list[int]:
        names = self._stage.storage.names(*self._stage.parts, "checkpoints")
        return sorted(
            int(name[5:-3]) for name in names if name.startswith("step-") and name.endswith(".pt")
        )


def _part(step: int, rank: int) -> str:
    """Names a worker's part of a checkpoint, which counts only once the whole is there."""
    return f"step-{step:09d}-{rank}.part"


def _name(step: int) -> str:
    """A checkpoint is one file, so that it is complete or absent on any storage."""
    return f"step-{step:09d}.pt"
