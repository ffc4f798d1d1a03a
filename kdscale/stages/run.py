"""One attempt at a stage on one worker: resume, step, log, evaluate, checkpoint, finish."""

from __future__ import annotations

import io
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pickle import UnpicklingError
from typing import Any, NoReturn, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from kdscale.core.checkpoints import Checkpoints
from kdscale.core.journal import JournalWriter
from kdscale.core.lease import check_lease
from kdscale.core.trained import epoch_suffix
from kdscale.core.types import TrainingDiverged
from kdscale.data.samples import Batch
from kdscale.models.towers import save_clip
from kdscale.stages.ahead import Ahead
from kdscale.stages.distill import DistillTask
from kdscale.stages.evaluate import Evaluator, Scores, cached_features
from kdscale.stages.jobs import DistillJob
from kdscale.stages.loop import World, batch_digest
from kdscale.stages.stop import Requests, stop_at_checkpoint

T = TypeVar("T")


class Meter:
    """Tells how fast the steps go and how long they wait for data."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._waited_s = 0.0

    def timed(self, batches: Iterator[T]) -> Iterator[T]:
        """Passes batches on and notes the time that each one took to come."""
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self._waited_s += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def read(self, global_batch_size: int) -> dict[str, float]:
        """Returns samples/s and data_wait of the step that just ended."""
        elapsed = time.perf_counter() - self._started
        speed = {
            "samples_per_s": global_batch_size / elapsed,
            "data_wait": min(1.0, self._waited_s / elapsed),
        }
        self.restart()
        return speed

    def restart(self) -> None:
        """Leaves what happened since the last step out of account."""
        self._started, self._waited_s = time.perf_counter(), 0.0


class Run:
    """One attempt at the stage on one worker: resume, step, log, evaluate, checkpoint.

    Args:
        job: What to do.
        world: This worker.
        report: Called on every worker at every checkpoint with its metrics.
    """

    def __init__(
        self, job: DistillJob, world: World, report: Callable[[dict[str, float]], None]
    ) -> None:
        assert job.recipe.run is not None
        self.job, self.world, self.report = job, world, report
        self.task = DistillTask(job, world)
        self.execution = job.recipe.run
        self.checkpoints = Checkpoints(job.stage, self.execution.keep_checkpoints)
        self.journal = JournalWriter(job.stage, self.execution.log_every)
        self.evaluator = None
        if job.zero_shot_data is not None:
            spec: Any = job.recipe.zero_shot
            cache = job.eval_cache
            features = cache and cached_features(cache, job.zero_shot_data)
            self.evaluator = Evaluator(
                spec, job.zero_shot_data, world, job.recipe.precision or "fp32", features
            )
        self.scores: Scores | None = None
        self.requests = Requests(job, world)
        self.started = time.time()

    def train(self, batches: Callable[[int], Iterator[Batch]]) -> None:
        """Trains from the latest checkpoint to the end and writes the stage's output.

        Args:
            batches: Maps the first step to this worker's share of the batches from there on.

        Raises:
            CheckpointError: If the newest checkpoint is damaged, or of other data.
            TrainingDiverged: If the loss stops being finite.
            StageStopped: After a step, with a checkpoint, if it was asked to stop.
        """
        start = self.checkpoints.latest_step()
        if start:
            self._resume(start)
        meter = Meter()
        remaining = batches(start) if start < self.job.total_steps else iter(())
        ahead = Ahead(meter.timed(remaining))
        if start < self.job.total_steps and self.requests.have_come(ready=ahead.ready):
            self._stop(start)
        for batch in ahead:
            line: dict[str, Any] = self._step(batch)
            line |= meter.read(self.job.recipe.global_batch_size)
            step: int = line["step"]
            kept = [epoch for epoch, end in self.job.kept_epochs.items() if end == step]
            due = step % self.execution.checkpoint_every == 0 or step == self.job.total_steps
            if kept or due:
                self._checkpoint(line, kept)
                meter.restart()
            elif self.world.is_first:
                self.journal.append(line)
            if step < self.job.total_steps:
                look = due or step % self.execution.log_every == 0
                if self.requests.have_come(look, ahead.ready):
                    self._stop(step)
        self.checkpoints.wait()
        self._finish()

    def _resume(self, step: int) -> None:
        """Restores a checkpoint; torch meets damage with all kinds of errors."""
        state = self.checkpoints.load(step)
        try:
            self.task.load_state(state)
        except (RuntimeError, EOFError, LookupError, ValueError, UnpicklingError) as error:
            raise self.checkpoints.damaged(step, error) from error

    def _step(self, batch: Batch) -> dict[str, Any]:
        """Does one optimizer step and returns its line of the journal."""
        terms = self.task.step(batch)
        line: dict[str, Any] = {
            "step": batch.step + 1,
            "epoch": batch.epoch,
            "ids": batch_digest(batch.rows.tolist(), batch.keys, self.world),
        }
        line |= {name: float(value) for name, value in terms.items()}
        if not math.isfinite(line["total"]):
            raise TrainingDiverged(
                f"the loss is {line['total']} at step {line['step']}; lower lr or a loss weight"
            )
        return line

    def _checkpoint(self, line: dict[str, Any], kept: Sequence[int]) -> None:
        """Evaluates, writes students to keep, the journal and then the checkpoint, in this order.

        Resuming from the checkpoint thus finds them; before it, they are written again.
        """
        if self.evaluator is not None:
            self.scores = self.evaluator.run(self.task.student, self.task.teacher)
            line |= self.scores.metrics
        if self.world.is_first:
            check_lease(self.job.stage, self.job.lease)
            for epoch in kept:
                self._write_output(epoch)
            self.journal.append(line)
            self.journal.flush()
            self.checkpoints.save(line["step"], self.task.state(line["step"]))
        self.report({"step": line["step"], "loss": line["total"]})

    def _stop(self, step: int) -> NoReturn:
        """Ends the attempt at a checkpoint without an evaluation."""
        self.checkpoints.wait()
        if self.world.is_first and self.checkpoints.latest_step() != step:
            check_lease(self.job.stage, self.job.lease)
            self.journal.flush()
            self.checkpoints.save(step, self.task.state(step))
        stop_at_checkpoint(self.job, self.world, self.checkpoints)

    def _finish(self) -> None:
        """Writes the student in hub layout and its predictions, and marks the stage done."""
        if self.evaluator is not None and self.scores is None:
            self.scores = self.evaluator.run(self.task.student, self.task.teacher)
        if self.world.is_first:
            check_lease(self.job.stage, self.job.lease)
            self._write_output()
            seconds = round(time.time() - self.started, 1)
            self.job.stage.finish(self.job.record | {"seconds": seconds})
        self.world.wait()

    def _write_output(self, epoch: int | None = None) -> None:
        """Writes model, predictions and metrics below `output/`; an early student's metrics last.

        `kdscale.core.trained.missing_epochs` takes them for the sign that all is there.
        """
        storage, parts = self.job.stage.storage, (*self.job.stage.parts, "output")
        suffix = epoch_suffix(epoch)
        with tempfile.TemporaryDirectory() as directory:
            save_clip(self.task.student.model, self.task.student.spec, directory)
            storage.put_directory(directory, *parts, f"model{suffix}")
        if self.scores is not None:
            table = pa.table(
                {
                    "key": self.scores.keys,
                    "label": self.scores.labels,
                    "prediction": self.scores.predictions,
                }
            )
            buffer = io.BytesIO()
            pq.write_table(table, buffer)
            storage.write(buffer.getvalue(), *parts, f"zero_shot{suffix}.parquet")
        if self.scores is not None or epoch is not None:
            metrics = {} if self.scores is None else self.scores.metrics
            storage.write_json(metrics, *parts, f"metrics{suffix}.json")
