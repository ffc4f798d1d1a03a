"""The evaluation of a VLM: its answers to questions, with the images and without them.

Answers are kept, not scores: a report scores them, and another rule needs no other run.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch.distributed as dist

from kdscale.core.config import STAGE_WEIGHTS
from kdscale.core.journal import JournalWriter
from kdscale.core.lease import check_lease
from kdscale.core.storage import Storage
from kdscale.eval.generate import Generator, Prompt
from kdscale.eval.matching import is_right
from kdscale.models.language import DTYPES
from kdscale.models.vlm import load_vlm
from kdscale.stages.ask import decode_any
from kdscale.stages.jobs import EvaluateJob
from kdscale.stages.loop import World

ANSWERS = "answers.parquet"
KEPT = ("item_id", "family", "prompt", "gold", "chance", "group")


class EvaluateRun:
    """One attempt at the stage on one worker; each answers its share of the questions.

    Args:
        job: What to do.
        world: This worker.
        report: Called once, with the accuracy.
    """

    def __init__(
        self, job: EvaluateJob, world: World, report: Callable[[dict[str, float]], None]
    ) -> None:
        self.job, self.world, self.report = job, world, report
        self.started = time.time()

    def train(self, _: Any = None) -> None:
        """Asks every question twice and writes the answers."""
        items = read_items(self.job.questions)
        own = items[self.world.rank :: self.world.size]
        kind, key = self.job.recipe.model.removeprefix(STAGE_WEIGHTS).split("/")
        storage = Storage(self.job.storage_root)
        with storage.local_directory("stages", kind, key, "output", "model") as directory:
            loaded, processor = load_vlm(directory, dtype=DTYPES[self.job.recipe.precision])
        model: Any = loaded
        model.to(self.world.device)
        generator = Generator(model, processor, decode_any)
        for column, blind in (("prediction", False), ("blind_prediction", True)):
            found = generator([self._prompt(item, blind) for item in own])
            for item, answer in zip(own, found, strict=True):
                item[column] = answer.text
        self._finish(self._gathered(own))

    def _prompt(self, item: dict[str, Any], blind: bool) -> Prompt:
        """Returns what the model is asked about an item."""
        spec = self.job.recipe.questions
        return Prompt(
            name=f"{spec.name} {item['item_id']}",
            text=item["prompt"],
            images=() if blind else (item["image"],),
            max_new_tokens=spec.max_new_tokens,
        )

    def _gathered(self, own: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Puts the workers' shares together in the order of the questions."""
        if self.world.size == 1:
            return own
        shares: list[Any] = [None] * self.world.size
        dist.all_gather_object(shares, own)
        total = sum(map(len, shares))
        return [shares[place % len(shares)][place // len(shares)] for place in range(total)]

    def _finish(self, items: list[dict[str, Any]]) -> None:
        """Writes answers and accuracy, and marks the stage done."""
        metrics = {
            name: 100.0 * sum(is_right(item[column], item["gold"]) for item in items) / len(items)
            for name, column in (("accuracy", "prediction"), ("blind", "blind_prediction"))
        }
        self.report({"step": 1.0, **metrics})
        if self.world.is_first:
            check_lease(self.job.stage, self.job.lease)
            storage, parts = self.job.stage.storage, (*self.job.stage.parts, "output")
            columns = (*KEPT, "prediction", "blind_prediction")
            table = pa.table({name: [item[name] for item in items] for name in columns})
            buffer = io.BytesIO()
            pq.write_table(table, buffer)
            storage.write(buffer.getvalue(), *parts, ANSWERS)
            storage.write_json(metrics, *parts, "metrics.json")
            seconds = time.time() - self.started
            journal = JournalWriter(self.job.stage, 1)
            speed = {"samples_per_s": 2 * len(items) / seconds}
            journal.append({"step": 1, "questions": len(items)} | metrics | speed)
            self.job.stage.finish(self.job.record | {"seconds": round(seconds, 1)})
        self.world.wait()


def read_items(path: str) -> list[dict[str, Any]]:
    """Reads a benchmark's questions, images included."""
    import fsspec

    with fsspec.open(path, "rb") as file:
        return pq.read_table(file).to_pylist()
