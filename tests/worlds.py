"""Small recipes, synthetic batches and process groups that several tests use."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from kdscale.core.config import Distill, Execution, TowerSpec
from kdscale.data.samples import Batch
from kdscale.data.shards import Manifest
from kdscale.stages.jobs import DistillJob
from kdscale.stages.loop import World

PX, TOKENS, VOCAB = 32, 8, 600
TEXT = {"context_length": TOKENS, "vocab_size": VOCAB, "width": 32, "heads": 2, "layers": 1}


def vit(embed_dim: int = 16, width: int = 32, name: str = "vit") -> TowerSpec:
    """Returns a ViT pair that trains in milliseconds."""
    vision = {"image_size": PX, "layers": 2, "width": width, "head_width": 16, "patch_size": 8}
    return _spec(name, embed_dim, vision, width=width, patch_px=8)


def timm_tower(model: str, width: int, embed_dim: int = 16) -> TowerSpec:
    """Returns a pair whose image tower is a timm model."""
    vision = {
        "image_size": PX,
        "timm_model_name": model,
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "linear",
    }
    return _spec(model, embed_dim, vision, width=width)


def _spec(name: str, embed_dim: int, vision: dict[str, Any], **fields: Any) -> TowerSpec:
    config = {"embed_dim": embed_dim, "vision_cfg": vision, "text_cfg": TEXT}
    return TowerSpec(
        name=name,
        clip_config=config,
        image_px=PX,
        context_length=TOKENS,
        embed_dim=embed_dim,
        **fields,
    )


def small_job(root: str, *, total_steps: int = 3, **fields: Any) -> DistillJob:
    """Returns a job on synthetic batches of 8 samples."""
    run = fields.pop("run", Execution(checkpoint_every=2, log_every=1))
    defaults: dict[str, Any] = {
        "student": vit(),
        "teacher": vit(24, name="wide teacher"),
        "global_batch_size": 8,
        "bn_group": 4,
        "warmup_steps": 1,
        "lr": 1e-3,
        "precision": "fp32",
        "zero_shot": None,
        "run": run,
    }
    recipe = Distill(**(defaults | fields))
    return DistillJob(
        kind="distill",
        key="0" * 16,
        storage_root=root,
        recipe=recipe,
        total_steps=total_steps,
        data=Manifest(shards=()),
        zero_shot_data=None,
        record={},
    )


def synthetic(job: DistillJob, world: World) -> Callable[[int], Iterator[Batch]]:
    """Returns a worker's batches as a pure function of the step."""
    size = job.recipe.global_batch_size

    def batches(start: int) -> Iterator[Batch]:
        for step in range(start, job.total_steps):
            random = np.random.default_rng(step)
            images = random.integers(0, 255, (size, PX, PX, 3), dtype=np.uint8)
            tokens = random.integers(1, VOCAB, (size, TOKENS))
            rows = np.arange(step * size, (step + 1) * size)
            share = size // world.size
            own = slice(world.rank * share, (world.rank + 1) * share)
            yield Batch(
                step=step,
                epoch=step // 4,
                rows=rows[own],
                keys=[f"{row:06d}" for row in rows[own]],
                images={PX: torch.from_numpy(images[own])},
                tokens={f"clip_bpe:{TOKENS}": torch.from_numpy(tokens[own])},
            )

    return batches


def spawn(function: Callable[..., None], world_size: int, *args: Any) -> None:
    """Runs `function(world, *args)` in a gloo group of processes.

    They come from a server that has imported the slow libraries once.
    """
    if world_size == 1:
        function(World(), *args)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.set_forkserver_preload(["kdscale.stages.run"])
    start = {"nprocs": world_size, "start_method": "forkserver"}
    mp.start_processes(_enter, (world_size, port, function, args), **start)  # pyright: ignore


def _enter(
    rank: int, size: int, port: int, function: Callable[..., None], args: tuple[Any, ...]
) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    try:
        function(World(rank=rank, size=size), *args)
    finally:
        dist.destroy_process_group()
