"""Sweeps, plans and the command line; all but one refusal without Ray."""

from __future__ import annotations

import io
import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer.main
from rich.console import Console
from typer.testing import CliRunner

from kdscale import Distill, Execution, Sweep, choose, product, zipped
from kdscale.cli import _run_command, app, load_sweep, parse_data, parse_settings
from kdscale.core.config import DataSpec
from kdscale.core.scale import MINI, PAPER
from kdscale.core.storage import Storage
from kdscale.core.types import ConfigError, ImpossibleResources, UnknownField
from kdscale.sweep.plan import Plan, Stage, make_plan
from kdscale.sweep.progress import print_plan
from kdscale.sweep.run import _print_place
from kdscale.sweep.tracked_facts import stage_params
from kdscale.sweep.tracking import viewing

SWEEPS = Path(__file__).parent.parent / "sweeps"


def names(sweep: Sweep) -> list[str]:
    return [trial.name for trial in sweep.trials()]


def plan_of(sweep: Sweep, root: Path, scale: Any = MINI, **overrides: Any) -> Plan:
    return make_plan([sweep], Storage(str(root)), scale, overrides)


def test_choices_combine_zip_and_repeat_by_seed() -> None:
    free = Distill(
        student="vit_t16", teacher=choose("clip_b16", "clip_l14"), loss=choose("kl", "icl")
    )
    assert len(Sweep(name="free", stages=[free], seeds=(0, 1)).trials()) == 8
    teacher, loss = zipped(("clip_b16", "clip_l14"), ("kl", "icl"))
    tied = Distill(student="vit_t16", teacher=teacher, loss=loss)
    assert names(Sweep(name="tied", stages=[tied])) == [
        "vit_t16 from clip_b16 kl",
        "vit_t16 from clip_l14 icl",
    ]
    teacher, epochs = product(("clip_b16", "clip_l14"), (32, 64, 96))
    both = Distill(student="vit_t16", teacher=teacher, epochs=epochs)
    assert len(Sweep(name="both", stages=[both]).trials()) == 6
    with pytest.raises(ConfigError, match="equally long"):
        zipped((1, 2), (1, 2, 3))


def test_the_quickstart_shares_its_teachers(tmp_path: Path) -> None:
    plan = plan_of(load_sweep(SWEEPS / "quickstart.py"), tmp_path)
    kinds = [stage.kind for stage in plan.stages.values()]
    assert (len(plan.trials), kinds.count("teacher"), kinds.count("distill")) == (6, 2, 5)
    teachers = [key for key, stage in plan.stages.items() if stage.kind == "teacher"]
    assert [plan.shared_by(key) for key in teachers] == [2, 3]
    document = plan.document()
    fields = {
        "kind",
        "key",
        "name",
        "inputs",
        "reused",
        "shared_by",
        "flops",
        "bytes_out",
        "gpu_hours",
    }
    assert all(fields <= set(stage) for stage in document["stages"])
    assert document["cost"]["flops"] > 0


def test_two_sweeps_are_planned_as_one_union(tmp_path: Path) -> None:
    quickstart = load_sweep(SWEEPS / "quickstart.py")
    union = make_plan([quickstart, quickstart], Storage(str(tmp_path)), MINI, {})
    assert (len(union.trials), len(union.stages)) == (12, 60)


def test_a_finished_stage_is_reused(tmp_path: Path) -> None:
    sweep = load_sweep(SWEEPS / "quickstart.py")
    first = next(iter(plan_of(sweep, tmp_path).stages.values()))
    first.store(Storage(str(tmp_path))).finish({})
    again = plan_of(sweep, tmp_path)
    assert [stage.key for stage in again.stages.values() if stage.reused] == [first.key]


def test_a_loss_that_needs_a_teacher_is_refused_without_one(tmp_path: Path) -> None:
    recipe = Distill(student="vit_t16", loss={"task": 1.0, "ckd": 1.0})
    with pytest.raises(ConfigError, match="teacher"):
        plan_of(Sweep(name="x", stages=[recipe]), tmp_path)


def test_what_a_sweep_varies_cannot_be_overridden(tmp_path: Path) -> None:
    quickstart = load_sweep(SWEEPS / "quickstart.py")
    for change in ({"loss": "clip"}, {"teacher": "clip_l14"}):
        with pytest.raises(ConfigError, match="sweep 'quickstart' varies it"):
            plan_of(quickstart, tmp_path, **change)
    recipe = Distill(student="vit_t16", teacher="clip_b16", loss="kl")
    with pytest.raises(ConfigError, match="'seed' cannot be set"):
        plan_of(Sweep(name="seeds", stages=[recipe], seeds=(0, 1)), tmp_path, seed=2)
    alone = Sweep(name="one", stages=[recipe], baseline={"loss": "kl"})
    with pytest.raises(ConfigError, match="tells its baseline by it"):
        plan_of(alone, tmp_path, loss="clip")


