"""How much faster a distillation step gets when the teacher's embeddings come from the cache.

Towers have their true dimensions and random weights. The bound is that of floating-point
operations, (3 S + T) / 3 S with S and T the forward work of student and teacher; both steps run
in turn, in one process, on the same batch.

    python benchmarks/cached_step.py [--teachers clip_b16 clip_l14] [--batch 32] [--steps 3]
        [--device cuda] [--precision bf16]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from _common import gpu_name, settle, table
from torch.nn.functional import normalize

from kdscale.core.config import Distill
from kdscale.core.scale import TRUE_SIZE_CPU, resolve, teacher_of
from kdscale.data.samples import Batch
from kdscale.data.shards import Manifest
from kdscale.models.towers import normalise, tokenizer
from kdscale.stages.distill import DistillTask
from kdscale.stages.jobs import DistillJob
from kdscale.stages.loop import World


def job(teacher: str, student: str, batch: int, root: str, **fields: Any) -> DistillJob:
    """Returns the job of one pair of towers; `fields` are of the recipe."""
    named = Distill(
        student=student,
        teacher=teacher,
        loss="clip_kd",
        zero_shot=None,
        global_batch_size=batch,
        bn_group=batch,
        warmup_steps=1,
        **fields,
    )
    recipe = resolve(named, TRUE_SIZE_CPU).replace(teacher=teacher_of(named, TRUE_SIZE_CPU))
    return DistillJob("distill", "0" * 16, root, recipe, 1000, Manifest(()), None, {})


def make_batch(task: DistillTask, size: int) -> Batch:
    """Draws a batch and lets the teacher embed it once."""
    random = np.random.default_rng(0)
    towers = [task.student.spec] + ([task.teacher.spec] if task.teacher else [])
    texts = [f"a photo of a {random.integers(1000)} and something else" for _ in range(size)]
    images = {
        px: torch.from_numpy(random.integers(0, 255, (size, px, px, 3), np.uint8))
        for px in {tower.image_px for tower in towers}
    }
    tokens = {tower.tokens_name: tokenizer(tower)(texts) for tower in towers}
    rows = np.arange(size)
    batch = Batch(0, 0, rows, [str(row) for row in rows], images, tokens)
    assert task.teacher is not None
    model: Any = task.teacher.model
    spec, device = task.teacher.spec, task.world.device
    with torch.no_grad():
        pixels = normalise(images[spec.image_px].to(device), spec)
        image = normalize(model.encode_image(pixels), dim=-1)
        text = normalize(model.encode_text(tokens[spec.tokens_name].to(device)), dim=-1)
    return replace(batch, teacher_image=image.half().cpu(), teacher_text=text.half().cpu())


def compare(
    teacher: str, student: str, batch_size: int, steps: int, device: torch.device, precision: str
) -> list[str]:
    """Times both steps of one pair."""
    with tempfile.TemporaryDirectory() as root:
        one = job(teacher, student, batch_size, root, precision=precision)
        task = DistillTask(one, World(device=device))
        batch = make_batch(task, batch_size)
        assert task.teacher is not None
        own, kept = task.student.spec.facts, task.teacher.spec.facts
        scale = task.teacher.model.logit_scale.exp()
        times: dict[str, list[float]] = {"online": [], "cached": []}
        losses: dict[str, float] = {}
        for step in range(steps + 1):
            for name, cached in (("online", None), ("cached", scale)):
                task.cached_scale = cached
                began = time.perf_counter()
                losses[name] = float(task.step(replace(batch, step=step))["total"])
                settle(device)
                if step:
                    times[name].append(time.perf_counter() - began)
    student_work = (own.image_gflop or 0) + (own.text_gflop or 0)
    teacher_work = (kept.image_gflop or 0) + (kept.text_gflop or 0)
    bound = (3 * student_work + teacher_work) / (3 * student_work)
    online, cached = (statistics.median(times[name]) for name in ("online", "cached"))
    return [
        f"{teacher} -> {student}",
        f"{batch_size / online:.1f}",
        f"{batch_size / cached:.1f}",
        f"{online / cached:.2f} x",
        f"{bound:.2f} x",
        f"{online / cached / bound:.0%}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teachers", nargs="+", default=["clip_b16", "clip_l14"])
    parser.add_argument("--student", default="vit_t16")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32")
    options = parser.parse_args()
    device = torch.device(options.device)
    header = ("pair", "online, samples/s", "cached, samples/s", "speed-up", "bound", "share")
    rows = [
        compare(teacher, options.student, options.batch, options.steps, device, options.precision)
        for teacher in options.teachers
    ]
    title = f"Cached step, batch {options.batch}, {options.precision}{gpu_name(device)}"
    print(table(title, header, rows))


if __name__ == "__main__":
    main()
