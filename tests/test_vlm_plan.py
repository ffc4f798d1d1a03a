"""VLM sweeps as plans; nothing is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kdscale import Distill, Execution, Sweep, Vlm, choose
from kdscale.cli_request import load_sweep, parse_settings
from kdscale.core.catalog import LANGUAGE_MODELS
from kdscale.core.scale import MINI, PAPER, TRUE_SIZE_CPU, Scale
from kdscale.core.storage import Storage
from kdscale.core.types import ConfigError, UnknownField, UnknownName
from kdscale.core.vlm_config import Finetune, Lora, SuiteSpec
from kdscale.sweep.figures import accuracy_figure
from kdscale.sweep.outcomes import NOT_FINISHED
from kdscale.sweep.plan import Plan, make_plan
from kdscale.sweep.report import build_report

SWEEPS = Path(__file__).parent.parent / "sweeps"


def test_the_walk_at_true_size(tmp_path: Path) -> None:
    """One step of both stages for each language model, on data that are drawn."""
    sweep = load_sweep(SWEEPS / "vlm_true_size.py")
    plan = make_plan([sweep], Storage(str(tmp_path)), TRUE_SIZE_CPU, {})
    stages = list(plan.stages.values())
    assert [stage.kind for stage in stages] == ["pretrain", "finetune"] * 2
    assert not plan.missing
    for stage in stages:
        recipe: Any = stage.recipe
        name = "qwen2_0_5b" if "qwen2" in stage.name else "smollm_360m"
        known = LANGUAGE_MODELS[name]
        assert recipe.llm == known.replace(weights="random", tokenizer="mini_lm")
        assert (recipe.vision.weights, recipe.vision.width) == ("random", 192)
        assert stage.total_steps == 1
        assert recipe.precision == "fp32"
        assert (recipe.global_batch_size, recipe.micro_batch_size) == (2, 2)
        assert not recipe.run.deepspeed


def test_what_a_sweep_says_of_a_stage_stands_at_every_scale(tmp_path: Path) -> None:
    """But for learning rates, which are stated at paper scale."""
    own = {"epochs": choose(1, 3), "global_batch_size": 64, "lr": 4e-5}
    vlm = Vlm(vision="vit_t16", recipe="tinyllava", finetune=own)
    plan = make_plan([Sweep(name="x", stages=[vlm])], Storage(str(tmp_path)), MINI, {})
    found = [s.recipe for s in plan.stages.values() if isinstance(s.recipe, Finetune)]
    assert [recipe.epochs for recipe in found] == [1, 3]
    for recipe in found:
        assert recipe.global_batch_size == 64
        assert recipe.micro_batch_size == MINI.vlm_sizes["finetune"].fields["micro_batch_size"]
        assert recipe.lr == pytest.approx(4e-5 * MINI.vlm_sizes["finetune"].lr_factor)


def test_a_sweep_of_vlms_alone_has_a_report_without_accuracies(tmp_path: Path) -> None:
    sweep = load_sweep(SWEEPS / "vlm_true_size.py")
    plan = make_plan([sweep], Storage(str(tmp_path)), TRUE_SIZE_CPU, {})
    report = build_report(plan, [sweep])
    assert accuracy_figure(report, sweep.name) is None
    assert [row.state for row in report.vlms] == [NOT_FINISHED] * 2


FIXED: dict[str, Any] = {"vision": "vit_t16", "recipe": "tinyllava"}
REFERENCE = "embed:0123456789abcdef"


def plan_of(
    root: Path, recipe: Distill | Vlm, *settings: str, scale: Scale = MINI, **paths: str
) -> Plan:
    """Plans one recipe as the command line does: with `--set` and `--data`."""
    scale = scale.replace(data_paths={name.removeprefix("_"): p for name, p in paths.items()})
    sweep = Sweep(name="x", stages=[recipe])
    return make_plan([sweep], Storage(str(root)), scale, parse_settings(settings, scale))


def stages_of(plan: Plan) -> dict[str, Any]:
    """Returns the recipes of a plan's stages by kind."""
    return {stage.kind: stage.recipe for stage in plan.stages.values()}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("warmup_stepps=3", r"'x' has no field 'warmup_stepps'.* pretrain"),
        ("lr=1e-3", "no field 'lr'.*say pretrain.lr or finetune.lr"),
        ("student=swin_t", "no field 'student'"),
        ("finetune.lrr=1", "finetune stage has no field 'lrr'. Did you mean lr"),
        ("pretrain.run.num_workers=1", "no field 'run.num_workers'"),
    ],
)
def test_settings_that_no_recipe_takes_are_refused(
    setting: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UnknownField, match=message):
        plan_of(tmp_path, Vlm(**FIXED), setting)


