"""One attempt at a VLM stage on one worker: resume, train, log, checkpoint, finish."""

from __future__ import annotations

import gc
import io
import json
import math
import resource
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from transformers import TrainerCallback

from kdscale.core.checkpoints import Checkpoints
from kdscale.core.config import TowerSpec
from kdscale.core.journal import JournalWriter
from kdscale.core.lease import check_lease
from kdscale.core.types import CheckpointError, DataError, TrainingDiverged
from kdscale.data.instruct_stream import InstructBatch
from kdscale.models.vlm import merge, save_projector, save_vlm
from kdscale.stages.ahead import Ahead
from kdscale.stages.jobs import VlmJob
from kdscale.stages.loop import World, batch_digest
from kdscale.stages.run import Meter
from kdscale.stages.stop import Requests, stop_at_checkpoint
from kdscale.stages.vlm import (
    Built,
    MicroBatches,
    StageTrainer,
    build,
    fill,
    learnt,
    training_arguments,
    uses_deepspeed,
)

FACTS = "world.json"


class VlmRun(TrainerCallback):
    """One attempt at the stage on one worker.

    Args:
        job: What to do.
        world: This worker.
        report: Called on every worker at every checkpoint with its metrics.
    """

    def __init__(
        self, job: VlmJob, world: World, report: Callable[[dict[str, float]], None]
    ) -> None:
        assert job.recipe.run is not None
        self.job, self.world, self.report = job, world, report
        self.execution = job.recipe.run
        self.checkpoints = Checkpoints(job.stage, self.execution.keep_checkpoints)
        self.journal = JournalWriter(job.stage, self.execution.log_every)
        self.meter = Meter()
        self.ahead: Ahead[InstructBatch] = Ahead(iter(()))
        self.started = time.time()
        self.scratch = tempfile.TemporaryDirectory()
        self.trainer: StageTrainer | None = None
        self.rates: dict[str, float] = {}
        self.requests = Requests(job, world)
        self.stopping = False

    def train(self, batches: Callable[[int], Iterator[InstructBatch]]) -> None:
        """Trains from the latest checkpoint to the end and writes the stage's output.

        Args:
            batches: Maps the first step to this worker's micro-batches from there on.

        Raises:
            TrainingDiverged: If the loss stops being finite.
            DataError: If a step has nothing to learn, or the batches end before the last step.
            CheckpointError: If the checkpoint cannot be read, or was written by another number of
                workers under DeepSpeed, which cannot share it out anew.
            StageStopped: After a step, with a checkpoint, if it was asked to stop.
        """
        with self.scratch:
            start = self.checkpoints.latest_step()
            resumed = self._restore(start) if start else None
            fresh_accelerator(self.job.recipe)
            built = build(self.job, self.world.device)
            micro = MicroBatches(self.job, self.world, built.processor, pixel_shape(self.job))
            micro.num_image_tokens = built.model.config.image_seq_length
            arguments = training_arguments(self.job, self.world, self.scratch.name)
            self.trainer = StageTrainer(built, micro, self.job.recipe, arguments, [self])
            if start < self.job.total_steps:
                self.ahead = Ahead(self.meter.timed(batches(start)))
                micro.source = self.ahead
                if self.requests.have_come(ready=self.ahead.ready):
                    stop_at_checkpoint(self.job, self.world, self.checkpoints)
                try:
                    self.trainer.train(resume_from_checkpoint=resumed)
                except UnpicklingError as error:
                    raise self.checkpoints.damaged(start, error) from error
                self._check_end(self.trainer.state.global_step)
            elif resumed is not None:
                self.trainer._load_from_checkpoint(resumed)
            self.checkpoints.wait()
            self._finish(built, trained=start < self.job.total_steps)
            self.trainer = None
            gc.collect()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Saves as often as this attempt is told to, not as the one before it was."""
        state.save_steps = args.save_steps

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Notes the learning rates that the step will use; after it they are the next one's."""
        assert self.trainer is not None
        self.rates = self.trainer.rates()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Writes the step's line of the journal."""
        trainer = self.trainer
        assert trainer is not None
        data = trainer._batches.steps.popleft()
        counts = [data.num_tokens, data.num_learnt, data.num_masked]
        counts = self.world.sum(torch.tensor(counts, device=self.world.device)).tolist()
        tokens, learnt_tokens, masked = counts
        line: dict[str, Any] = {
            "step": state.global_step,
            "epoch": data.epoch,
            "ids": batch_digest(data.rows, data.keys, self.world),
            "total": trainer.take_loss(self.world),
            **self.rates,
        }
        size = self.job.recipe.global_batch_size
        speed = self.meter.read(size)
        line |= speed | {"tokens_per_s": speed["samples_per_s"] * (tokens / size)}
        line["masked"] = masked / size
        line["peak_mib"] = peak_memory(self.world.device) / 2**20
        if not learnt_tokens:
            raise DataError(
                f"step {line['step']} teaches nothing: all of its {size} samples are masked whole; "
                f"see whether their answers are empty, spell out what template "
                f"{self.job.recipe.template!r} ends answers with, or lie beyond max_length "
                f"{self.job.recipe.max_length}"
            )
        if not math.isfinite(line["total"]):
            raise TrainingDiverged(
                f"the loss is {line['total']} at step {line['step']}; lower lr or clip gradients"
            )
        if self.world.is_first:
            self.journal.append(line)
        due = line["step"] % self.execution.checkpoint_every == 0
        if due:
            self.report({"step": line["step"], "loss": line["total"]})
        if line["step"] < self.job.total_steps and not control.should_save:  # else `on_save` asks
            look = line["step"] % self.execution.log_every == 0
            self.stopping = self.requests.have_come(look, self.ahead.ready)
            control.should_save = control.should_save or self.stopping

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Moves what the Trainer has saved into the storage; the first worker completes it."""
        step = state.global_step
        folder = Path(self.scratch.name, f"checkpoint-{step}")
        facts = {"size": self.world.size, "deepspeed": uses_deepspeed(self.job.recipe)}
        if self.world.is_first:
            (folder / FACTS).write_text(json.dumps(facts))
        packed = pack(folder)
        if not self.world.is_first and uses_deepspeed(self.job.recipe):
            self.checkpoints.save_part(step, self.world.rank, packed)
        self.world.wait()
        if self.world.is_first:
            check_lease(self.job.stage, self.job.lease)
            self.journal.flush()
            self.checkpoints.save(step, packed)
        self.meter.restart()
        if step < self.job.total_steps and not self.stopping:
            self.stopping = self.requests.have_come(look=True, ready=self.ahead.ready)
        if self.stopping:
            stop_at_checkpoint(self.job, self.world, self.checkpoints)

    def _restore(self, step: int) -> str:
        """Unpacks a checkpoint and returns its directory."""
        folder = Path(self.scratch.name, f"checkpoint-{step}")
        try:
            unpack(self.checkpoints.load(step), folder)
            facts = json.loads((folder / FACTS).read_text())
        except (tarfile.TarError, FileNotFoundError, ValueError) as error:
            raise self.checkpoints.damaged(step, error) from error
        now = {"size": self.world.size, "deepspeed": uses_deepspeed(self.job.recipe)}
        if (facts["deepspeed"] or now["deepspeed"]) and facts != now:
            raise CheckpointError(
                f"the checkpoint of step {step} was written by {_words(facts)}, this attempt has "
                f"{_words(now)}: DeepSpeed's shards cannot be dealt out anew; run with the former "
                "(--set run.num_workers, run.deepspeed), or remove the stage's checkpoints"
            )
        if facts["deepspeed"]:
            for rank in range(1, facts["size"]):
                try:
                    unpack(self.checkpoints.load_part(step, rank), folder)
                except tarfile.TarError as error:
                    raise self.checkpoints.damaged(step, error, rank) from error
        return str(folder)

    def _check_end(self, step: int) -> None:
        """Refuses to call a stage done that has not taken all its steps."""
        if step != self.job.total_steps:
            raise DataError(
                f"training ended after step {step} of {self.job.total_steps}: the stream gave no "
                "more batches"
            )

    def _finish(self, built: Built, trained: bool) -> None:
        """Writes what the stage has learnt and marks it done.

        Args:
            built: Holds it, unless DeepSpeed has shared it out.
            trained: Whether this attempt has taken a step; else the last checkpoint is read.
        """
        trainer = self.trainer
        assert trainer is not None
        whole: Any = None
        if trained and uses_deepspeed(self.job.recipe):
            whole = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        if self.world.is_first:
            check_lease(self.job.stage, self.job.lease)
            self.journal.flush()
            model = built.model if whole is None else self._refilled(whole)
            self._write_output(model, built)
            seconds = round(time.time() - self.started, 1)
            record = {"seconds": seconds, "attention": built.attention._asdict()}
            self.job.stage.finish(self.job.record | record)
        self.world.wait()

    def _refilled(self, whole: dict[str, torch.Tensor]) -> Any:
        """Builds the model anew and fills in what DeepSpeed has trained in pieces."""
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()
        model = build(self.job, torch.device("cpu")).model
        fill(model, learnt(model, whole))
        return model

    def _write_output(self, model: Any, built: Built) -> None:
        """Writes the projector; after fine-tuning the whole model in the hub's layout."""
        storage, parts = self.job.stage.storage, (*self.job.stage.parts, "output")
        with tempfile.TemporaryDirectory() as directory:
            if self.job.recipe.trainable == "projector":
                save_projector(model, directory)
                storage.put_directory(directory, *parts)
            else:
                save_vlm(merge(model), built.processor, directory)
                storage.put_directory(directory, *parts, "model")


def pixel_shape(job: VlmJob) -> tuple[int, ...]:
    """Returns the shape of one image as the stream gives it, or of its cached features."""
    tower, features = job.recipe.vision, job.features
    if features is not None:
        return features.shape
    assert isinstance(tower, TowerSpec)
    return (tower.image_px, tower.image_px, 3)


def fresh_accelerator(recipe: Any) -> None:
    """Forgets the settings of an earlier stage in this process, and joins DeepSpeed's group."""
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()
    if uses_deepspeed(recipe):
        import deepspeed

        deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo")


def peak_memory(device: torch.device) -> float:
    """Returns the most memory that this process has held, in bytes: the device's on a GPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def pack(folder: Path) -> bytes:
    """Packs a directory as one file."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.add(folder, arcname=".")
    return buffer.getvalue()


def unpack(data: bytes, folder: Path) -> None:
    """Unpacks what `pack` has made."""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        tar.extractall(folder, filter="data")


def _words(facts: dict[str, Any]) -> str:
    """Puts a checkpoint's writers in words."""
    how = "under DeepSpeed" if facts["deepspeed"] else "without DeepSpeed"
    return f"{facts['size']} worker(s) {how}"