def test_names_of_trials_tell_of_overrides(tmp_path: Path) -> None:
    recipe = Distill(student="vit_t16", teacher="clip_b16", loss=choose("kl", "icl"))
    plan = plan_of(Sweep(name="x", stages=[recipe]), tmp_path, teacher="clip_l14", lr=1e-3)
    assert [planned.trial.name for planned in plan.trials] == [
        "vit_t16 from clip_l14 kl",
        "vit_t16 from clip_l14 icl",
    ]
    assert {planned.trial.chosen["teacher"] for planned in plan.trials} == {"clip_l14"}
    assert plan.stages[plan.trials[0].key].training.lr == 1e-3


def keys_with(workers: int, root: Path, **fields: Any) -> list[str]:
    run = MINI.run.replace(num_workers=workers)
    recipe = Distill(student="vit_t16", loss="clip", run=run, **fields)
    return list(plan_of(Sweep(name="x", stages=[recipe]), root).stages)


def test_the_world_size_is_in_the_key_where_it_changes_numbers(tmp_path: Path) -> None:
    assert keys_with(1, tmp_path) == keys_with(2, tmp_path)
    assert keys_with(1, tmp_path, mode="paper") != keys_with(2, tmp_path, mode="paper")
    flags = {"detached_gather": True}
    assert keys_with(1, tmp_path, flags=flags) != keys_with(2, tmp_path, flags=flags)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"student": "vit_t16", "drop_path": 0.1}, "no drop path"),
        ({"student": "swin_t", "loss": {"task": 1.0, "mfd": 1.0}}, "open_clip's ViT"),
        ({"precision": "fp16"}, "fp16 on a CPU"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"crop_scale": (0.9, 0.5)}, "crop_scale"),
        ({"run": Execution(num_workers=3)}, "shared equally by 3 workers"),
        ({"run": Execution(micro_batch_size=48)}, "does not divide the 128 rows"),
        ({"student": "mobilevit_s", "bn_group": 128, "run": Execution(num_workers=2)}, "bn_group"),
        ({"flags": {"unsynced_heads": True}}, "drop_heads_on_resume"),
    ],
)
def test_recipes_that_cannot_run_are_not_planned(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    recipe = Distill(**({"student": "vit_t16", "teacher": "clip_b16"} | fields))
    with pytest.raises(ConfigError, match=message):
        plan_of(Sweep(name="x", stages=[recipe]), tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        {"student": "swin_t", "drop_path": 0.1},
        {"student": "vit_t16", "loss": {"task": 1.0, "mfd": 1.0}},
        {"student": "swin_t", "loss": {"task": 1.0, "mfd": 1.0}, "flags": {"mfd_noop": True}},
        {"student": "swin_t", "bn_group": 128, "run": Execution(num_workers=2)},
        {"student": "mobilevit_s", "run": Execution(num_workers=8)},
    ],
)
def test_recipes_that_can_run_are_planned(fields: dict[str, Any], tmp_path: Path) -> None:
    recipe = Distill(teacher="clip_b16", **fields)
    assert plan_of(Sweep(name="x", stages=[recipe]), tmp_path).trials


def test_paper_work_is_that_of_its_towers(tmp_path: Path) -> None:
    data = MINI.data["cc12m"]
    recipe = Distill(student="vit_t16", teacher="clip_b16", data=data, zero_shot=None, epochs=1)
    plan = plan_of(Sweep(name="x", stages=[recipe]), tmp_path, PAPER.replace(gates=False))
    (stage,) = plan.stages.values()
    per_sample = 3 * (2.51 + 3.38) + 35.13 + 5.96
    assert stage.flops == pytest.approx(per_sample * 1e9 * 4096 * stage.total_steps, rel=1e-3)


