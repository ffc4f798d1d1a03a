"""Searches on Ray: a scheduler stops trials, a searcher chooses them; a second run runs nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from test_search import Climber

from kdscale import DataSpec, Distill, Execution, Search, Sweep, TowerSpec, ZeroShotSpec
from kdscale.core.lease import Lease
from kdscale.core.scale import TRUE_SIZE_CPU
from kdscale.core.stop import stopped
from kdscale.core.storage import Storage
from kdscale.sweep.chosen import is_left
from kdscale.sweep.plan import Plan, make_plan
from kdscale.sweep.report import build_report

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
STEPS = 48
# All but the first learn nothing.
RATES = [3e-3, 1e-8, 2e-8, 3e-8]


def vit(dim: int) -> TowerSpec:
    """Returns a pair that trains in milliseconds on CLIP's own tokens."""
    text = {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    config = {"embed_dim": dim, "vision_cfg": vision, "text_cfg": text}
    sizes: dict[str, Any] = {"image_px": 32, "context_length": 8, "width": 32, "patch_px": 8}
    return TowerSpec(name=f"vit {dim}", clip_config=config, embed_dim=dim, **sizes)


def sweep_of(shards: str, workers: int, steps: int, **search: Any) -> Sweep:
    data = DataSpec(name="pairs", urls=shards)
    names = tuple("abcdefghij")
    distill = Distill(
        student=vit(16),
        teacher=vit(24),
        loss="clip_kd",
        data=data,
        zero_shot=ZeroShotSpec(name="pairs", data=data, classnames=names, templates=("a {}",)),
        global_batch_size=4,
        bn_group=4,
        epochs=8,
        max_steps=steps,
        warmup_steps=1,
        precision="fp32",
        run=Execution(num_workers=workers, cpus_per_worker=0.5, checkpoint_every=8, log_every=1),
    )
    found = Search(metric="total", mode="min", **search)
    return Sweep(name="rates", stages=[distill], search=found, scale="true_size_cpu")


def run(sweep: Sweep, storage: Storage) -> Plan:
    from kdscale.sweep.prepare import prepare
    from kdscale.sweep.steer import run_search

    plan = make_plan([sweep], storage, TRUE_SIZE_CPU, {})
    prepare(plan, lambda _: None)
    assert run_search(plan, sweep, lambda _: None, lambda: False) == []
    return make_plan([sweep], storage, TRUE_SIZE_CPU, {})


def held(plan: Plan) -> list[str]:
    stores = [stage.store(plan.storage) for stage in plan.stages.values()]
    return [store.key for store in stores if Lease.is_left(store)]


def test_a_scheduler_stops_what_learns_nothing(
    ray_cluster: Any, shards: str, tmp_path: Path
) -> None:
    asha = ASHAScheduler(time_attr="step", max_t=STEPS, grace_period=8, reduction_factor=2)
    space = {"lr": tune.grid_search(RATES)}
    sweep = sweep_of(shards, 0, STEPS, space=space, num_trials=1, scheduler=asha)
    plan = run(sweep, Storage(str(tmp_path)))
    stores = [plan.stages[trial.key].store(plan.storage) for trial in plan.trials]
    assert stores[0].is_done()
    notes = [note for store in stores[1:] if (note := stopped(store)) is not None]
    assert notes
    assert all(8 <= note["step"] < STEPS for note in notes)
    assert all("AsyncHyperBandScheduler at step" in note["reason"] for note in notes)
    assert held(plan) == []
    assert not is_left(plan, [sweep], resume_stopped=False)
    (table,) = build_report(plan, [sweep]).searches
    assert table.best is not None
    assert table.best.config == {"lr": RATES[0]}
    assert all(row.value is not None for row in table.rows)


def test_a_searcher_chooses_while_running(ray_cluster: Any, shards: str, tmp_path: Path) -> None:
    space = {"lr": tune.loguniform(1e-4, 1e-2)}
    sweep = sweep_of(shards, 0, 8, space=space, num_trials=2, searcher=Climber())
    plan = run(sweep, Storage(str(tmp_path)))
    assert len(plan.trials) == 2
    assert all(plan.stages[trial.key].reused for trial in plan.trials)
    assert plan.trials[0].trial.chosen["lr"] == 2e-4
    assert (plan.searches["rates"].num_left, plan.searches["rates"].unfinished) == (0, [])
    assert not is_left(plan, [sweep], resume_stopped=False)