def test_settings_reach_what_they_name(tmp_path: Path) -> None:
    line = ("seed=3", "llm=smollm_360m", "max_steps=7", "finetune.data=bunny_695k")
    stages = stages_of(plan_of(tmp_path, Vlm(**FIXED), *line))
    for kind in ("pretrain", "finetune"):
        assert stages[kind].seed == 3
        assert stages[kind].llm.name == "mini SmolLM"
        assert stages[kind].max_steps == 7
    assert stages["finetune"].data == MINI.data["bunny_695k"]
    student = Distill(student="vit_t16", loss="clip")
    with pytest.raises(ConfigError, match="'x' has no VLM whose finetune could be set"):
        plan_of(tmp_path, student, "finetune.lr=1e-4")
    assert stages_of(plan_of(tmp_path, Vlm(vision=student), "lr=3e-3"))["distill"].lr == 3e-3


def test_adapters_from_outside_have_their_scale_s_rate(tmp_path: Path) -> None:
    line = ("finetune.trainable=projector+lora", 'finetune.lora={"rank": 8}')
    stage = stages_of(plan_of(tmp_path, Vlm(**FIXED), *line))["finetune"]
    assert stage.lora.rank == 8
    assert stage.lr == pytest.approx(2e-5 * MINI.vlm_sizes["finetune"].lora_lr_factor)
    bunny = stages_of(plan_of(tmp_path, Vlm(**(FIXED | {"recipe": "bunny"}))))["finetune"]
    assert (bunny.lora.rank, bunny.lora.alpha) == (16, 32)
    own = Vlm(**(FIXED | {"recipe": "bunny"}), finetune={"lora": Lora(rank=4, alpha=8)})
    assert stages_of(plan_of(tmp_path, own))["finetune"].lora.rank == 4


