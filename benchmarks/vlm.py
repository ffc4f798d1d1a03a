"""Speed and memory of the VLM stages beside a plain transformers Trainer.

The same model, batches and optimizer: once through the stage function under Ray (Ray Data stream,
one Ray Train worker), once by a bare `transformers.Trainer` in a process of its own on batches
already in memory. Both report attended tokens a second over the later half of the steps.

    python benchmarks/vlm.py [--steps 24] [--recipe tinyllava]
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from typing import Any

from _common import table

from kdscale.core.config import DataSpec, Execution, MiniWorld
from kdscale.core.journal import read_steps
from kdscale.core.scale import MINI, language_model
from kdscale.core.storage import Storage
from kdscale.core.vlm_config import Finetune, Pretrain
from kdscale.core.vlm_recipes import VLM_RECIPES
from kdscale.stages.inputs import find_source
from kdscale.stages.jobs import VlmJob
from kdscale.stages.streams import instruct_config, vlm_inputs

BATCH = 16
LAYERS, HIDDEN = 8, 384
STAGES = ("pretrain", "finetune")


def job(kind: str, recipe: str, steps: int, root: str) -> VlmJob:
    """Returns a stage of a VLM with a language model of some 15 million parameters."""
    small = language_model("qwen2_0_5b", MINI.replace(random_weights=True))
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 3 * HIDDEN, "num_hidden_layers": LAYERS}
    llm = small.replace(config={**(small.config or {}), **sizes}, hidden=HIDDEN)
    content = "pretrain" if kind == "pretrain" else "instruct"
    world = MiniWorld(content=content, num_samples=BATCH * steps, samples_per_shard=128, seed=5)
    settings = VLM_RECIPES[recipe][STAGES.index(kind)] | {
        "vision": MINI.students["vit_t16"],
        "llm": llm,
        "data": DataSpec(name=content, mini=world),
        "precision": "fp32",
        "global_batch_size": BATCH,
        "micro_batch_size": BATCH,
        "group_size": BATCH,
        "max_length": 512,
        "run": Execution(
            num_workers=1, cpus_per_worker=0.5, threads_per_worker=1, checkpoint_every=10**6
        ),
    }
    stage = (Pretrain if kind == "pretrain" else Finetune)(**settings)
    data = find_source(stage.data, Storage(root), content="conversations").manifest()  # pyright: ignore
    inputs = vlm_inputs(stage)
    return VlmJob(kind, f"{STAGES.index(kind):016x}", root, stage, steps, data, inputs, {})


def plain(kind: str, recipe: str, steps: int, root: str) -> dict[str, float]:
    """Trains in this process on batches in memory; returns tokens/s and peak memory in MiB."""
    import torch
    from torch.utils.data import DataLoader
    from transformers import Trainer, TrainerCallback

    from kdscale.data.instruct_stream import InstructStream
    from kdscale.models.vlm import normalise_pixels, parameter_groups
    from kdscale.stages.loop import World
    from kdscale.stages.vlm import MicroBatches, build, training_arguments
    from kdscale.stages.vlm_run import pixel_shape

    torch.set_num_threads(1)
    own = job(kind, recipe, steps, root)
    built = build(own, torch.device("cpu"))
    micro = MicroBatches(own, World(), built.processor, pixel_shape(own))
    micro.num_image_tokens = built.model.config.image_seq_length
    config = replace(instruct_config(own), own_steps=steps)
    micro.source = iter(InstructStream(None, config, 0))
    batches = list(micro)
    for batch in batches:
        del batch["draw"]
        batch["pixel_values"] = normalise_pixels(batch["pixel_values"], own.recipe.vision)  # pyright: ignore
    ended: list[float] = []

    class Clock(TrainerCallback):
        """Notes when steps end."""

        def on_step_end(self, *_: Any, **__: Any) -> None:
            ended.append(time.perf_counter())

    class Plain(Trainer):
        """Takes the batches as they are."""

        def get_train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(batches, batch_size=None)  # pyright: ignore[reportArgumentType]

    with tempfile.TemporaryDirectory() as scratch:
        optimizer = torch.optim.AdamW(parameter_groups(built.model, own.recipe), lr=own.recipe.lr)
        arguments = training_arguments(own, World(), scratch)
        trainer = Plain(
            model=built.model,
            args=arguments,
            train_dataset=batches,  # pyright: ignore[reportArgumentType]
            optimizers=(optimizer, None),
            callbacks=[Clock()],
        )
        trainer.train()
    tokens = [int(batch["attention_mask"].sum()) for batch in batches]
    speeds = [tokens[i] / (ended[i] - ended[i - 1]) for i in range(steps // 2, steps)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"tokens_per_s": statistics.median(speeds), "peak_mib": peak}


def under_ray(kind: str, recipe: str, steps: int, root: str) -> dict[str, float]:
    """Runs the stage on a Ray Train worker."""
    from kdscale.stages.worker import fit
    from kdscale.sweep.schedule import start_ray

    start_ray()
    own = job(kind, recipe, steps, root)
    fit([own])
    lines = read_steps(own.stage)[steps // 2 :]
    return {
        "tokens_per_s": statistics.median(line["tokens_per_s"] for line in lines),
        "data_wait": statistics.mean(line["data_wait"] for line in lines),
        "peak_mib": max(line["peak_mib"] for line in lines),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--recipe", default="tinyllava")
    parser.add_argument("--plain", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--root", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plain:
        print(json.dumps(plain(options.plain, options.recipe, options.steps, options.root)))
        return
    rows: list[tuple[str, ...]] = []
    with tempfile.TemporaryDirectory() as root:
        for kind in STAGES:
            command = [sys.executable, __file__, "--plain", kind, "--root", f"{root}/plain"]
            command += ["--steps", str(options.steps), "--recipe", options.recipe]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            bare = json.loads(done.stdout.splitlines()[-1])
            own = under_ray(kind, options.recipe, options.steps, f"{root}/ray")
            speed = f"{bare['tokens_per_s']:,.0f}"
            rows.append((f"{kind}, plain Trainer", speed, "", "", f"{bare['peak_mib']:,.0f}"))
            rows.append(
                (
                    f"{kind}, kdscale under Ray",
                    f"{own['tokens_per_s']:,.0f}",
                    f"{own['tokens_per_s'] / bare['tokens_per_s']:.1%}",
                    f"{own['data_wait']:.1%}",
                    f"{own['peak_mib']:,.0f}",
                )
            )
    header = ("stage", "tokens/s", "of plain", "data_wait", "peak memory, MiB")
    print(table(f"VLM stages, {options.recipe}, batch {BATCH}, fp32", header, rows))


if __name__ == "__main__":
    main()
