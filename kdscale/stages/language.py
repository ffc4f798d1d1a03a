"""The language stage: a miniature language model learns to read before it is shown images.

The loop is that of transformers' Trainer, on one worker. It takes a minute, so a killed attempt
begins again, from the same weights and with the same blocks.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments

from kdscale.core.journal import JournalWriter
from kdscale.core.lease import check_lease
from kdscale.core.types import DataError
from kdscale.mini.text import texts
from kdscale.models.language import load_language
from kdscale.stages.jobs import LanguageJob
from kdscale.stages.loop import World
from kdscale.stages.run import Meter


class LanguageRun(TrainerCallback):
    """One attempt at the stage; the first worker makes it, others wait.

    Args:
        job: What to do.
        world: This worker.
        report: Called once, with the last loss.
    """

    def __init__(
        self, job: LanguageJob, world: World, report: Callable[[dict[str, float]], None]
    ) -> None:
        self.job, self.world, self.report = job, world, report
        self.journal = JournalWriter(job.stage, job.recipe.run.log_every if job.recipe.run else 1)
        self.meter = Meter()
        self.started = time.time()

    def train(self, _: Any = None) -> None:
        """Trains the model and writes it in the hub's layout."""
        if self.world.is_first:
            recipe = self.job.recipe
            model, tokenizer = load_language(recipe.llm, seed=recipe.seed)
            blocks = packed((text for world in recipe.data for text in texts(world)),
                            tokenizer, recipe.block_tokens)  # fmt: skip
            with tempfile.TemporaryDirectory() as scratch:
                trainer = Trainer(
                    model=model,
                    args=self._arguments(scratch),
                    train_dataset=[{"input_ids": block, "labels": block} for block in blocks],
                    callbacks=[self],
                )
                self.meter.restart()
                trainer.train()
            self._finish(model, tokenizer)
        self.world.wait()

    def _arguments(self, scratch: str) -> TrainingArguments:
        """Translates the recipe into the Trainer's terms."""
        recipe = self.job.recipe
        return TrainingArguments(
            output_dir=scratch,
            max_steps=recipe.num_steps,
            per_device_train_batch_size=recipe.batch_size,
            learning_rate=recipe.lr,
            lr_scheduler_type="cosine",
            warmup_steps=recipe.warmup_steps,
            use_cpu=self.world.device.type == "cpu",
            save_strategy="no",
            logging_strategy="steps",
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
            seed=recipe.seed,
        )

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Writes the step's line of the journal."""
        if "loss" in logs:
            line = {"step": state.global_step, "total": logs["loss"], "lr": logs["learning_rate"]}
            self.journal.append(line | self.meter.read(self.job.recipe.batch_size))

    def _finish(self, model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
        """Writes model and tokenizer and marks the stage done."""
        check_lease(self.job.stage, self.job.lease)
        self.journal.flush()
        with tempfile.TemporaryDirectory() as directory:
            model.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
            self.job.stage.storage.put_directory(
                directory, *self.job.stage.parts, "output", "model"
            )
        seconds = round(time.time() - self.started, 1)
        self.job.stage.finish(self.job.record | {"seconds": seconds})


def packed(
    lines: Iterable[str], tokenizer: PreTrainedTokenizerFast, block_tokens: int
) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
    """Puts texts end to end, each with an end token, and cuts them into blocks.

    Returns:
        Arrays of `block_tokens` ids; what does not fill the last one is left out.

    Raises:
        DataError: The text does not fill one block.
    """
    rows: Any = tokenizer(list(lines), add_special_tokens=False)["input_ids"]
    ids = np.array([i for row in rows for i in (*row, tokenizer.eos_token_id)], np.int64)
    count = len(ids) // block_tokens
    if count == 0:
        raise DataError(f"{len(ids)} tokens of text do not fill one block of {block_tokens}")
    return list(ids[: count * block_tokens].reshape(count, block_tokens))