def test_a_run_of_a_vlm_is_that_of_its_stages(tmp_path: Path) -> None:
    run = Execution(checkpoint_every=7)
    stages = stages_of(plan_of(tmp_path, Vlm(**FIXED, run=run, finetune={"run": MINI.run})))
    assert (stages["pretrain"].run, stages["finetune"].run) == (run, MINI.run)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["finetune=3"], "say which field, e.g. finetune.lr"),
        (["pretrain.lora=3"], "^Pretrain.lora: .*, got 3$"),
        (['pretrain.lora={"rank": 8}'], "^Pretrain: lora is given exactly where"),
        (["finetune.data=3"], "^Finetune.data.*got 3"),
        (["finetune.data=llava"], "unknown data set 'llava'"),
        (["finetune.llm=smollm_360m"], "both stages have one language model: say llm="),
        (["pretrain.vision=swin_t"], "both stages have one tower: say vision="),
        (["pretrain.seed=1"], "both stages have one seed"),
        (["finetune.projector=null"], "a plan fills in the projector"),
        (["finetune.features=features:0123456789abcdef"], "say feature_cache=True"),
    ],
)
def test_bad_settings_are_one_short_line(settings: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        plan_of(tmp_path, Vlm(**FIXED), *settings)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_sweep_cannot_say_what_both_stages_share() -> None:
    for field in ("vision", "llm", "seed", "projector", "features"):
        with pytest.raises(ConfigError, match=rf"finetune\.{field} cannot be set: .*"):
            Vlm(**FIXED, finetune={field: None})
    with pytest.raises(UnknownField, match="Did you mean lr"):
        Vlm(**FIXED, pretrain=choose({"lr": 1e-3}, {"lrr": 1e-3}))


def test_references_are_for_plans_to_fill_in(tmp_path: Path) -> None:
    student = Distill(student="vit_t16", teacher="clip_b16", views=1)
    for setting in (f"teacher_outputs={REFERENCE}", f"eval_outputs={REFERENCE}"):
        with pytest.raises(ConfigError, match="teacher_outputs='cached'"):
            plan_of(tmp_path, student, setting)
    with pytest.raises(ConfigError, match="teacher_outputs='cached'"):
        plan_of(tmp_path, Vlm(vision=student.replace(teacher_outputs=REFERENCE)))
    assert plan_of(tmp_path, student, "teacher_outputs=cached").trials


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["finetune.siglip_tokens=all"], "pretrain.siglip_tokens is 'drop_first' and finetune"),
        (["pretrain.hierarchical_tokens=stage3"], "'stage3' and finetune.* is 'last'"),
        (["finetune.template=plain"], "finetune.template is 'plain'.*one of qwen2_base"),
        (["pretrain.trainable=projector+llm"], r"'projector\+llm'.* takes the projector alone"),
    ],
)
def test_stages_that_do_not_fit_together_are_refused(
    settings: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_of(tmp_path, Vlm(**FIXED), *settings)


def test_stages_may_differ_in_how_images_are_cut(tmp_path: Path) -> None:
    settings = ("pretrain.siglip_tokens=all", "finetune.siglip_tokens=all")
    assert plan_of(tmp_path, Vlm(**FIXED), *settings, "finetune.image_mode=pad").trials


def chosen_of(recipe: Vlm, **sweep: Any) -> list[dict[str, Any]]:
    """Returns what a sweep's trials choose; their names say it, and no two are alike."""
    trials = Sweep(name="x", stages=[recipe], **sweep).trials()
    assert len({trial.name for trial in trials}) == len(trials)
    for trial in trials:
        told = {k: v for k, v in trial.chosen.items() if k not in ("recipe", "llm", "vision")}
        assert all(f" {k}={v}" in trial.name for k, v in told.items() if "." in k)
    return [trial.chosen for trial in trials]


def test_trials_of_vlms_tell_every_setting_that_varies() -> None:
    found = chosen_of(Vlm(**FIXED, finetune={"lr": choose(1e-5, 2e-5), "epochs": 2}), seeds=(0, 1))
    varied = [(chosen["seed"], chosen["finetune.lr"]) for chosen in found]
    assert varied == [(0, 1e-5), (0, 2e-5), (1, 1e-5), (1, 2e-5)]
    assert all("finetune.epochs" not in chosen for chosen in found)
    found = chosen_of(Vlm(**FIXED, finetune=choose({}, {"lr": 1e-5}), pretrain={"epochs": 2}))
    assert [chosen["finetune.lr"] for chosen in found] == [2e-5, 1e-5]
    found = chosen_of(Vlm(**FIXED, questions=choose(None, "scenes")))
    assert [chosen["questions"] for chosen in found] == [None, "scenes"]
    first = SuiteSpec(name="paper16", limit=5)
    found = chosen_of(Vlm(**FIXED, suite=choose("paper16", first, first.replace(limit=6))))
    assert [chosen["suite"] for chosen in found] == [
        "paper16",
        "paper16 (limit=5)",
        "paper16 (limit=6)",
    ]
    student = Distill(student="vit_t16", loss="clip", epochs=choose(8, 16))
    found = chosen_of(Vlm(vision=student, llm=choose("qwen2_0_5b", "smollm_360m")))
    assert [(c["llm"], c["epochs"]) for c in found] == [
        ("qwen2_0_5b", 8),
        ("qwen2_0_5b", 16),
        ("smollm_360m", 8),
        ("smollm_360m", 16),
    ]


def test_what_vlms_vary_cannot_be_set(tmp_path: Path) -> None:
    recipe = Vlm(**FIXED, finetune={"lr": choose(1e-5, 2e-5)}, suite=choose(None, "paper16"))
    for setting in ("finetune.lr=1e-4", "suite=null"):
        with pytest.raises(ConfigError, match="sweep 'x' varies it"):
            plan_of(tmp_path, recipe, setting)


@pytest.mark.parametrize("name", ["llava_mix_665k", "mini LLaVA mix", "paper16", ""])
def test_paths_of_what_a_scale_draws_are_refused(name: str, tmp_path: Path) -> None:
    recipe = Vlm(**FIXED, suite="paper16" if name == "paper16" else None)
    with pytest.raises(ConfigError, match=rf"--data {name + '=' if name else ''}/d: .*drawn"):
        plan_of(tmp_path, recipe, **{f"_{name}": "/d"})


def test_paths_are_taken_where_data_are_read(tmp_path: Path) -> None:
    recipe = Vlm(**FIXED, suite="paper16")
    plan = plan_of(tmp_path, recipe, scale=PAPER, _="/d/*.tar", llava_mix_665k="/e/*.tar")
    stages = stages_of(plan)
    assert stages["pretrain"].data.urls == "/d/*.tar"
    assert stages["finetune"].data.urls == "/e/*.tar"
    own = {"llava_pretrain_558k": "/p/*.tar", "llava_mix_665k": "/e/*.tar"}
    with pytest.raises(ConfigError, match="no data set takes this path"):
        plan_of(tmp_path, recipe, scale=PAPER, _="/d/*.tar", **own)


def test_questions_of_another_scale_are_left_out_and_noted(tmp_path: Path) -> None:
    note = "questions 'scenes' are not asked: the scale 'paper' has none"
    plan = plan_of(tmp_path, Vlm(**FIXED, questions="scenes"), scale=PAPER)
    assert list(stages_of(plan)) == ["pretrain", "finetune"]
    assert plan.document()["cost"]["notes"] == plan.notes == [note]
    assert not any("questions" in text for text in plan.missing)  # it can be run
    assert note in build_report(plan, []).warnings
    for scale in (MINI, PAPER):
        with pytest.raises(UnknownName, match=r"'scene'\. Did you mean scenes"):
            plan_of(tmp_path, Vlm(**FIXED, questions="scene"), scale=scale)
