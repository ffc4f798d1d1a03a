"""The gate stage: a teacher on the whole of ImageNet, held against its published top-1.

The unit of work is a piece of the set; what is embedded is written down, so that a killed run loses
the pieces in work. Scores are kept before they are judged: whoever waits for a teacher that fails
is told at once.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from kdscale.analysis.stats import Interval
from kdscale.core.journal import JournalWriter
from kdscale.core.lease import check_lease
from kdscale.core.storage import Storage
from kdscale.data.evalsets import EvalItem
from kdscale.models.towers import load_tower
from kdscale.stages.evaluate import Tower
from kdscale.stages.gate import gate
from kdscale.stages.jobs import GateJob
from kdscale.stages.loop import World, check_precision
from kdscale.stages.zeroshot import (
    Measured,
    Part,
    ZeroShotResult,
    embed_shard,
    is_whole,
    score_parts,
    shards_for,
)

PARTS = "parts"
PREDICTIONS, RESULT = "zero_shot.parquet", "zero_shot.json"


class GateRun:
    """One attempt at the stage on one worker; each embeds its share of the pieces.

    Args:
        job: What to do.
        world: This worker.
        report: Called once on every worker.
    """

    def __init__(
        self, job: GateJob, world: World, report: Callable[[dict[str, float]], None]
    ) -> None:
        check_precision(job.recipe.precision, world.device.type)
        self.job, self.world, self.report = job, world, report
        self.storage, self.output = job.stage.storage, (*job.stage.parts, "output")
        self.started = time.time()

    @cached_property
    def tower(self) -> Tower:
        """The teacher, loaded where it is needed."""
        spec = self.job.recipe.tower
        model = load_tower(spec, Storage(self.storage.root))
        return Tower(model.eval().to(self.world.device), spec)

    def train(self, _: Any = None) -> None:
        """Scores the teacher, unless an earlier attempt has, and judges it.

        Raises:
            GateFailed, GateUndecided: As `kdscale.stages.gate.gate`.
            DataError: As `kdscale.stages.zeroshot.evaluate`.
        """
        if not self.storage.exists(*self.output, RESULT):
            self._embed()
            self.world.wait()
            if self.world.is_first:
                self._score()
        self.world.wait()
        if self.world.is_first:
            gate(self.job.recipe, self._result())
            seconds = round(time.time() - self.started, 1)
            self.job.stage.finish(self.job.record | {"seconds": seconds})
        self.report({"step": 1.0})
        self.world.wait()

    def _embed(self) -> None:
        """Embeds what is left of this worker's pieces."""
        parts = (*self.job.stage.parts, PARTS)
        there = set(self.storage.names(*parts))
        shards = shards_for(self.job.recipe)
        for number in range(self.world.rank, len(shards), self.world.size):
            if _name(number) not in there:
                found = embed_shard(self.job.recipe, self.tower, shards[number])
                self.storage.write(packed(found), *parts, _name(number))

    def _score(self) -> None:
        """Puts the pieces together and writes scores and predictions."""
        job, parts = self.job, (*self.job.stage.parts, PARTS)
        names = sorted(name for name in self.storage.names(*parts) if not name.startswith("."))
        found = [unpacked(self.storage.read(*parts, name)) for name in names]
        result = score_parts(job.recipe, self.tower, found)
        check_lease(job.stage, job.lease)
        rows = {k: [item[k] for item in result.items] for k in ("key", "label", "prediction")}
        buffer = io.BytesIO()
        pq.write_table(pa.table(rows), buffer)
        self.storage.write(buffer.getvalue(), *self.output, PREDICTIONS)
        top1 = {"zero_shot_top1": result.metrics["top1"].value}
        known = top1 | {"published_top1": float(job.recipe.published or 0.0)}
        self.storage.write_json(known, *self.output, "metrics.json")
        speed = {"images": result.n, "samples_per_s": result.n / (time.time() - self.started)}
        JournalWriter(job.stage, 1).append({"step": 1} | known | speed)
        document = {k: v for k, v in asdict(result).items() if k != "items"}
        self.storage.write_json(document, *self.output, RESULT)
        self.storage.remove(*parts)

    def _result(self) -> ZeroShotResult:
        """Reads what was scored."""
        known = self.storage.read_json(*self.output, RESULT)
        known["metrics"] = {
            name: Measured(found["value"], Interval(**found["interval"]), found["chance"])
            for name, found in known["metrics"].items()
        }
        known["complete"] = is_whole(self.job.recipe, known["n"], known["unreadable"])
        return ZeroShotResult(**known, items=[])


def _name(number: int) -> str:
    """Names a piece's file."""
    return f"{number:06d}.npz"


def packed(part: Part) -> bytes:
    """Encodes what a piece gives."""
    buffer = io.BytesIO()
    np.savez(
        buffer,
        keys=np.array([item.key for item in part.items], dtype=str),
        labels=np.array([item.label for item in part.items], dtype=np.int64),
        embedding=part.embedding_ND.numpy(),
        bad=np.array(list(part.unreadable.items()), dtype=str).reshape(-1, 2),
    )
    return buffer.getvalue()


def unpacked(data: bytes) -> Part:
    """Decodes what a piece gives."""
    with np.load(io.BytesIO(data)) as arrays:
        pairs = zip(arrays["keys"].tolist(), arrays["labels"].tolist(), strict=True)
        return Part(
            [EvalItem(key, None, label) for key, label in pairs],
            torch.from_numpy(arrays["embedding"]),
            {str(key): str(cause) for key, cause in arrays["bad"].tolist()},
        )
