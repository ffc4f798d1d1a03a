"""VLM sweeps as plans; nothing is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kdscale.cli import load_sweep
from kdscale.core.catalog import LANGUAGE_MODELS
from kdscale.core.scale import TRUE_SIZE_CPU
from kdscale.core.storage import Storage
from kdscale.sweep.figures import accuracy_figure
from kdscale.sweep.outcomes import NOT_FINISHED
from kdscale.sweep.plan import make_plan
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


def test_a_sweep_of_vlms_alone_has_a_report_without_accuracies(tmp_path: Path) -> None:
    sweep = load_sweep(SWEEPS / "vlm_true_size.py")
    plan = make_plan([sweep], Storage(str(tmp_path)), TRUE_SIZE_CPU, {})
    report = build_report(plan, [sweep])
    assert accuracy_figure(report, sweep.name) is None
    assert [row.state for row in report.vlms] == [NOT_FINISHED] * 2
