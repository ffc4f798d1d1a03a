"""The sweeps of the paper's tables, figures and controls: they can be planned, and how many
distillations they come to.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from kdscale import Sweep
from kdscale.cli_request import load_sweep
from kdscale.core.config import Distill
from kdscale.core.scale import MINI, PAPER, Scale
from kdscale.core.storage import Storage
from kdscale.core.vlm_config import Vlm
from kdscale.sweep.plan import make_plan

SWEEPS = Path(__file__).parent.parent / "sweeps"
DOCS = SWEEPS.parent / "docs" / "sweeps.md"
NAMES = sorted(path.stem for path in SWEEPS.glob("*.py"))
OWN_SCALE = {"quickstart", "photos", "vlm_true_size"}  # data or questions of one scale
STUDY = [name for name in NAMES if name not in OWN_SCALE]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """One storage, so that the miniature benchmarks are drawn once."""
    return Storage(str(tmp_path_factory.mktemp("storage")))


def load(name: str) -> Sweep:
    return load_sweep(SWEEPS / f"{name}.py")


def distillations(sweeps: list[Sweep], storage: Storage) -> set[str]:
    """Returns the keys of the distinct distillations at the paper's scale."""
    plan = make_plan(sweeps, storage, PAPER, {})
    return {key for key, stage in plan.stages.items() if stage.kind == "distill"}


def early(sweep: Sweep) -> Sweep:
    """Returns Figure 3 with the paper's protocol alone: one run of 96 epochs, read on the way."""
    runs = [s for s in sweep.stages if isinstance(s, Distill) and s.epochs == 96]
    return replace(sweep, stages=runs)


@pytest.mark.parametrize("scale", [MINI, PAPER], ids=lambda scale: scale.name)
@pytest.mark.parametrize("name", STUDY)
def test_every_sweep_can_be_planned(name: str, scale: Scale, storage: Storage) -> None:
    sweep = load(name)
    assert (sweep.name, sweep.scale) == (name, "paper")
    plan = make_plan([sweep], storage, scale, {})
    trials = [planned.trial.name for planned in plan.trials]
    assert len(trials) == len(set(trials))
    assert {type(planned.trial.recipe) for planned in plan.trials} <= {Distill, Vlm}
    assert any(stage.kind == "distill" for stage in plan.stages.values())


def test_the_study_has_as_many_distillations_as_counted_by_hand(storage: Storage) -> None:
    tables = [load(name) for name in ("table2_teachers", "table4_losses")]
    assert [len(distillations([table], storage)) for table in tables] == [11, 20]
    assert len(distillations(tables, storage)) == 26
    tables.append(load("table5_data"))
    assert len(distillations(tables, storage)) == 30
    figure3 = load("figure3_duration")
    assert len(distillations([*tables, early(figure3)], storage)) == 32
    assert len(distillations([*tables, figure3], storage)) == 34
    # What the documentation says of each.
    said = re.findall(r"^\| `(\w+)\.py` \|.*\| (\d+) \|$", DOCS.read_text(), re.MULTILINE)
    counts = {name: len(distillations([load(name)], storage)) for name in STUDY}
    assert {name: int(count) for name, count in said if name in STUDY} == counts
    # What the others add: nothing, or what they ask about.
    study = distillations([*tables, figure3], storage)
    for name in ("table1_encoders", "table3_cka", "figure2_gap", "control_openai_labels"):
        assert distillations([load(name)], storage) <= study, name