def test_settings_and_data_are_parsed() -> None:
    fields = parse_settings(["distill.lr=1e-3", "run.num_workers=2", "loss=kl"], MINI)
    assert fields["lr"] == 1e-3
    assert fields["loss"] == "kl"
    assert fields["run"] == {"num_workers": 2}
    assert parse_data(["a={0..1}.tar", "*.tar"]) == {"a": "{0..1}.tar", "": "*.tar"}
    dated = "s3://b/date=2024/*.tar"
    assert parse_data([dated, f"a={dated}"]) == {"": dated, "a": dated}
    with pytest.raises(ConfigError, match="FIELD=VALUE"):
        parse_settings(["lr"], MINI)
    with pytest.raises(UnknownField):
        parse_settings(["run.workers=2"], MINI)


def test_a_setting_of_run_changes_that_field_alone(tmp_path: Path) -> None:
    own = Distill(student="vit_t16", loss="clip", run=Execution(checkpoint_every=7, log_every=3))
    plain = Distill(student="vit_t16", loss="clip", epochs=64)
    fields = parse_settings(["run.log_every=5"], MINI)
    plan = plan_of(Sweep(name="x", stages=[own, plain]), tmp_path, **fields)
    runs = [stage.recipe.run for stage in plan.stages.values()]
    assert runs == [own.run.replace(log_every=5), MINI.run.replace(log_every=5)]  # pyright: ignore


def stage_needing(**run: Any) -> Stage:
    recipe = Distill(student="vit_t16", loss="clip", run=Execution(**run))
    fields: dict[str, Any] = dict.fromkeys(("total_steps", "flops", "bytes_out"))
    return Stage(
        kind="distill",
        key="k",
        name="n",
        recipe=recipe,
        inputs=(),
        reused=False,
        num_samples=8,
        **fields,
    )


def test_impossible_resources_are_named_before_anything_starts() -> None:
    from kdscale.sweep.fitting import concurrent_trials

    with pytest.raises(ImpossibleResources, match="GPU"):
        concurrent_trials([stage_needing(gpus_per_worker=1)], {"CPU": 64})
    with pytest.raises(ImpossibleResources, match="CPU"):
        concurrent_trials([stage_needing(num_workers=9)], {"CPU": 4})
    fits = stage_needing(num_workers=2, cpus_per_worker=1, data_cpus=2)
    assert concurrent_trials([fits], {"CPU": 13}) == 3


@pytest.mark.parametrize(
    ("run", "nodes"),
    [
        ({"num_workers": 2, "cpus_per_worker": 3, "data_cpus": 2, "cpus_per_data_task": 2}, (4, 4)),
        ({"cpus_per_worker": 4, "data_cpus": 4, "cpus_per_data_task": 4}, (7.5, 0.5)),
    ],
)
def test_workers_that_leave_no_room_for_a_data_task_are_refused(
    run: dict[str, Any], nodes: tuple[float, ...]
) -> None:
    from kdscale.sweep.fitting import concurrent_trials

    stage = stage_needing(**run)
    with pytest.raises(ImpossibleResources, match="CPU on one node for a data task: no node has"):
        concurrent_trials([stage], {"CPU": sum(nodes)}, [{"CPU": n} for n in nodes])
    more = (*nodes, run["cpus_per_data_task"])
    assert concurrent_trials([stage], {"CPU": sum(more)}, [{"CPU": n} for n in more]) == 1


@pytest.mark.ray
def test_what_has_no_room_is_refused_before_data_are_prepared(
    ray_cluster: Any, tmp_path: Path
) -> None:
    from kdscale.sweep.run import execute

    sweep = Sweep(
        name="x",
        stages=[Distill(student="vit_t16", loss="clip", run=Execution(gpus_per_worker=99))],
    )
    plan = plan_of(sweep, tmp_path)
    console = Console(file=io.StringIO())
    with pytest.raises(ImpossibleResources, match="GPU"):
        execute(plan, [sweep], console=console, tracking_uri=None, command="")
    assert not plan.storage.names("data")


