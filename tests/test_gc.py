"""Garbage of a storage: what no sweep needs, and what killed processes have left."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from studies import Study, answers, finish, make_sweep, recipe, write_journal
from typer.testing import CliRunner

from kdscale.cli import app, load_sweep
from kdscale.core.lease import Lease
from kdscale.core.scale import MINI, PAPER
from kdscale.core.storage import Storage
from kdscale.core.types import ConfigError
from kdscale.sweep.gc import DAY_S, find_garbage, kept_keys, remove
from kdscale.sweep.grid import choose
from kdscale.sweep.orders import record_of
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


def test_what_is_no_stage_is_passed_over(study):
    expected = keys(find_garbage(narrower(study), older_than_s=0))
    for place in ("stages/.DS_Store", "stages/notes.txt", "stages/distill/.DS_Store"):
        (Path(study.storage.root) / place).write_text("")
    assert keys(find_garbage(narrower(study), older_than_s=0)) == expected


def test_a_storage_without_stages_has_no_garbage(tmp_path):
    study = Study(tmp_path, [make_sweep()])
    assert find_garbage(study.plan, older_than_s=0) == []


def test_what_finished_while_somebody_thought_stays(study):
    stage = study.stage("siglip_so400m", "mse")
    found = find_garbage(narrower(study), older_than_s=0)
    assert keys(found)[stage.key] == "never finished"
    finish(stage, study.storage, answers(20))
    removed = remove(found)
    assert len(removed) == len(found) - 1
    assert stage.store(study.storage).is_done()


OWN = """
from kdscale import Distill, Sweep
distill = Distill(student="vit_t16", teacher="clip_b16", loss="kl", zero_shot=None)
sweep = Sweep(name="own", stages=[distill])
"""


@pytest.fixture
def own(tmp_path):
    """A storage with a sweep's results in two settings, and the options that say so."""
    (tmp_path / "own.py").write_text(OWN)
    storage = Storage(str(tmp_path / "runs"))
    for setting in ({}, {"lr": 0.5}):
        plan = make_plan([load_sweep(tmp_path / "own.py")], storage, MINI, setting)
        for stage in plan.stages.values():
            stage.store(storage).finish(record_of(stage))
    return [str(tmp_path / "own.py"), "--scale", "mini", "--storage", storage.root]


def said(*line):
    """Exit code and output of a command."""
    result = CliRunner().invoke(app, list(line), env={"COLUMNS": "200"})
    return result.exit_code, " ".join(result.output.split())


def test_results_of_another_setting_are_named_and_stay(own):
    line = ["gc", *own, "--older-than", "0", "--yes"]
    code, text = said(*line)
    assert (code, "0 to remove" in text) == (0, True)
    assert "(other lr)" in text
    assert "only --finished removes" in text
    assert "--keep PLAN.json" in text
    code, text = said(*line, "--finished")
    assert (code, "removed 1," in text) == (0, True)
    assert "nothing to remove" in said(*line, "--finished")[1]


def test_what_a_written_plan_names_is_kept(own, tmp_path):
    written = CliRunner().invoke(app, ["plan", *own, "--set", "lr=0.5", "--json"]).stdout
    assert all(stage["reused"] for stage in json.loads(written)["stages"])
    (tmp_path / "other.json").write_text(written)
    keep = ["--keep", str(tmp_path / "other.json")]
    code, text = said("gc", *own, "--older-than", "0", "--yes", "--finished", *keep, *keep)
    assert (code, "nothing to remove" in text) == (0, True)


def test_a_file_that_is_no_whole_plan_is_refused(study, tmp_path):
    plan = study.plan.document()
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan))
    assert kept_keys([file]) == set(study.plan.stages)
    for wrong in ([], {}, {"stages": {"done": 3}}, plan | {"stages": plan["stages"][1:]}):
        file.write_text(json.dumps(wrong))
        with pytest.raises(ConfigError, match=r"is no (whole )?plan: write it by `kdscale plan"):
            kept_keys([file])
    file.write_text("trials: 4")
    with pytest.raises(ConfigError, match="is no plan"):
        kept_keys([file])


def test_without_the_data_that_keys_depend_on_nothing_is_judged(own, tmp_path):
    file = tmp_path / "paper.json"
    plan = make_plan([load_sweep(tmp_path / "own.py")], Storage(own[-1]), PAPER, {})
    file.write_text(json.dumps(plan.document()))
    with pytest.raises(ConfigError, match=r"was planned without its data.*cc12m"):
        kept_keys([file])
    code, text = said("gc", own[0], "--scale", "paper", "--storage", own[-1], "--yes")
    assert (code, "NoShards" in text, "--data cc12m=" in text) == (2, True, True)
