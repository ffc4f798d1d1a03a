"""What only a GPU can show: the stages in half precision, under DeepSpeed, and beside the CPU.

Runs the stage functions in process, without starting Ray, on batches in memory; weights are random
and data drawn.

    python benchmarks/gpu.py [--only vlm deepspeed distill towers] [--tiny] [--device cpu]

`--tiny` takes miniature models, to try the script itself.
"""

from __future__ import annotations

import argparse
import gc
import os
import socket
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from _common import gpu_name, settle, table
from torch.nn.functional import normalize

from kdscale.core.config import DataSpec, Execution, MiniWorld
from kdscale.core.journal import read_steps
from kdscale.core.scale import MINI, TRUE_SIZE_CPU, language_model
from kdscale.core.storage import Storage
from kdscale.core.vlm_config import Finetune, Pretrain
from kdscale.core.vlm_recipes import VLM_RECIPES
from kdscale.data.instruct_stream import InstructBatch, InstructStream
from kdscale.stages.jobs import VlmJob
from kdscale.stages.loop import World
from kdscale.stages.streams import instruct_config, vlm_inputs

STAGES = {"pretrain": Pretrain, "finetune": Finetune}
BATCH, STEPS = 16, 12
SMALL_BATCH, SMALL_STEPS = 4, 7


class Stopped(Exception):
    """Stands for a process that goes away."""


@cache
def manifest(root: str, content: str, samples: int) -> Any:
    """Draws conversations once."""
    from kdscale.stages.inputs import find_source

    world: Any = MiniWorld(content=content, num_samples=samples, samples_per_shard=64, seed=5)  # pyright: ignore
    spec = DataSpec(name=content, mini=world)
    return find_source(spec, Storage(root), content="conversations").manifest()


def vlm_job(kind: str, key: int, root: str, sizes: tuple[bool, int, int], **fields: Any) -> VlmJob:
    """Returns a VLM stage of TinyLLaVA's recipe.

    Args:
        sizes: Whether the models are miniature, the batch, the steps.
        fields: Of the recipe.
    """
    tiny, batch, steps = sizes
    scale = (MINI if tiny else TRUE_SIZE_CPU).replace(random_weights=True)
    content = "pretrain" if kind == "pretrain" else "instruct"
    settings = VLM_RECIPES["tinyllava"][list(STAGES).index(kind)] | {
        "vision": scale.students["vit_t16"].replace(weights="random"),
        "llm": language_model("qwen2_0_5b", scale).replace(weights="random"),
        "data": DataSpec(name=content, urls="elsewhere"),
        "global_batch_size": batch,
        "micro_batch_size": batch,
        "group_size": batch,
        "max_length": 512,
        "run": Execution(num_workers=0, checkpoint_every=10**6, log_every=1),
    }
    stage = STAGES[kind](**(settings | fields))
    data = manifest(root, content, batch * steps)
    return VlmJob(kind, f"{key:016x}", root, stage, steps, data, vlm_inputs(stage), {})


def in_memory(job: VlmJob) -> list[InstructBatch]:
    """Decodes all batches of a stage."""
    config = replace(instruct_config(job), own_steps=job.total_steps)
    return list(InstructStream(None, config, 0))


def run_vlm(
    job: VlmJob, batches: Sequence[InstructBatch], device: torch.device, stop: int | None = None
) -> list[dict[str, Any]]:
    """Runs a stage, up to a step that dies if one is given; returns its journal."""
    from kdscale.stages.vlm_run import VlmRun

    def given(start: int) -> Iterator[InstructBatch]:
        for batch in batches[start:]:
            if batch.step == stop:
                raise Stopped
            yield batch

    run = VlmRun(job, World(device=device), lambda _: None)
    try:
        run.train(given)
    except Stopped:
        run.checkpoints.wait()
    return read_steps(job.stage)


def apart(one: Sequence[float], other: Sequence[float]) -> str:
    """Returns the largest relative difference of two series."""
    return f"{max(abs(a - b) / abs(b) for a, b in zip(one, other, strict=True)):.1e}"


def totals(lines: Sequence[dict[str, Any]]) -> list[float]:
    """Returns the losses of a journal."""
    return [line["total"] for line in lines]


