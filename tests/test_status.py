"""How far a sweep is, from what its stages have written."""

from __future__ import annotations

import io
import time
from dataclasses import replace

import pytest
from rich.console import Console
from studies import NUM_IMAGES, Study, answers, finish, make_sweep

from kdscale.core.config import Execution
from kdscale.core.journal import JournalWriter
from kdscale.core.lease import Lease
from kdscale.sweep.status import duration, look, print_status, summary


@pytest.fixture
def study(tmp_path):
    """Teachers and one student finished, one under way, one failed; two not begun."""
    study = Study(tmp_path, [make_sweep()])
    for name in ("base", "siglip"):
        finish(study.teacher(name), study.storage, answers(NUM_IMAGES))
    finish(study.stage("clip_b16", "mse"), study.storage, answers(20))
    journal = JournalWriter(study.stage("clip_b16", "clip_kd").store(study.storage), 1)
    for step in (1, 2):
        line = {"step": step, "total": 2.0, "samples_per_s": 500.0, "data_wait": 0.25}
        journal.append(line)
    study.stage(None, "clip").store(study.storage).fail("ConfigError: no", final=True)
    return study


def shown(status, **options):
    """What the terminal shows."""
    console = Console(width=150, file=io.StringIO())
    print_status(status, console, **options)
    return console.file.getvalue()


def test_states_are_counted_and_what_needs_a_look_is_listed(study):
    status = look(study.plan)
    counts = {state: status.count(state) for state in ("done", "interrupted", "failed", "waiting")}
    assert counts == {"done": 3, "interrupted": 1, "failed": 1, "waiting": 2}
    text = shown(status)
    assert "ConfigError: no" in text
    assert "vit_t16 from clip_b16 clip_kd" in text
    assert "vit_t16 from clip_b16 mse" not in text
    assert "vit_t16 from clip_b16 mse" in shown(status, every_stage=True)
    assert summary(status) == "3 of 7 stages done; nothing runs"
    assert status.left_s is None


def test_what_runs_has_a_speed_and_an_end(study):
    store = study.stage("clip_b16", "clip_kd").store(study.storage)
    lease = Lease.acquire(store)
    assert lease is not None
    with lease:
        status = look(study.plan)
    assert (status.at_once, status.samples_per_s) == (1, 500.0)
    assert "1 running at 500 samples/s together, data wait up to 25 %" in summary(status)
    document = status.document()
    (running,) = (one for one in document["unfinished"] if one["state"] == "running")
    assert running["data_wait"] == 0.25
    assert document["gpu_hours"] == 0.0


def test_work_and_time_of_finished_stages_tell_what_is_left(study, monkeypatch):
    flops = {stage.key: 1e9 for stage in study.plan.stages.values()}
    monkeypatch.setattr(study.plan, "stages", {
        key: _with_work(stage, flops[key]) for key, stage in study.plan.stages.items()
    })  # fmt: skip
    left = {each.stage.key: each.left_s for each in look(study.plan).stages}
    assert left[study.stage("siglip_so400m", "mse").key] == pytest.approx(75.0)
    assert left[study.stage("clip_b16", "mse").key] == 0.0


def _with_work(stage, flops):
    """A stage of known work that trains on a GPU."""
    run = Execution(num_workers=2, gpus_per_worker=1)
    return replace(stage, flops=flops, recipe=stage.recipe.replace(run=run))


def test_what_was_used_has_a_price(study, monkeypatch):
    stages = {key: _with_work(stage, 1e9) for key, stage in study.plan.stages.items()}
    monkeypatch.setattr(study.plan, "stages", stages)
    status = look(study.plan)
    assert status.gpu_hours == pytest.approx(3 * 75.0 * 2 / 3600, rel=0.01)
    assert "GPU-hours used (" in summary(status)


def test_attempts_are_summed_and_not_the_time_between_them(study):
    stage = study.stage("siglip_so400m", "mse")
    for _ in range(2):
        journal = JournalWriter(stage.store(study.storage), 1)
        for step in (1, 2):
            journal.append({"step": step, "shards": 2, "samples_per_s": 1.0})
        time.sleep(0.3)
    status = next(each for each in look(study.plan).stages if each.stage.key == stage.key)
    assert status.seconds < 0.3


def test_durations_have_two_units():
    assert [duration(s) for s in (42.4, 100, 7290)] == ["42 s", "1 min 40 s", "2 h 1 min"]
