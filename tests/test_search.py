"""Searches: what is drawn, suggested, stopped, kept and reported; without Ray's processes."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ray import tune
from ray.tune.schedulers import ASHAScheduler, HyperBandScheduler, PopulationBasedTraining
from ray.tune.search import Searcher
from rich.console import Console
from worlds import small_job, spawn, synthetic

from kdscale import Distill, Search, Sweep, Vlm, choose
from kdscale.cli_request import load_sweep
from kdscale.core.checkpoints import Checkpoints
from kdscale.core.journal import JournalWriter, read_steps
from kdscale.core.lease import Lease
from kdscale.core.scale import MINI
from kdscale.core.stop import (
    ask_attempt_to_stop,
    forget_stop,
    note_stopped,
    stop_asked,
    stopped,
)
from kdscale.core.storage import StageStore, Storage
from kdscale.core.types import ConfigError, StageStopped, UnknownField, UnknownName
from kdscale.stages.loop import World
from kdscale.sweep.chosen import is_left, split, unended
from kdscale.sweep.page import html_page
from kdscale.sweep.plan import Plan, make_plan
from kdscale.sweep.progress import print_plan
from kdscale.sweep.report import build_report
from kdscale.sweep.status import stage_state
from kdscale.sweep.suggest import Suggested

SWEEPS = Path(__file__).parent.parent / "sweeps"
KD = {"task": 1.0, "fd": 4.0, "icl": 1.0, "ckd": 1.0}
SPACE = {"loss.fd": tune.loguniform(1, 100), "lr": tune.loguniform(1e-4, 2e-3)}


def sweep_of(recipe: Any = None, seeds: tuple[int, ...] = (0,), **search: Any) -> Sweep:
    recipe = recipe or Distill(student="vit_t16", teacher="clip_b16", loss=KD)
    given: dict[str, Any] = {"space": SPACE, "num_trials": 4} | search
    return Sweep(name="found", stages=[recipe], seeds=seeds, search=Search(**given), scale="mini")


def plan_of(sweep: Sweep, root: Path, **overrides: Any) -> Plan:
    return make_plan([sweep], Storage(str(root)), MINI, overrides)


def test_a_seed_draws_the_same_trials_and_seeds_cross_them() -> None:
    first, again = (sweep_of(seed=3).trials() for _ in range(2))
    assert [t.recipe for t in first] == [t.recipe for t in again]
    assert [t.recipe for t in first] != [t.recipe for t in sweep_of(seed=4).trials()]
    both = sweep_of(seeds=(0, 1), seed=3).trials()
    assert [t.recipe.seed for t in both] == [0] * 4 + [1] * 4
    assert both[4].recipe.replace(seed=0) == both[0].recipe
    recipe = first[0].recipe
    assert isinstance(recipe, Distill)
    assert isinstance(recipe.loss, dict)
    assert recipe.loss | {"fd": 4.0} == KD
    assert 1 <= recipe.loss["fd"] <= 100


def test_names_tell_rounded_values() -> None:
    space = {"loss.fd": tune.choice([12.3456]), "lr": tune.choice([0.00123456]), "epochs": 3}
    (trial,) = sweep_of(space=space, num_trials=2).trials()
    assert trial.name == "vit_t16 from clip_b16 task+fd+icl+ckd loss.fd=12.3 lr=0.00123"
    assert (trial.chosen["loss.fd"], trial.chosen["lr"]) == (12.3, 0.00123)
    assert isinstance(trial.recipe, Distill)
    assert (trial.recipe.lr, trial.recipe.epochs) == (0.00123456, 3)


def test_grids_functions_and_numbers_of_numpy_are_drawn() -> None:
    space = {
        "teacher": tune.grid_search(["clip_b16", "clip_l14"]),
        "lr": tune.sample_from(lambda: float(np.random.uniform(1e-4, 1e-3))),
        "weight_decay": tune.sample_from(lambda config: config["lr"] * 100),
        "warmup_steps": tune.randint(10, 1000),
        "eps": tune.sample_from(lambda _: random.choice([1e-6, 1e-8])),
    }
    before = np.random.get_state()[1].tolist()  # pyright: ignore
    first, again = (sweep_of(space=space, num_trials=2).trials() for _ in range(2))
    assert np.random.get_state()[1].tolist() == before  # pyright: ignore
    assert len(first) == 4
    assert [t.recipe for t in first] == [t.recipe for t in again]
    assert {t.chosen["teacher"] for t in first} == {"clip_b16", "clip_l14"}
    for trial in first:
        assert isinstance(trial.recipe, Distill)
        assert trial.recipe.weight_decay == pytest.approx(100 * trial.recipe.lr)
        json.dumps([trial.recipe.warmup_steps, trial.recipe.lr, trial.recipe.eps])


def test_dotted_fields_reach_into_a_vlm_and_its_student() -> None:
    vlm = Vlm(vision=Distill(student="vit_t16", teacher="clip_b16"), finetune={"epochs": 2})
    space = {"finetune.lr": tune.choice([1e-5]), "loss.fd": tune.choice([7.0]), "lr": 1e-3}
    (trial,) = sweep_of(vlm, space=space).trials()
    assert isinstance(trial.recipe, Vlm)
    assert trial.recipe.finetune == {"epochs": 2, "lr": 1e-5}
    assert isinstance(trial.recipe.vision, Distill)
    assert trial.recipe.vision.loss == {"task": 1.0, "fd": 7.0, "icl": 1.0, "ckd": 1.0}
    assert trial.recipe.vision.lr == 1e-3


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("lrr", "recipe field 'lrr'"),
        ("loss.fdd", "loss term 'fdd'"),
        ("lr.x", "'lr' has no parts"),
        ("seed", "Sweep.seeds"),
        ("run.num_workers", "changes no number"),
        ("finetune.lr", "finetune.lr"),
    ],
)
def test_fields_that_cannot_be_searched_are_named(field: str, message: str) -> None:
    with pytest.raises((UnknownField, UnknownName, ConfigError), match=message):
        sweep_of(space={field: tune.uniform(0, 1)}).trials()
    vlm = Vlm(vision="clip_b16")
    with pytest.raises(UnknownField, match="finetune field 'lrr'"):
        sweep_of(vlm, space={"finetune.lrr": tune.uniform(0, 1)}).trials()


def test_what_a_search_cannot_do_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the sweep searches it"):
        plan_of(sweep_of(), tmp_path, lr=1e-3)
    with pytest.raises(ConfigError, match="PopulationBasedTraining changes trials"):
        sweep_of(scheduler=PopulationBasedTraining(hyperparam_mutations={"lr": [1, 2]}))
    with pytest.raises(ConfigError, match="HyperBandScheduler pauses trials"):
        sweep_of(scheduler=HyperBandScheduler())
    long = Distill(student="vit_t16", teacher="clip_b16", loss=KD, epochs=256)
    with pytest.raises(ConfigError, match="max_t=512"):
        plan_of(sweep_of(long, scheduler=ASHAScheduler(time_attr="step")), tmp_path)
    blind = Distill(student="vit_t16", teacher="clip_b16", loss=KD, zero_shot=None)
    with pytest.raises(ConfigError, match="needs a recipe with zero_shot"):
        plan_of(sweep_of(blind), tmp_path)
    two = Distill(student="vit_t16", teacher=choose("clip_b16", "clip_l14"), loss=KD)
    with pytest.raises(ConfigError, match="2 recipes times seeds"):
        plan_of(sweep_of(two, searcher=Climber()), tmp_path)


@pytest.mark.parametrize("scale", ["mini", "paper"])
def test_the_sweep_of_loss_weights_is_planned_whole(scale: str, tmp_path: Path) -> None:
    from kdscale.core.scale import scale_named

    sweep = load_sweep(SWEEPS / "loss_weights.py")
    plan = make_plan([sweep], Storage(str(tmp_path)), scale_named(scale), {})
    distilled = [stage for stage in plan.stages.values() if stage.kind == "distill"]
    assert (len(plan.trials), len(distilled)) == (12, 12)


class Climber(Searcher):
    """Steps up from the best point that it knows."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[str, float] = {}
        self.results: list[tuple[float, float]] = []

    def set_search_properties(self, metric: Any, mode: Any, config: Any, **_: Any) -> bool:
        self._metric = metric
        return True

    def suggest(self, trial_id: str) -> dict[str, Any]:
        best = max(self.results, default=(0.0, 1e-4))
        self.known[trial_id] = round(best[1] + 1e-4, 6)
        return {"lr": self.known[trial_id]}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        if result:
            self.results.append((result[self._metric], self.known[trial_id]))