def test_trials_side_by_side_share_the_cores(tmp_path: Path) -> None:
    from kdscale.sweep.fitting import sharing_cores

    plan = plan_of(Sweep(name="x", stages=[Distill(student="vit_t16", loss="clip")]), tmp_path)

    def threads(num_workers: int, own: int | None, concurrency: int) -> int | None:
        stage = stage_needing(num_workers=num_workers, threads_per_worker=own)
        shared = sharing_cores(replace(plan, stages={"k": stage}), concurrency, 8)
        assert shared.stages["k"].recipe.run is not None
        return shared.stages["k"].recipe.run.threads_per_worker

    assert threads(0, 4, 1) == 4
    assert threads(0, 4, 3) == 2
    assert threads(0, None, 16) == 1
    assert threads(0, None, 2) == 4
    assert threads(2, None, 16) is None  # workers of a group have cores of their own


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"cpus_per_data_task": 8}, "data task .* needs 8 CPU, all of them together may use 1.5"),
        ({"cpus_per_data_task": 8, "data_cpus": 16}, "data task .* CPU, the largest node has 4"),
        ({"cpus_per_worker": 6}, "worker .* needs 6 CPU, the largest node has 4"),
        ({"gpus_per_worker": 2}, "worker .* needs 2 GPU, the largest node has 1"),
    ],
)
def test_tasks_that_fit_on_no_node_are_refused(run: dict[str, Any], message: str) -> None:
    from kdscale.sweep.fitting import concurrent_trials

    nodes = [{"CPU": 4.0}, {"CPU": 2.0, "GPU": 1.0}]
    with pytest.raises(ImpossibleResources, match=message):
        concurrent_trials([stage_needing(**run)], {"CPU": 64, "GPU": 8}, nodes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["sweeps/photos.py"], "--data"),
        (["sweeps/photos.py", "--data", "/nowhere/{00000..00007}.tar"], "nowhere"),
        (["sweeps/quickstart.py", "--scale", "minni"], "mini"),
        (["sweeps/quickstart.py", "--set", "epoch=3"], "no field"),
        (["sweeps/quickstart.py", "--set", "student=vit_t61"], "vit_t16"),
        (["sweeps/quickstart.py", "--data", "cc3m=*.tar"], "cc3m"),
    ],
)
def test_bad_input_is_a_clear_line_and_exit_2(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(SWEEPS.parent)
    result = CliRunner().invoke(app, ["run", *options, "--storage", str(tmp_path)])
    assert result.exit_code == 2
    assert message in result.output.replace("\n", " ")
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("root", "message"), [("/proc/nope", "/proc/nope"), ("nosuch://x", "nosuch")]
)
def test_a_storage_that_cannot_be_is_a_clear_line(root: str, message: str) -> None:
    line = ["run", str(SWEEPS / "quickstart.py"), "--storage", root]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 2
    assert "StorageError" in result.output
    assert message in result.output
    assert "Traceback" not in result.output


def test_a_plan_without_data_is_estimated(tmp_path: Path) -> None:
    recipe = Distill(student="vit_t16", teacher="clip_b16", zero_shot=None, epochs=2)
    plan = plan_of(Sweep(name="x", stages=[recipe]), tmp_path, PAPER.replace(gates=False))
    (stage,) = plan.stages.values()
    assert stage.total_steps == 2 * (10_968_539 // 4096)
    document = plan.document()
    assert document["stages"][0]["estimated"] is document["cost"]["estimated"] is True
    assert document["teacher_cache"]["estimated"] is True
    assert document["cost"]["flops"] == stage.flops > 0
    said = printed(plan)
    assert "about 5354 steps" in said
    assert said.count("(estimated: data not at hand)") == 2


def test_a_plan_of_data_that_nothing_is_known_of_says_so(tmp_path: Path) -> None:
    data = DataSpec(name="mine", urls="/nowhere/*.tar")
    recipe = Distill(student="vit_t16", teacher="clip_b16", data=data, zero_shot=None)
    plan = plan_of(Sweep(name="x", stages=[recipe]), tmp_path, PAPER.replace(gates=False))
    cost = plan.document()["cost"]
    assert (cost["flops"], cost["gpu_hours"], cost["estimated"]) == (None, None, False)
    assert "unknown steps" in printed(plan)
    assert "1 of 1 stages, work unknown, " in printed(plan)


def test_a_plan_with_data_is_not_estimated(tmp_path: Path) -> None:
    plan = plan_of(load_sweep(SWEEPS / "quickstart.py"), tmp_path)
    assert plan.document()["cost"]["estimated"] is False
    assert "estimated" not in printed(plan)


def printed(plan: Plan) -> str:
    console = Console(file=io.StringIO(), width=200)
    print_plan(plan, console)
    return console.file.getvalue()  # pyright: ignore


def test_plan_prints_json(tmp_path: Path) -> None:
    line = ["plan", str(SWEEPS / "quickstart.py"), "--storage", str(tmp_path), "--json"]
    document = json.loads(CliRunner().invoke(app, line).stdout)
    assert set(document) == {"trials", "stages", "cost", "teacher_cache", "feature_cache"}


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("https://me:p@ss@host:1/x", "https://***@host:1/x"),
        ("http://host", "http://host"),
        ("postgresql://me:pass@host/db", "ui --backend-store-uri 'postgresql://***@host/db'"),
        ("sqlite:////a b/mlflow.db", "ui --backend-store-uri 'sqlite:////a b/mlflow.db'"),
    ],
)
def test_tracking_is_shown_without_passwords(uri: str, shown: str) -> None:
    assert viewing(uri).endswith(shown)


