"""Garbage of a storage: what no sweep needs, and what killed processes have left."""

from __future__ import annotations

import os
import time

import pytest
from studies import Study, answers, finish, make_sweep, recipe, write_journal

from kdscale.core.lease import Lease
from kdscale.sweep.gc import DAY_S, find_garbage, remove
from kdscale.sweep.grid import choose
from kdscale.sweep.plan import make_plan


@pytest.fixture
def study(tmp_path):
    """Two teachers by two losses, and a control; all finished but one, which was begun."""
    study = Study(tmp_path, [make_sweep()])
    for stage in study.plan.stages.values():
        finish(stage, study.storage, answers(20))
    begun = study.stage("siglip_so400m", "mse").store(study.storage)
    study.storage.remove(*begun.parts)
    write_journal(study.stage("siglip_so400m", "mse"), study.storage, 2)
    return study


def narrower(study):
    """The plan of a sweep that needs the first teacher's students alone."""
    taught = recipe(teacher="clip_b16", loss=choose("clip_kd", "mse"))
    sweep = make_sweep(stages=[taught], baseline=None)
    return make_plan([sweep], study.storage, study.scale, {})


def age(study, days):
    """Makes all files so old."""
    then = time.time() - days * DAY_S
    for folder, _, names in os.walk(study.storage.root):
        for name in names:
            os.utime(os.path.join(folder, name), (then, then))


def keys(garbage):
    """What is garbage, and why."""
    return {one.store.key: one.why for one in garbage}


def test_what_the_sweeps_need_stays(study):
    age(study, 10)
    assert find_garbage(study.plan, older_than_s=7 * DAY_S) == []
    plan = narrower(study)
    found = find_garbage(plan, older_than_s=7 * DAY_S)
    unneeded = set(study.plan.stages) - set(plan.stages)
    assert set(keys(found)) == unneeded
    assert keys(found)[study.stage("siglip_so400m", "mse").key] == "never finished"
    assert keys(found)[study.stage(None, "clip").key] == "no sweep needs it"
    assert all(one.size > 0 and one.age_s > 9 * DAY_S for one in found)
    assert len(remove(found)) == len(unneeded)
    assert find_garbage(plan, older_than_s=0) == []
    assert all(stage.store(study.storage).is_done() for stage in plan.stages.values())
    gone = study.stage(None, "clip").store(study.storage)
    assert not study.storage.exists(*gone.parts)


def test_young_stages_and_those_that_are_being_written_stay(study):
    plan = narrower(study)
    assert find_garbage(plan, older_than_s=DAY_S) == []
    store = study.stage(None, "clip").store(study.storage)
    lease = Lease.acquire(store)
    assert lease is not None
    with lease:
        found = find_garbage(plan, older_than_s=0)
        assert store.key not in keys(found)
    assert store.key in keys(find_garbage(plan, older_than_s=0))


def test_checkpoints_of_finished_stages_go_and_the_stage_stays(study):
    store = study.stage("clip_b16", "mse").store(study.storage)
    study.storage.write(b"old weights", *store.parts, "checkpoints", "step-2", "model")
    (found,) = find_garbage(study.plan, older_than_s=0)
    assert (found.why, found.size) == ("checkpoints of a finished stage", 11)
    remove([found])
    assert store.is_done()
    assert not study.storage.exists(*store.parts, "checkpoints")


def test_a_storage_without_stages_has_no_garbage(tmp_path):
    study = Study(tmp_path, [make_sweep()])
    assert find_garbage(study.plan, older_than_s=0) == []
