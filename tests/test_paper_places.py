"""The study's sweeps fill every cell of the paper's tables; stages are not needed to see that."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kdscale import Pretrained
from kdscale.cli_request import load_sweep
from kdscale.core.config import Distill
from kdscale.core.scale import PAPER
from kdscale.core.storage import Storage
from kdscale.core.vlm_config import Vlm
from kdscale.eval.benchmarks import BENCHMARKS
from kdscale.sweep.beside import Beside, beside
from kdscale.sweep.beside_runs import Measured
from kdscale.sweep.measure import student_names, vlm_names
from kdscale.sweep.paper_figures import table_named
from kdscale.sweep.places import AVERAGE, CKA, IMAGENET
from kdscale.sweep.plan import make_plan

SWEEPS = Path(__file__).parent.parent / "sweeps"
NOT_OURS: set[tuple[str, ...]] = set()  # rows that no sweep of the study can fill


def numbers(recipe: Distill | Vlm) -> Iterator[Measured]:
    """Everything that a trial of this recipe measures; the values mean nothing."""
    eye = recipe if isinstance(recipe, Distill) else recipe.vision
    if isinstance(eye, Distill):
        own = replace(student_names(eye), value=1.0)
        metrics = [IMAGENET, CKA + IMAGENET]
        if recipe.cka_with == eye.teacher:
            metrics += [CKA + name for name in BENCHMARKS]
        yield from (replace(own, metric=metric) for metric in metrics)
    if isinstance(recipe, Vlm):
        own = replace(vlm_names(recipe, None), value=1.0)
        yield from (replace(own, metric=metric) for metric in (*BENCHMARKS, AVERAGE))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> list[Distill | Vlm]:
    """The recipes of every trial of the tables and figures."""
    paths = sorted([*SWEEPS.glob("table*.py"), *SWEEPS.glob("figure*.py")])
    storage = Storage(str(tmp_path_factory.mktemp("storage")))
    plan = make_plan([load_sweep(path) for path in paths], storage, PAPER, {})
    return [planned.trial.recipe for planned in plan.trials]


def gaps(found: Beside) -> set[tuple[str, ...]]:
    """Table and row of every cell that has no number of ours."""
    return {
        (table.paper.name, *row.labels)
        for table in found.tables
        for row, ours in zip(table.paper.rows, table.ours, strict=True)
        if None in ours
    }


def test_the_study_leaves_no_cell_empty(study: list[Distill | Vlm]) -> None:
    (found,) = beside([one for recipe in study for one in numbers(recipe)])
    assert found.variant == "mode=paper"
    assert gaps(found) == NOT_OURS
    assert not any(verdict.count("not run") for verdict in found.ours)


def test_the_rows_of_the_released_student_say_whose_they_are(study: list[Distill | Vlm]) -> None:
    vlms = [recipe for recipe in study if isinstance(recipe, Vlm)]
    taught = [one for recipe in vlms for one in numbers(recipe)]
    given = Vlm(vision=Pretrained("/weights/t.pt", student="vit_t16"), recipe="bunny")
    other = Vlm(vision=Pretrained("/weights/s.pt", student="swin_t"), recipe="bunny")
    added = [replace(one, value=2.0) for vlm in (given, other) for one in numbers(vlm)]

    def notes(runs: list[Measured]) -> list[str]:
        table = table_named(beside(runs)[0], "table1")
        return [note.text for note in table.notes]

    (note,) = notes(taught)
    assert "taught by CLIP-ViT-B on CC12M" in note
    here, there = sorted(notes([*taught, *added]))
    assert here.startswith("Ours: taught by CLIP-ViT-B")
    assert "Bunny with Qwen2-0.5B" not in here
    assert there == "Ours: the given weights, vit_t16 of /weights/t.pt (Bunny with Qwen2-0.5B)"
    table = table_named(beside([*taught, *added])[0], "table1")
    values = {
        row.labels[:2]: ours[0] and ours[0].value
        for row, ours in zip(table.paper.rows, table.ours, strict=True)
        if row.labels[2] == "CLIP-KD-ViT-T"
    }
    assert sorted(filter(None, values.values())) == [1.0, 1.0, 1.0, 2.0]
    assert values["Bunny", "Qwen2-0.5B"] == 2.0
    assert notes([]) == []