def vlm(device: torch.device, tiny: bool) -> None:
    """Both VLM stages in the precisions of the paper, and in fp32."""
    batch, steps = (SMALL_BATCH, SMALL_STEPS) if tiny else (BATCH, STEPS)
    header = ("precision", "tokens/s", "peak, MiB", "loss, first and last", "farthest from fp32")
    with tempfile.TemporaryDirectory() as root:
        for place, kind in enumerate(STAGES):
            fp16 = ("fp16",) if device.type == "cuda" and kind == "pretrain" else ()
            rows: list[tuple[str, ...]] = []
            batches: list[InstructBatch] = []
            whole: list[float] = []
            for number, precision in enumerate(("fp32", "bf16", *fp16)):
                sizes = (tiny, batch, steps + 2)
                job = vlm_job(kind, 10 * place + number, root, sizes, precision=precision)
                batches = batches or in_memory(job)
                if device.type == "cuda":
                    gc.collect()  # a stopped run's model and trainer refer to each other
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                # One of them goes on to its end: it saves a checkpoint and its output.
                ends = kind == "pretrain" and precision == "bf16"
                lines = run_vlm(job, batches, device, None if ends else steps)[:steps]
                if ends:
                    print("attention:", job.stage.record()["attention"])
                whole = whole or totals(lines)
                rows.append((precision, *figures(lines), apart(totals(lines), whole)))
            title = f"VLM {kind}, batch {batch}, {steps} steps{gpu_name(device)}"
            print(table(title, header, rows), flush=True)