class Pointed(Climber):
    """The same, but it can be told of points that it has not suggested."""

    def add_evaluated_point(self, parameters: Any, value: float, *_: Any, **__: Any) -> None:
        self.results.append((value, parameters["lr"]))


def climb(sweep: Sweep, root: Path, results: list[float | None]) -> list[float]:
    """Runs a search whose trials end with these results; None leaves one unfinished."""
    plan, search = plan_of(sweep, root), sweep.search
    assert search is not None
    chosen = plan.searches[sweep.name]
    suggested = Suggested(search.searcher, search, chosen, lambda config: config)
    found: list[float] = []
    for number, value in enumerate(results):
        name = f"tune {number}"
        found.append(suggested.suggest(name)["work"]["lr"])
        if value is not None:
            suggested.on_trial_complete(name, {"zero_shot_top1": value})
    return found


@pytest.mark.parametrize("kind", [Climber, Pointed])
def test_a_search_goes_on_where_it_was_left(kind: type[Climber], tmp_path: Path) -> None:
    def sweep() -> Sweep:
        return sweep_of(space={"lr": tune.uniform(0, 1)}, searcher=kind())

    assert climb(sweep(), tmp_path, [10.0, 20.0, None]) == [2e-4, 3e-4, 4e-4]
    plan = plan_of(sweep(), tmp_path)
    assert [trial.chosen["lr"] for trial in (t.trial for t in plan.trials)] == [2e-4, 3e-4, 4e-4]
    assert plan.document()["to_choose"] == {"found": 1}
    assert "found: 3 chosen so far, + 1 to be chosen while running" in printed(plan)
    assert is_left(plan, [sweep()], False)
    # The unfinished one comes first; then the searcher goes on from what it was told.
    assert climb(sweep(), tmp_path, [30.0, 5.0]) == [4e-4, 5e-4]
    chosen = plan_of(sweep(), tmp_path).searches["found"]
    assert (chosen.num_left, chosen.unfinished) == (0, [])
    assert Suggested(kind(), sweep().search, chosen, dict).suggest("x") == Searcher.FINISHED  # type: ignore[arg-type]


