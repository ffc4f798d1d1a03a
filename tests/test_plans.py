"""Plans: their tree, cost, reasons and limits, and stages done again; without torch and Ray."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from conftest import Part, pair
from rich.console import Console
from typer.testing import CliRunner

from kdscale import Distill, Sweep, Vlm, choose
from kdscale.cli import app, load_sweep
from kdscale.cli_plan import to_run_again
from kdscale.core.checkpoints import Checkpoints
from kdscale.core.config import DataSpec, Execution
from kdscale.core.lease import Lease
from kdscale.core.scale import MINI, PAPER
from kdscale.core.stop import ask_to_stop, check_stop
from kdscale.core.storage import StageStore, Storage
from kdscale.core.types import (
    AmbiguousStage,
    ConfigError,
    LimitReached,
    OverBudget,
    StageBusy,
    StageStopped,
    UnknownName,
    UnknownStage,
)
from kdscale.sweep.budget import Budget, Limits, done_share
from kdscale.sweep.orders import record_of
from kdscale.sweep.plan import Plan, make_plan
from kdscale.sweep.prices import find_rates
from kdscale.sweep.progress import print_plan
from kdscale.sweep.redo import find_redo
from kdscale.sweep.tree import prefixed
from kdscale.sweep.why import Why, explain
from kdscale.terminal import guarded

OWN = """
from kdscale import Distill, Sweep
distill = Distill(student="vit_t16", teacher="clip_b16", loss="kl")
sweep = Sweep(name="own", stages=[distill], scale="mini")
"""


def plan_of(root: Path, scale: Any = MINI, **fields: Any) -> Plan:
    fields = {"student": "vit_t16", "teacher": "clip_b16", "loss": "kl"} | fields
    sweep = Sweep(name="x", stages=[Distill(**fields)])
    return make_plan([sweep], Storage(str(root)), scale, {})


def printed(plan: Plan) -> str:
    console = Console(file=io.StringIO(), width=200)
    print_plan(plan, console)
    return console.file.getvalue()  # pyright: ignore


# The tree.


def test_like_stages_share_a_line_and_so_do_those_that_follow(tmp_path: Path) -> None:
    rates = choose(*(10.0**-n for n in range(1, 13)))
    plan = plan_of(tmp_path, lr=rates, loss=choose("kl", "icl"))
    first = next(s for s in plan.stages.values() if s.kind == "distill")
    first.store(plan.storage).finish({})
    text = printed(plan_of(tmp_path, lr=rates, loss=choose("kl", "icl")))
    (line,) = [line for line in text.splitlines() if "distill" in line]
    assert "distill x 24" in line
    assert "1 finished, 23 to run" in line
    few = printed(plan_of(tmp_path, loss=choose("kl", "icl", "mse")))
    assert len([line for line in few.splitlines() if "distill" in line]) == 3


# What it costs.


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (999.4, "999 B"),
        (999.6, "1 kB"),
        (82_712_345_678, "82.7 GB"),
        (1.84e12, "1.84 TB"),
        (1.7789e21, "1.78 ZB"),
        (1.84e25, "18,400 ZB"),
    ],
)
def test_amounts_have_three_digits_and_a_prefix(value: float, text: str) -> None:
    assert prefixed(value, "B") == text


def test_hours_and_money_follow_from_the_accelerator(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, PAPER, zero_shot=None)
    flops = plan.document()["cost"]["flops"]
    assert flops > 0
    for name, peak in (("h100", 989), ("a100", 312), ("v100", 125), ("l4", 121)):
        plan.rates = find_rates(name, 0.5)
        cost = plan.document()["cost"]
        assert cost["gpu_hours"] == pytest.approx(flops / (peak * 0.5e12 * 3600))
        assert cost["money"]["on_demand"] == pytest.approx(
            cost["gpu_hours"] * (plan.rates.price() or 0)
        )
        assert (cost["accelerator"], cost["efficiency"]) == (name, 0.5)
    compared = plan.document()["teacher_cache"]
    assert compared["online_money"]["on_demand"] == pytest.approx(
        compared["online_gpu_hours"] * (plan.rates.price() or 0)
    )
    assert "on l4 at 50% of its 121 TFLOP/s" in printed(plan)


def test_a_price_file_of_ones_own_replaces_field_by_field(tmp_path: Path) -> None:
    own = tmp_path / "mine.toml"
    own.write_text("[accelerators.h100]\non_demand = 2\n[accelerators.mi300]\nfp16_tflops = 1307\n")
    rates = find_rates("h100", prices=own)
    assert rates.price() == 2
    assert rates.price(spot=True) == find_rates("h100").price(spot=True)
    assert find_rates("mi300", prices=own).money(3.0) == {"on_demand": None, "spot": None}
    own.write_text('currency = "EUR"\n[accelerators.h100]\non_demand = 2\n')
    euros = find_rates("h100", prices=own)
    assert (euros.currency, euros.price(), euros.price(spot=True)) == ("EUR", 2, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "cannot read the price file"),
        ("[h100]\non_demand = 2\n", "is no price file"),
        ("[accelerators.h100]\nprice = 2\n", "no field 'price'"),
        ("[accelerators.h100]\non_demand = -2\n", "on_demand"),
        ("[accelerators.tpu]\non_demand = 2\n", "give bf16_tflops or fp16_tflops"),
    ],
)
def test_bad_price_files_are_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(text)
    name = "tpu" if "tpu" in text else "h100"
    with pytest.raises(ConfigError, match=message):
        find_rates(name, prices=tmp_path / "mine.toml")


def test_an_unknown_accelerator_is_suggested() -> None:
    with pytest.raises(UnknownName, match="Did you mean h100"):
        find_rates("h10")


# Why a stage would run.


def finish(plan: Plan, *kinds: str) -> None:
    """Marks the stages of a plan finished, with what their workers would note."""
    for stage in plan.stages.values():
        if not kinds or stage.kind in kinds:
            stage.store(plan.storage).finish(record_of(stage))


def last(plan: Plan) -> str:
    return list(plan.stages)[-1]


def fields_of(why: Why) -> list[str]:
    return [found.field for found in why.differences]


def test_the_nearest_finished_stage_names_the_fields_that_differ(tmp_path: Path) -> None:
    finish(plan_of(tmp_path, lr=1e-3, epochs=3))
    finish(plan_of(tmp_path, lr=1e-3))
    plan = plan_of(tmp_path, lr=2e-3)
    why = explain(plan, last(plan)[:9])
    (found,) = why.differences
    assert (found.field, found.here / found.there) == ("recipe.lr", 2.0)
    assert why.nearest == {
        "key": last(plan_of(tmp_path, lr=1e-3)),
        "name": "vit_t16 from clip_b16 kl",
    }
    done = plan_of(tmp_path, lr=1e-3)
    assert explain(done, last(done)).document()["finished"]


def test_a_changed_input_is_followed_to_its_own_change(tmp_path: Path) -> None:
    finish(plan_of(tmp_path))
    teacher: Any = MINI.teachers["clip_b16"]
    other = MINI.replace(teachers={**MINI.teachers, "clip_b16": teacher.replace(lr=0.5)})
    plan = plan_of(tmp_path, other)
    why = explain(plan, last(plan))
    (found,) = why.differences
    assert found.field == "recipe.teacher.weights"
    assert found.cause is not None
    assert fields_of(found.cause) == ["recipe.lr"]
    document = json.loads(json.dumps(why.document()))
    assert document["differences"][0]["input"]["differences"][0]["here"] == 0.5


def test_of_vlms_that_differ_alike_the_one_whose_student_is_nearest_is_shown(
    tmp_path: Path,
) -> None:
    def planned(lr: float, teacher: str = "clip_b16", **fields: Any) -> Plan:
        student = Distill(student="vit_t16", teacher=teacher, loss="kl", lr=lr)
        sweep = Sweep(name="x", stages=[Vlm(vision=student, recipe="tinyllava", **fields)])
        return make_plan([sweep], Storage(str(tmp_path)), MINI, {})

    for teacher in ("clip_l14", "siglip_so400m", "clip_b16", "dfn_b16"):
        finish(planned(2e-3, teacher))
    plan, near = planned(1e-3), planned(2e-3)
    kinds = {stage.kind: stage for stage in plan.stages.values()}
    why = explain(plan, kinds["finetune"].key)
    nears = {stage.kind: stage for stage in near.stages.values()}
    assert (why.nearest or {}).get("key") == nears["finetune"].key
    causes = {found.cause.stage.kind: found.cause for found in why.differences if found.cause}
    assert set(causes) == {"distill", "pretrain"}
    assert fields_of(causes["distill"]) == ["recipe.lr"]
    for kind, cause in causes.items():  # what is said below is what is said of it alone
        assert cause.document() == explain(plan, kinds[kind].key).document()
    console = Console(file=io.StringIO(), width=200)
    console.print(why.tree())
    text = console.file.getvalue()  # pyright: ignore
    assert text.count("lr  0.008 -> 0.004") == 1
    assert text.count("see above") == 1


def test_a_finished_input_is_compared_with_the_one_in_its_place(tmp_path: Path) -> None:
    finish(plan_of(tmp_path, lr=1e-3))
    teacher: Any = MINI.teachers["clip_b16"]
    other = MINI.replace(teachers={**MINI.teachers, "clip_b16": teacher.replace(lr=0.5)})
    finish(plan_of(tmp_path, other, lr=1e-3), "teacher")
    plan = plan_of(tmp_path, other, lr=1e-3)
    (found,) = explain(plan, last(plan)).differences
    assert found.cause is not None
    assert found.cause.stage.reused
    assert fields_of(found.cause) == ["recipe.lr"]


def test_other_data_are_a_manifest_that_differs(
    tmp_path: Path, shards: str, write_tar: Callable[[Path, list[Part]], Path]
) -> None:
    def planned(urls: str) -> Plan:
        data = DataSpec(name="mine", urls=urls)
        fields = {"teacher": None, "loss": "clip", "data": data, "zero_shot": None}
        return plan_of(tmp_path / "runs", MINI, global_batch_size=4, **fields)

    finish(planned(shards))
    parts = [part for i in range(9) for part in pair(f"{i:05d}", i)]
    plan = planned(str(write_tar(tmp_path / "other.tar", parts)))
    assert fields_of(explain(plan, last(plan))) == ["recipe.data.manifest"]


def test_other_versions_of_the_code_are_named(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    stage = plan.stages[last(plan)]
    earlier = StageStore(plan.storage, stage.kind, "0" * 16)
    earlier.finish(record_of(stage) | {"version": stage.recipe.version - 1})
    assert fields_of(explain(plan, stage.key)) == ["version"]
    record = record_of(stage)
    del record["version"]  # as records were before
    earlier.finish(record)
    why = explain(plan, stage.key)
    assert (fields_of(why), "before versions were kept" in why.note) == ([], True)


def test_without_a_finished_stage_there_is_nothing_to_compare(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    finish(plan, "teacher")
    why = explain(plan, last(plan))
    assert (why.nearest, why.differences) == (None, ())
    with pytest.raises(UnknownStage, match="no stage of this plan"):
        explain(plan, "zz")
    with pytest.raises(AmbiguousStage, match="give more of the key"):
        explain(plan_of(tmp_path, lr=choose(*(0.1 / n for n in range(1, 18)))), "")


def test_why_is_an_option_of_plan(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    line = ["plan", str(tmp_path / "own.py"), "--storage", str(tmp_path)]
    whole = json.loads(CliRunner().invoke(app, [*line, "--json", "--accelerator", "l4"]).stdout)
    assert whole["cost"]["accelerator"] == "l4"
    key = whole["stages"][-1]["key"]
    said = CliRunner().invoke(app, [*line, "--why", key[:8]])
    assert (said.exit_code, "no distill is finished" in " ".join(said.output.split())) == (0, True)
    found = json.loads(CliRunner().invoke(app, [*line, "--why", key, "--json"]).stdout)
    assert (found["key"], found["differences"]) == (key, [])


# Stages done again.


def test_a_stage_done_again_keeps_what_follows_from_it(tmp_path: Path) -> None:
    finish(plan_of(tmp_path))
    plan = plan_of(tmp_path)
    teacher, student = plan.stages.values()
    redo = find_redo(plan, teacher.key[:10], dependants=False)
    assert [store.key for store in redo.dependants] == [student.key]
    redo.make_room(plan.storage)
    assert not plan.storage.names("stages", "teacher", teacher.key)
    assert student.store(plan.storage).is_done()
    again = plan_of(tmp_path)
    assert [stage.kind for stage in again.remaining()] == ["teacher"]


def test_dependants_are_done_again_where_asked_for(tmp_path: Path) -> None:
    finish(plan_of(tmp_path, loss=choose("kl", "icl")))
    plan = plan_of(tmp_path)  # of one loss: the other stage is not the plan's
    redo = find_redo(plan, next(iter(plan.stages)), dependants=True)
    assert (len(redo.dependants), [store.key for store in redo.again]) == (2, [last(plan)])
    redo.make_room(plan.storage)
    assert len(plan_of(tmp_path, loss=choose("kl", "icl")).remaining()) == 2


@pytest.mark.parametrize("held", [0, 1])
def test_nothing_is_removed_that_another_process_uses(held: int, tmp_path: Path) -> None:
    finish(plan_of(tmp_path))
    plan = plan_of(tmp_path)
    stages = list(plan.stages.values())
    lease = Lease.acquire(stages[held].store(plan.storage))
    assert lease is not None
    with lease, pytest.raises(StageBusy, match=stages[held].key):
        find_redo(plan, stages[0].key, dependants=False).make_room(plan.storage)
    assert all(stage.store(plan.storage).is_done() for stage in stages)


def test_redo_asks_first(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    plan = make_plan([load_sweep(tmp_path / "own.py")], Storage(str(tmp_path)), MINI, {})
    finish(plan)
    key = next(iter(plan.stages))
    line = ["run", str(tmp_path / "own.py"), "--storage", str(tmp_path), "--redo", key]
    said = CliRunner().invoke(app, line, input="n\n")
    assert (said.exit_code, "1 stage in the storage was made from it" in said.output) == (1, True)
    assert all(stage.store(plan.storage).is_done() for stage in plan.stages.values())
    said = CliRunner().invoke(app, [*line, "--yes", "--max-gpu-hours", "0"])
    assert (said.exit_code, "OverBudget" in said.output) == (2, True)
    assert plan.stages[key].store(plan.storage).is_done()  # refused before anything was removed


def test_the_command_of_a_report_does_nothing_again() -> None:
    options = [
        "a.py",
        "--redo",
        "3fa9",
        "--redo=3fa9",
        "--redo-dependants",
        "--yes",
        "--keep",
        "other.json",
        "--finished",
        "--set",
        "x=1",
    ]
    assert to_run_again(options) == ["a.py", "--set", "x=1"]


def test_a_trial_waits_for_a_stage_that_is_to_be_done_again(tmp_path: Path) -> None:
    from kdscale.sweep.schedule import waiting_trials

    finish(plan_of(tmp_path), "distill")
    plan = plan_of(tmp_path)
    assert not waiting_trials(plan)
    plan.redo = frozenset(stage.key for stage in plan.remaining())
    assert waiting_trials(plan) == plan.trials


# Limits.


def test_a_plan_above_its_limit_is_refused_with_the_numbers(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, PAPER, zero_shot=None)
    hours = plan.document()["cost"]["gpu_hours"]
    for limits, message in (
        (Limits(gpu_hours=hours * 0.9), "GPU-hours.*--max-gpu-hours"),
        (Limits(cost=hours * 6), "USD.*--max-cost"),
        (Limits(cost=hours * 2, spot=True), "USD.*--max-cost"),
    ):
        with pytest.raises(OverBudget, match=message):
            Budget(plan, limits, print).check()
    Budget(plan, Limits(gpu_hours=hours * 1.1, cost=hours * 7), print).check()
    own = tmp_path / "prices.toml"
    own.write_text("[accelerators.mine]\nbf16_tflops = 100\non_demand = 1\n")
    plan.rates = find_rates("mine", prices=own)
    with pytest.raises(OverBudget, match="spot price of an hour of mine is not known"):
        Budget(plan, Limits(cost=1e9, spot=True), print).check()


def test_plan_ends_above_a_limit_as_run_would(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    line = ["plan", str(tmp_path / "own.py"), "--storage", str(tmp_path)]
    fits = CliRunner().invoke(app, [*line, "--max-gpu-hours", "5", "--max-cost", "9", "--spot"])
    assert (fits.exit_code, "OverBudget" in fits.output) == (0, False)
    for option in ("--max-gpu-hours", "--max-cost"):
        above = CliRunner().invoke(app, [*line, option, "0", "--json"])
        assert (above.exit_code, "OverBudget" in above.stderr) == (2, True)
        assert json.loads(above.stdout)["cost"]["stages_to_run"] == 2


def test_what_is_not_known_cannot_be_limited(tmp_path: Path) -> None:
    data = DataSpec(name="mine", urls="/nowhere/*.tar")
    plan = plan_of(tmp_path, PAPER, data=data, zero_shot=None)
    with pytest.raises(OverBudget, match="is not known, so no limit can be kept"):
        Budget(plan, Limits(gpu_hours=1e9), print).check()


def test_what_a_checkpoint_holds_is_not_counted_again(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, teacher=None, loss="clip")
    (stage,) = plan.stages.values()
    assert stage.total_steps
    half = Checkpoints(stage.store(plan.storage), keep=1)
    half.save(stage.total_steps // 2, b"state")
    half.wait()
    assert done_share(stage, plan) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("run", "hours", "unit"),
    [
        (Execution(num_workers=2, gpus_per_worker=4), 4.0, "GPU-hours"),
        (Execution(num_workers=4), 2.0, "worker-hours"),
    ],
)
def test_a_sweep_stops_at_its_limit(
    run: Execution, hours: float, unit: str, tmp_path: Path
) -> None:
    plan = plan_of(tmp_path, loss=choose("kl", "icl"), run=run)
    teacher, *students = plan.stages.values()
    finish(plan, "teacher")
    plan = plan_of(tmp_path, loss=choose("kl", "icl"), run=run)
    said: list[str] = []
    lease = Lease.acquire(students[0].store(plan.storage))
    assert lease is not None
    budget = Budget(plan, Limits(gpu_hours=hours + 1), said.append, every_s=3600)
    with lease, budget:
        budget.look(1800)
        assert (budget.hours, budget.unit, budget.reason) == (hours, unit, "")
        budget.look(1800)
        assert unit in budget.reason
        assert said == [f"[yellow]{budget.reason}[/]: running stages stop at their next checkpoint"]
        for student in students:
            with pytest.raises(StageStopped, match=unit):
                check_stop(student.store(plan.storage))
    check_stop(students[0].store(plan.storage))  # it may go on when it is run again
    with pytest.raises(LimitReached, match="2 of 3 stages are not finished"):
        budget.raise_if_stopped()
    check_stop(teacher.store(plan.storage))


def test_a_trial_of_a_stopped_sweep_starts_nothing(tmp_path: Path) -> None:
    from kdscale.sweep.schedule import _run_trial

    plan = plan_of(tmp_path)
    for stage in plan.stages.values():
        ask_to_stop(stage.store(plan.storage), "the limit of 2 GPU-hours is reached")
    told = _run_trial({"trial": {"number": 0}}, plan)
    assert "refused" not in told  # a trial that is stopped has not failed
    assert not plan.storage.exists("stages", "teacher", last(plan), "journal")


def test_a_reached_limit_has_an_exit_code_of_its_own() -> None:
    with pytest.raises(typer.Exit) as left, guarded():
        raise LimitReached("the limit of 2 GPU-hours is reached")
    assert left.value.exit_code == 3


def test_an_execution_that_is_set_reaches_every_stage(tmp_path: Path) -> None:
    distill = Distill(student="vit_t16", teacher="clip_l14", loss="clip_kd")
    vlm = Vlm(vision=distill.output, llm="qwen2_0_5b", questions="scenes")
    overrides = {"run": {"threads_per_worker": 3}}
    plan = make_plan([Sweep(name="s", stages=[vlm])], Storage(str(tmp_path)), MINI, overrides)
    found = {(stage.kind, stage.recipe.run.threads_per_worker) for stage in plan.stages.values()}
    kinds = {"teacher", "distill", "language", "pretrain", "finetune", "evaluate"}
    assert found == {(kind, 3) for kind in kinds}
