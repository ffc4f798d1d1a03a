"""The numbers of finished trials under the names of the paper; stages are finished by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from test_report import Study, answers, finish, make_sweep, recipe
from test_suite import answer, answers_in, folder, recipe_of, storage, suite

from kdscale.core.config import CkaSpec, Distill
from kdscale.core.eval_config import Cka
from kdscale.core.scale import MINI
from kdscale.core.storage import Storage
from kdscale.core.vlm_config import Vlm
from kdscale.eval.benchmarks import BENCHMARKS
from kdscale.sweep.beside import beside
from kdscale.sweep.beside_grids import counts
from kdscale.sweep.beside_runs import Measured, place_of, places_of
from kdscale.sweep.grid import Sweep, choose
from kdscale.sweep.measure import measured
from kdscale.sweep.paper_figures import table_named
from kdscale.sweep.places import encoder, student
from kdscale.sweep.plan import make_plan
from kdscale.sweep.report import build_report

__all__ = ["folder", "storage"]  # fixtures


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Two students with two seeds each, one of which ignores its images, and a control."""
    taught = recipe(teacher=choose("clip_b16", "siglip_so400m"), epochs=32)
    control = recipe(loss="clip", epochs=32)
    sweeps = [
        make_sweep(name=name, stages=[taught, control], seeds=(0, 1)) for name in ("one", "again")
    ]
    study = Study(tmp_path_factory.mktemp("study"), sweeps)
    for seed in (0, 1):
        right = answers(30 + 2 * seed)
        finish(study.stage("clip_b16", "clip_kd", seed), study.storage, right, cka=0.625)
        finish(study.stage(None, "clip", seed), study.storage, answers(16))
    finish(study.stage("siglip_so400m", "clip_kd"), study.storage, [1] * 40, cka=math.nan)
    return study


def test_students_are_measured_once_by_role_and_seed(study: Study) -> None:
    found = measured(study.report(), study.plan)
    mine = [one for one in found if one.teacher == "clip_b16"]
    assert [(one.metric, one.seed, one.value) for one in mine] == [
        ("imagenet", 0, 75.0),
        ("cka:imagenet", 0, 0.625),
        ("imagenet", 1, 80.0),
        ("cka:imagenet", 1, 0.625),
    ]
    first = mine[0]
    names = (first.student_or_encoder, first.loss, first.data, first.epochs, first.framework)
    assert names == ("vit_t16", "clip_kd", "cc12m", 32, None)
    assert (first.n, first.chance, first.constant, mine[1].interval) == (40, 25.0, False, None)
    assert first.influence is not None
    assert first.influence.variance == pytest.approx(100 * 100 * 0.75 * 0.25 / 40)
    assert place_of(first) == student("imagenet", "CLIP-ViT-B")
    constant = [one for one in found if one.teacher == "siglip_so400m"]
    assert [(one.metric, one.constant) for one in constant] == [("imagenet", True)]
    assert len([one for one in found if one.teacher is None]) == 2


def test_the_batch_size_of_the_study_is_named(study: Study) -> None:
    (found,) = beside(measured(study.report(), study.plan))
    assert found.variant == "global_batch_size=2"
    cell = table_named(found, "table2").ours[2][0]
    assert cell is not None
    assert (cell.value, cell.seeds) == (77.5, 2)
    gone = table_named(found, "table2").ours[0][0]
    assert gone is not None
    assert gone.flags == ("at chance", "one answer")
    assert found.elsewhere == 2  # the control


def answered(
    stages: list[Distill | Vlm], storage: Storage, words: dict[str, str] | None = None
) -> list[Measured]:
    """Plans VLMs, answers all questions, and returns what was measured."""
    sweep = Sweep(name="vlms", stages=stages, scale="mini")
    plan = make_plan([sweep], storage, MINI, {})
    for stage in answers_in(plan):
        answer(stage, storage, (words or {}).get(recipe_of(stage).benchmark))
    return measured(build_report(plan, [sweep]), plan)


def test_a_vlm_has_its_benchmarks_and_their_average(folder: Path, storage: Storage) -> None:
    words = {"gqa": "#none#", "textvqa": "yes"}
    found = answered([Vlm(vision="clip_l14", suite=suite(folder, blind=False))], storage, words)
    assert [one.metric for one in found] == [*BENCHMARKS, "average"]
    assert {one.constant for one in found if one.metric in words} == {True}
    average = found[-1]
    assert place_of(average) == encoder("average", "TinyLLaVA", "Qwen2-0.5B", "CLIP-ViT-L")
    parts = [one.value / (20 if one.metric == "mme_p" else 1) for one in found[:-1]]
    assert average.value == pytest.approx(sum(parts) / 16)
    assert average.n == sum(one.n for one in found[:-1])
    assert average.interval is not None
    assert average.interval.low <= average.value <= average.interval.high
    cell = table_named(beside(found)[0], "table1").ours[2][0]
    assert cell is not None
    assert cell.value == average.value


def test_scoring_and_students_are_told_apart(folder: Path, storage: Storage) -> None:
    taught = Distill(student="vit_t16", teacher="clip_b16", zero_shot=None)
    vlms = [
        Vlm(vision=taught, suite=suite(folder, "gqa", "mmvp", blind=False, mode=mode))
        for mode in ("paper", "corrected")
    ]
    found = answered([*vlms, vlms[0].replace(recipe="bunny")], storage)
    assert [(one.vlm_variant, one.metric) for one in found] == [
        ("", "gqa"),
        ("", "mmvp"),
        ("scored by corrected rules", "gqa"),
        ("scored by corrected rules", "mmvp"),
        ("", "gqa"),
        ("", "mmvp"),
    ]
    assert place_of(found[1]) == student("mmvp", "CLIP-ViT-B")
    first, second = beside(found)
    assert (first.variant, second.variant) == ("", "scored by corrected rules")
    assert first.elsewhere == 0  # the paper has one student in Bunny: this one
    (mmvp,) = [one for one in found if (one.framework, one.metric) == ("bunny", "mmvp")]
    assert encoder("mmvp", "Bunny", "Qwen2-0.5B", "CLIP-KD-ViT-T") in places_of(mmvp)


def test_cka_with_the_own_teacher_stands_in_table_3(folder: Path, storage: Storage) -> None:
    taught = Distill(student="vit_t16", teacher="clip_b16", zero_shot=None)
    found: dict[str, list[Measured]] = {}
    for other in ("clip_b16", "clip_l14"):
        chosen = suite(folder, "gqa", blind=False)
        vlm = Vlm(vision=taught, suite=chosen, cka_with=other, cka=CkaSpec(zero_shot=False))
        sweep = Sweep(name=other, stages=[vlm], scale="mini")
        plan = make_plan([sweep], storage, MINI, {})
        for stage in plan.stages.values():
            if isinstance(stage.recipe, Cka):
                store = stage.store(storage)
                written = {"debiased": 0.7, "biased": 0.8, "n": 31, "notes": []}
                storage.write_json(written, *store.parts, "output", "cka.json")
                store.finish({})
        found[other] = measured(build_report(plan, [sweep]), plan)
    (one,) = found["clip_b16"]
    assert (one.metric, one.value, one.n, one.framework) == ("cka:gqa", 0.7, 31, None)
    assert found["clip_l14"] == []  # not its teacher
    cell = table_named(beside([one])[0], "table3").ours[1][1]
    assert cell is not None
    assert (cell.value, cell.interval) == (0.7, None)
    assert counts(cell) == "31 images × 1"  # beside scores of so many questions