def test_a_searcher_that_does_not_repeat_itself_is_named(tmp_path: Path) -> None:
    sweep = sweep_of(space={"lr": tune.uniform(0, 1)}, searcher=Climber())
    climb(sweep, tmp_path, [10.0])
    other = Climber()
    other.results.append((5.0, 0.5))
    with pytest.raises(ConfigError, match="does not suggest again"):
        climb(replace(sweep, search=replace(sweep.search, searcher=other)), tmp_path, [1.0])  # type: ignore[type-var]
    strange = sweep_of(space={"eps": tune.uniform(0, 1)}, searcher=Climber())
    with pytest.raises(ConfigError, match="suggests 'lr', which is not in the space"):
        climb(strange, tmp_path / "strange", [1.0])


def printed(plan: Plan) -> str:
    console = Console(file=io.StringIO(), width=200)
    print_plan(plan, console)
    return console.file.getvalue()  # pyright: ignore


def test_an_asked_stage_ends_after_its_checkpoint_and_resumes_to_the_same_end(
    tmp_path: Path,
) -> None:
    from kdscale.stages.run import Run

    def run(root: str, asked_at: int | None = None) -> StageStore:
        job = replace(small_job(root, total_steps=6), lease="me")

        def batches(start: int) -> Iterator[Any]:
            for batch in synthetic(job, World())(start):
                if batch.step == asked_at:  # which is waited for after that step
                    ask_attempt_to_stop(job.stage, "enough", "me")
                yield batch

        job.stage.storage.write_json({"token": "me"}, *job.stage.parts, "LEASE-1")
        Run(job, World(), lambda _: None).train(batches)
        return job.stage

    torch.set_num_threads(1)
    whole = run(str(tmp_path / "whole"))
    with pytest.raises(StageStopped, match="stopped early at step 3: enough"):
        run(str(tmp_path / "part"), asked_at=3)
    stage = small_job(str(tmp_path / "part")).stage
    assert (stopped(stage) or {})["step"] == 3
    assert not stage.is_done()
    assert Checkpoints(stage, 2).latest_step() == 3
    forget_stop(stage)
    run(str(tmp_path / "part"))
    assert stopped(stage) is None
    losses = [[line["total"] for line in read_steps(found)] for found in (whole, stage)]
    assert losses[0] == losses[1]