def figures(lines: Sequence[dict[str, Any]]) -> tuple[str, str, str]:
    """Returns tokens/s over the later half, peak memory, and the first and last loss."""
    speed = statistics.median(line["tokens_per_s"] for line in lines[len(lines) // 2 :])
    ends = f"{lines[0]['total']:.4f}, {lines[-1]['total']:.4f}"
    return f"{speed:,.0f}", f"{lines[-1]['peak_mib']:,.0f}", ends


def deepspeed(device: torch.device, tiny: bool) -> None:
    """DeepSpeed on one device beside the plain loop, in miniature: uninterrupted and resumed."""
    del tiny
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    rows: list[tuple[str, ...]] = []
    run: Any = Execution(num_workers=0, checkpoint_every=2, log_every=1)
    sizes = (True, SMALL_BATCH, SMALL_STEPS)
    options: dict[str, Any] = {"micro_batch_size": SMALL_BATCH // 2, "precision": "fp32"}
    with tempfile.TemporaryDirectory() as root:
        for place, kind in enumerate(STAGES):
            plain = vlm_job(kind, 100 * place, root, sizes, run=run, **options)
            batches = in_memory(plain)
            os.environ.pop("RANK", None)
            expected = totals(run_vlm(plain, batches, device))
            os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            cases = [
                ("fp32", 2, None),
                ("fp32", 3, None),
                ("fp32", 3, 5),
                ("bf16", 2, None),
                ("bf16", 3, None),
            ]
            for number, (precision, stage, stop) in enumerate(cases, 1):
                fields = {"precision": precision, "zero_stage": stage}
                sharded = plain.recipe.replace(run=run.replace(deepspeed=True), **fields)
                job = replace(plain, key=f"{100 * place + number:016x}", recipe=sharded)
                if stop is not None:
                    run_vlm(job, batches, device, stop)
                found = totals(run_vlm(job, batches, device))
                how = f"{kind}, ZeRO-{stage}, {precision}{', resumed' if stop else ''}"
                # Weights drawn in bf16 are other ones, so that only fp32 can be compared.
                difference = apart(found, expected) if precision == "fp32" else ""
                rows.append((how, f"{found[0]:.5f}, {found[-1]:.5f}", difference))
    title = f"DeepSpeed, miniature, {SMALL_STEPS} steps{gpu_name(device)}"
    print(table(title, ("stage", "loss, first and last", "farthest from plain fp32"), rows))


def distill(device: torch.device, tiny: bool) -> None:
    """The distillation step in every precision, accumulated and resumed, beside the CPU."""
    from cached_step import job, make_batch

    from kdscale.stages.distill import DistillTask

    batch_size, steps = (4, 3) if tiny else (16, 4)
    run = Execution(num_workers=0, micro_batch_size=batch_size // 2)
    cases: dict[str, tuple[torch.device, dict[str, Any]]] = {
        "CPU, fp32": (torch.device("cpu"), {"precision": "fp32"}),
        "fp32": (device, {"precision": "fp32"}),
        "fp32, resumed": (device, {"precision": "fp32"}),
        "fp32, 2 micro-batches": (device, {"precision": "fp32", "run": run}),
        "bf16": (device, {"precision": "bf16"}),
    }
    if device.type == "cuda":
        cases["fp16"] = (device, {"precision": "fp16"})
        cases["fp16, 2 micro-batches"] = (device, {"precision": "fp16", "run": run})
    rows: list[tuple[str, ...]] = []
    expected: list[float] = []
    with tempfile.TemporaryDirectory() as root:
        for name, (where, fields) in cases.items():
            made = job("clip_b16", "vit_t16", batch_size, root, **fields)
            world = World(device=where)
            task = DistillTask(made, world)
            batch = make_batch(task, batch_size)
            losses: list[float] = []
            for step in range(steps):
                if step == 2 and "resumed" in name:
                    state = task.state(step)
                    task = DistillTask(made, world)
                    task.load_state(state)
                losses.append(float(task.step(replace(batch, step=step))["total"]))
            settle(where)
            expected = expected or losses
            scale = f"{task.scaler.get_scale():g}"
            ends = f"{losses[0]:.4f}, {losses[-1]:.4f}"
            rows.append((name, ends, apart(losses, expected), scale))
            print(*rows[-1], flush=True)
    title = f"Distillation step, clip_b16 -> vit_t16, batch {batch_size}, {steps} steps"
    header = ("how", "loss, first and last", "farthest from CPU", "gradient scale")
    print(table(title + gpu_name(device), header, rows))


def towers(device: torch.device, tiny: bool) -> None:
    """Zero-shot classification and the layers that CKA reads, beside the CPU."""
    from kdscale.models.taps import load_tower_of
    from kdscale.models.towers import load_tower

    rows: list[tuple[str, ...]] = []
    name = "vit_t16" if tiny else "clip_b16"
    catalog: Any = TRUE_SIZE_CPU.students | TRUE_SIZE_CPU.teachers
    spec = catalog[name].replace(weights="random")
    random = torch.Generator().manual_seed(0)
    shape = (8 if tiny else 64, spec.image_px, spec.image_px, 3)
    pixels = torch.randint(0, 256, shape, generator=random, dtype=torch.uint8)
    tower, model = load_tower_of(spec), load_tower(spec, Storage(".")).eval()
    before = torch.backends.cudnn.allow_tf32
    here = _read(spec, tower, model, pixels)
    tower.model.to(device)
    model.to(device)
    for tf32 in (False, True):
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
        there = _read(spec, tower, model, pixels.to(device))
        worst = [farthest(there[kind], here[kind]) for kind in ("embeddings", "layers", "cka")]
        top1 = f"{there['top1']:.2f} and {here['top1']:.2f}"
        classes = f"{(there['classes'] == here['classes']).float().mean():.1%}"
        rows.append(("TF32" if tf32 else "fp32", *worst, classes, top1))
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before, False
    header = ("arithmetic", "embeddings", "layers", "CKA", "same class", "top-1, %")
    title = f"{name}, {shape[0]} images, {device.type} beside CPU{gpu_name(device)}"
    print(table(title, header, rows))


def farthest(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> str:
    """Returns the largest relative distance of tensors."""
    pairs = zip(found, expected, strict=True)
    return f"{max(float((a - b).norm() / b.norm()) for a, b in pairs):.1e}"


@torch.no_grad()
def _read(spec: Any, tower: Any, model: Any, pixels: torch.Tensor) -> dict[str, Any]:
    """Computes, on one device, what `towers` compares; all but `top1` are tensors on the CPU."""
    from kdscale.analysis.layer_cka import LayerCKA
    from kdscale.eval.zeroshot import classifier, score_classes
    from kdscale.models.towers import normalise, tokenizer

    names = [f"thing number {number}" for number in range(50)]
    classes_CD = classifier(model, tokenizer(spec), names, ("a photo of a {}", "{} alone"))
    image_BD = model.encode_image(normalise(pixels, spec))
    label_N = torch.arange(len(pixels)) % len(names)
    scores = score_classes(image_BD, label_N, classes_CD)
    vectors = {
        f"{tap} {layer}": vector
        for tap in ("patch_mean", "pooled", "vlm")
        for layer, vector in tower.vectors(pixels, tap, "all").items()
    }
    read = list(tower.vectors(pixels, "patch_mean", 4).values())
    result = LayerCKA().update(read, read).result()
    return {
        "embeddings": [normalize(image_BD, dim=-1).cpu(), classes_CD.cpu()],
        "layers": [vector.cpu() for vector in vectors.values()],
        "cka": [torch.from_numpy(result.biased), torch.from_numpy(result.debiased).nan_to_num()],
        "classes": scores.predictions,
        "top1": scores.top1,
    }


PARTS: dict[str, Callable[[torch.device, bool], None]] = {
    "vlm": vlm,
    "deepspeed": deepspeed,
    "distill": distill,
    "towers": towers,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here")
        return
    for name in options.only:
        PARTS[name](torch.device(options.device), options.tiny)


if __name__ == "__main__":
    main()
