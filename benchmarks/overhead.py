"""What Ray costs a training loop: Data and Train around it, against the bare step function.

The same student and the same number of threads; bare steps run on batches that lie in memory,
before and after the Ray run, so that a drifting machine shows.

    python benchmarks/overhead.py [--batch 32] [--steps 10]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from _common import make_shards, table

from kdscale.core.config import DataSpec, Distill, Execution
from kdscale.core.journal import read_steps
from kdscale.core.scale import TRUE_SIZE_CPU, resolve
from kdscale.core.storage import Storage
from kdscale.data.samples import Batch
from kdscale.models.preprocess import tokenizer
from kdscale.stages.distill import DistillTask
from kdscale.stages.inputs import find_source
from kdscale.stages.jobs import DistillJob
from kdscale.stages.loop import World
from kdscale.stages.worker import fit
from kdscale.sweep.schedule import start_ray


def make_job(root: str, pattern: str, batch: int, steps: int) -> DistillJob:
    """Returns the job of a student without teacher, in one worker with all cores."""
    threads = os.cpu_count() or 1
    named = Distill(
        student="vit_t16",
        loss="clip",
        data=DataSpec(name="bench", urls=pattern),
        zero_shot=None,
        epochs=1,
        global_batch_size=batch,
        bn_group=batch,
        warmup_steps=1,
        run=Execution(num_workers=1, cpus_per_worker=1, threads_per_worker=threads, log_every=1),
    )
    recipe = resolve(named, TRUE_SIZE_CPU)
    data = find_source(named.data, Storage(root)).manifest()  # pyright: ignore
    return DistillJob("distill", "0" * 16, root, recipe, steps, data, None, {})


def bare(job: DistillJob, steps: int) -> list[float]:
    """Times steps on a batch in memory: seconds each, the first left out."""
    torch.set_num_threads(os.cpu_count() or 1)
    task = DistillTask(job, World())
    size, spec = job.recipe.global_batch_size, task.student.spec
    random = np.random.default_rng(0)
    px = spec.image_px
    images = torch.from_numpy(random.integers(0, 255, (size, px, px, 3), np.uint8))
    tokens = tokenizer(spec)([f"a photo of {i} things" for i in range(size)])
    rows = np.arange(size)
    batch = Batch(0, 0, rows, list(map(str, rows)), {px: images}, {spec.tokens_name: tokens})
    found: list[float] = []
    for step in range(steps + 1):
        began = time.perf_counter()
        float(task.step(replace(batch, step=step))["total"])
        found.append(time.perf_counter() - began)
    return found[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/kdscale-bench"))
    options = parser.parse_args()
    samples = options.batch * (options.steps + 5)
    pattern = make_shards(options.scratch, 2, samples // 2)
    with tempfile.TemporaryDirectory() as root:
        job = make_job(root, pattern, options.batch, options.steps + 4)
        times = bare(job, options.steps)
        start_ray()
        fit([job])
        lines = read_steps(job.stage)[4:]
        times += bare(job, options.steps)
    own = options.batch / statistics.median(times)
    under_ray = statistics.median(line["samples_per_s"] for line in lines)
    waited = statistics.mean(line["data_wait"] for line in lines)
    rows = [
        ("bare step, batches in memory", f"{own:.2f}", "", ""),
        (
            "under Ray Data and Ray Train",
            f"{under_ray:.2f}",
            f"{under_ray / own:.1%}",
            f"{waited:.1%}",
        ),
    ]
    header = ("loop", "samples/s", "of bare", "data_wait")
    print(table(f"Framework overhead, ViT-T/16 at 224 px, batch {options.batch}", header, rows))


if __name__ == "__main__":
    main()