def _stops(world: World, root: str) -> None:
    from kdscale.stages.run import Run

    job = replace(small_job(root, total_steps=6), lease="me")
    with pytest.raises(StageStopped):
        Run(job, world, lambda _: None).train(synthetic(job, world))


def test_all_workers_end_together(tmp_path: Path) -> None:
    stage = small_job(str(tmp_path)).stage
    stage.storage.write_json({"token": "me"}, *stage.parts, "LEASE-1")
    ask_attempt_to_stop(stage, "enough", "me")
    spawn(_stops, 2, str(tmp_path))
    assert (stopped(stage) or {})["step"] == 1


def test_only_the_attempt_that_is_meant_is_asked(tmp_path: Path) -> None:
    stage = StageStore(Storage(str(tmp_path)), "distill", "k")
    assert not ask_attempt_to_stop(stage, "nobody is at it")
    lease = Lease.acquire(stage)
    assert lease is not None
    with lease:
        assert ask_attempt_to_stop(stage, "enough")
        assert stop_asked(stage, lease.token) == "enough"
        assert stop_asked(stage, "another") is None


def stop_one(plan: Plan) -> tuple[StageStore, StageStore]:
    """Finishes one trial of a plan in storage, and stops another."""
    stores = [plan.stages[trial.key].store(plan.storage) for trial in plan.trials[:2]]
    for store, value in zip(stores, (40.0, 20.0), strict=True):
        journal = JournalWriter(store, 1)
        journal.append({"step": 32, "total": 1.0, "zero_shot_top1": value, "samples_per_s": 1.0,
                        "data_wait": 0.0})  # fmt: skip
    stores[0].finish({})
    note_stopped(stores[1], 32, "AsyncHyperBandScheduler at step 32, zero_shot_top1 20")
    return stores[0], stores[1]


