"""The smallest sweep that has everything: a cached teacher, students, zero-shot scores, CKA."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _common import make_shards

from kdscale import DataSpec, Distill, Execution, Pivot, Sweep, TowerSpec, ZeroShotSpec
from kdscale.core.scale import Scale, scale_named
from kdscale.core.storage import Storage
from kdscale.sweep.plan import Plan, make_plan

CLASSES = tuple("abcdefghij")
BATCH, SAMPLES = 4, 12
ALONE = Execution(
    num_workers=0, cpus_per_worker=1, threads_per_worker=1, checkpoint_every=4, log_every=1
)


def vit(dim: int) -> TowerSpec:
    """Returns a tower of some ten thousand weights besides its tokens'."""
    text = {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1}
    vision = {"image_size": 32, "layers": 1, "width": 16, "head_width": 16, "patch_size": 16}
    return TowerSpec(
        name=f"vit {dim}",
        image_px=32,
        context_length=8,
        embed_dim=dim,
        width=16,
        patch_px=16,
        clip_config={"embed_dim": dim, "vision_cfg": vision, "text_cfg": text},
    )


def tiny_sweep(name: str, seeds: Sequence[int], **settings: Any) -> Sweep:
    """Returns a sweep of one student a seed: `SAMPLES // BATCH` steps each."""
    data = DataSpec(name="pairs")
    classes = ZeroShotSpec(name="pairs", data=data, classnames=CLASSES, templates=("a {}",))
    fields = {
        "teacher": vit(12),
        "loss": "mse",
        "teacher_outputs": "cached",
        "views": 1,
        "run": ALONE,
    }
    sizes = {"global_batch_size": BATCH, "bn_group": BATCH, "epochs": 1, "warmup_steps": 1}
    student = Distill(
        student=vit(8),
        data=data,
        zero_shot=classes,
        precision="fp32",
        **(fields | sizes | settings),  # pyright: ignore[reportArgumentType]
    )
    table = Pivot(rows="student", columns="loss")
    return Sweep(name=name, stages=[student], seeds=tuple(seeds), table=table)


def tiny_scale(scratch: Path) -> Scale:
    """Returns the scale that has the sweep's data, written once."""
    pattern = make_shards(scratch, 1, SAMPLES, px=48)
    return scale_named("true_size_cpu").replace(data_paths={"pairs": pattern}, gates=False)


def tiny_plan(sweep: Sweep, root: str, scale: Scale) -> Plan:
    """Plans a tiny sweep in a storage."""
    return make_plan([sweep], Storage(root), scale, {})