def test_mlflow_is_found_beside_the_interpreter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert viewing("sqlite:///x").startswith("mlflow ui")
    (tmp_path / "mlflow").touch()
    assert viewing("sqlite:///x").startswith(f"{tmp_path}/mlflow ui")


def test_the_command_of_a_report_holds_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["kdscale", "report", "a.py", "--tracking-uri", "https://me:pass@host"]
    monkeypatch.setattr(sys, "argv", argv)
    assert _run_command() == "kdscale run a.py --tracking-uri 'https://***@host'"


@pytest.mark.parametrize(
    "line",
    [
        "report {file} --seeds 0,1 --paper --out beside",
        "report {file} --seeds 0,1 --paper --json",
        "findings {file} --seeds 0,1 --out=findings.md",
        "status {file} --seeds 0,1 --all",
        "gc {file} --seeds 0,1 --older-than 3 --dry-run",
        "plan {file} --why 0123 --seeds 0,1",
        "run {file} --redo 0123 --redo-dependants --yes --seeds 0,1",
    ],
)
def test_the_command_for_the_rest_is_one_that_run_takes(
    line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = str(SWEEPS / "quickstart.py")
    monkeypatch.setattr(sys, "argv", ["kdscale", *line.format(file=file).split()])
    told = shlex.split(_run_command())
    assert told == ["kdscale", "run", file, "--seeds", "0,1"]
    command: Any = typer.main.get_command(app)
    command.commands["run"].make_context("run", told[2:])  # refuses what it does not take


def test_places_are_printed_as_they_are() -> None:
    console = Console(file=io.StringIO(), width=40)
    place = f"/[red]/{'long' * 20}/report.html"
    _print_place(console, "report", place)
    assert console.file.getvalue() == f"report {place}\n"  # pyright: ignore


def test_params_are_few_and_short() -> None:
    long = {f"term_{number}": 0.5 for number in range(100)}
    found = stage_params(Distill(student=MINI.students["vit_t16"], loss={"task": 1.0, "ckd": 2.0}))
    assert (found["student"], found["loss"]) == ("mini ViT-T/16", "task+2 ckd")
    assert found["teacher"] == "none"
    assert len(found) < 40
    assert len(stage_params(Distill(student="vit_t16", loss=long))["loss"]) == 500


OWN_LOSS = '''
"""A sweep with a loss of its own."""
from kdscale import Distill, Sweep

def halved(inputs):
    return {"task": inputs.student_scale * 0.5}

sweep = Sweep(
    name="own", stages=[Distill(student="vit_t16", teacher="clip_b16", loss=halved)], scale="mini"
)
'''


def test_a_loss_of_the_sweep_file_travels_by_value(tmp_path: Path) -> None:
    import ray.cloudpickle

    from kdscale.sweep.schedule import ship_own_losses

    (tmp_path / "own_loss_sweep.py").write_text(OWN_LOSS)
    plan = plan_of(load_sweep(tmp_path / "own_loss_sweep.py"), tmp_path)
    ship_own_losses(plan)
    (stage,) = [stage for stage in plan.stages.values() if stage.kind == "distill"]
    program = "import pickle, sys; print(pickle.load(sys.stdin.buffer).__name__)"
    found = subprocess.run(
        [sys.executable, "-c", program],
        input=ray.cloudpickle.dumps(stage.recipe.loss),
        capture_output=True,
        check=True,
    )
    assert found.stdout.decode().strip() == "halved"


def test_seeds_come_from_the_command_line(tmp_path: Path) -> None:
    command = ["plan", str(SWEEPS / "table4_losses.py"), "--storage", str(tmp_path), "--json"]
    found = CliRunner().invoke(app, [*command, "--seeds", "0, 2,5"])
    kinds = [stage["kind"] for stage in json.loads(found.stdout)["stages"]]
    assert kinds.count("distill") == 3 * 20
    for text in ("0,0", "1.5", "a", "", "0,"):
        wrong = CliRunner().invoke(app, [*command, "--seeds", text])
        assert (wrong.exit_code, "different whole numbers" in wrong.output) == (2, True), text