def test_stopped_trials_are_told_as_such_and_not_run_again(tmp_path: Path) -> None:
    scheduler = ASHAScheduler(time_attr="progress", grace_period=12.5)
    sweep = sweep_of(num_trials=2, scheduler=scheduler)
    stop_one(plan_of(sweep, tmp_path))
    plan = plan_of(sweep, tmp_path)
    key = plan.trials[1].key
    state, detail = stage_state(plan.stages[key], plan.storage)
    assert (state, "at step 32, top-1 20.0 %" in detail) == ("stopped early", True)
    assert unended(plan, "found") == []
    assert not is_left(plan, [sweep], resume_stopped=False)
    assert is_left(plan, [sweep], resume_stopped=True)
    alone, _ = split(plan, [sweep], resume_stopped=True)
    assert [trial.key for trial in alone.trials] == [key]
    report = build_report(plan, [sweep])
    (table,) = report.searches
    assert [row.state for row in table.rows] == ["done", "stopped early at step 32"]
    assert [row.value for row in table.rows] == [40.0, 20.0]
    assert table.best is table.rows[0]
    assert report.trials[1].score is None
    assert "stopped early" in report.message()
    assert json.dumps(report.document())
    page = html_page(replace(report, trials=report.trials), plan.storage)
    assert "What the search found" in page
    assert "best of the finished: loss.fd=" in page
    assert 'id="found-search' in page or "<svg" in page


def test_a_plain_sweep_takes_up_what_a_search_stopped(tmp_path: Path) -> None:
    scheduler = ASHAScheduler(time_attr="progress", grace_period=12.5)
    searching = sweep_of(num_trials=2, scheduler=scheduler)
    stop_one(plan_of(searching, tmp_path))
    recipe = searching.trials()[1].recipe
    plain = Sweep(name="plain", stages=[recipe], scale="mini")
    plan = plan_of(plain, tmp_path)
    assert is_left(plan, [plain], resume_stopped=False)
    assert split(plan, [plain], False)[1] == []


def test_a_scheduler_asks_and_does_not_kill(tmp_path: Path) -> None:
    from kdscale.sweep.steer import Graceful, Work

    sweep = sweep_of(num_trials=3, scheduler=ASHAScheduler(time_attr="step", max_t=256,
                     grace_period=32, reduction_factor=2))  # fmt: skip
    plan, search = plan_of(sweep, tmp_path), sweep.search
    assert search is not None
    works = [Work.of(plan, trial, search) for trial in plan.trials]
    graceful = Graceful(search.scheduler, works, search)
    trials = [SimpleNamespace(trial_id=str(n), config={"trial": {"number": n}}) for n in range(3)]
    for trial, value in zip(trials, (30.0, 10.0, 20.0), strict=True):
        graceful.on_trial_add(None, trial)
        result = {"step": 32, "progress": 12.5, "zero_shot_top1": value, "lease": "t"}
        assert graceful.on_trial_result(None, trial, result) == "CONTINUE"
    stores = [work.followed.store(plan.storage) for work in works]
    asked = [plan.storage.exists(*store.parts, "STOP-t") for store in stores]
    assert asked == [False, True, False] or asked == [False, True, True]


def test_a_trial_reports_its_evaluations_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray.tune

    from kdscale.sweep.steer import Reporter, Work

    sweep = sweep_of(num_trials=1, scheduler=ASHAScheduler(time_attr="progress"))
    plan, search = plan_of(sweep, tmp_path), sweep.search
    assert search is not None
    work = Work.of(plan, plan.trials[0], search)
    found: list[dict[str, Any]] = []
    monkeypatch.setattr(ray.tune, "report", found.append)
    lease = Lease.acquire(work.followed.store(work.storage))
    assert lease is not None
    lines = [{"step": step, "total": 1.0, "ids": "x"} for step in (31, 32, 33, 32, 64)]
    for line in lines:
        if line["step"] % 32 == 0:
            line["zero_shot_top1"] = float(line["step"])
    with lease, Reporter(work):
        journal = JournalWriter(work.followed.store(work.storage), 1)
        for line in lines:
            journal.append(line)
    assert [(r["step"], r["progress"], r["zero_shot_top1"]) for r in found] == [
        (32, 50.0, 32.0),
        (64, 100.0, 64.0),
    ]
    assert {result["lease"] for result in found} == {lease.token}
    assert work.last()["zero_shot_top1"] == 64.0
