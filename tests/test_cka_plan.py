"""Comparisons in plans, as stages and in reports; the towers are drawn, nothing is trained."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from asking import save
from conftest import jpeg
from PIL import Image
from rich.console import Console
from worlds import vit

from kdscale.core.answers_config import Answers
from kdscale.core.config import DataSpec, Distill, Execution, MiniWorld, TowerSpec, ZeroShotSpec
from kdscale.core.eval_config import Cka, ImageModelSpec
from kdscale.core.journal import read_steps
from kdscale.core.scale import MINI, Scale
from kdscale.core.storage import StageStore, Storage
from kdscale.core.types import DataError, UnknownName
from kdscale.core.vlm_config import SuiteSpec, Vlm
from kdscale.data.samples import decode
from kdscale.eval.answers import blocks_of, write_block
from kdscale.eval.sources import questions
from kdscale.mini.benchmarks import write_benchmarks
from kdscale.models.taps import load_tower_of
from kdscale.models.towers import build_clip, save_clip
from kdscale.models.vlm import load_vlm
from kdscale.stages.images import find_images
from kdscale.stages.worker import _work
from kdscale.sweep.grid import Sweep, choose
from kdscale.sweep.grids import cka_grids
from kdscale.sweep.orders import group_job
from kdscale.sweep.plan import Plan, Stage, make_plan
from kdscale.sweep.prepare import prepare
from kdscale.sweep.progress import describe_line, print_plan
from kdscale.sweep.report import build_report
from kdscale.sweep.schedule import waiting_trials

NAMES = ("gqa", "mmvp")
WORLD = MiniWorld(split="eval", content="instruct", seed=98, image_px=32)
HELD_OUT = MiniWorld(split="eval", num_samples=12, samples_per_shard=6, image_px=32, seed=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Miniature benchmarks."""
    root = tmp_path_factory.mktemp("benchmarks")
    write_benchmarks(root, WORLD, 32)
    return root


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same ones of other scenes."""
    root = tmp_path_factory.mktemp("others")
    write_benchmarks(root, WORLD.replace(seed=1), 32)
    return root


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> tuple[TowerSpec, TowerSpec]:
    """Two drawn towers as directories."""
    root, found = tmp_path_factory.mktemp("towers"), []
    for name, spec, seed in (("eye", vit(), 1), ("reference", vit(24, 48), 2)):
        save_clip(build_clip(spec, seed=seed), spec, root / name)
        found.append(spec.replace(name=name, weights=str(root / name)))
    return found[0], found[1]


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """An empty stage store."""
    return Storage(str(tmp_path / "runs"))


def scale(folder: Path) -> Scale:
    """The miniature scale with two benchmarks and a dozen zero-shot images."""
    suite = SuiteSpec(name="two", data=str(folder), benchmarks=NAMES)
    data = DataSpec(name="held out", mini=HELD_OUT, max_bad_fraction=0.0)
    known = {"imagenet": ZeroShotSpec(name="mini", data=data, classnames="mini", templates="mini")}
    return MINI.replace(suites={"two": suite}, zero_shot=known, run=Execution(num_workers=0))


def plan_of(storage: Storage, at: Scale, *recipes: Distill | Vlm) -> tuple[Plan, Sweep]:
    """Plans trials."""
    sweep = Sweep(name="alike", stages=list(recipes), scale=at)
    return make_plan([sweep], storage, at, {}), sweep


def comparisons(plan: Plan) -> list[Stage]:
    """The comparisons of a plan."""
    return [stage for stage in plan.stages.values() if stage.kind == Cka.kind]


def about(stage: Stage) -> tuple[str, str, str, str]:
    """Says what is compared with what, where and how."""
    recipe: Any = stage.recipe
    return recipe.a.name, recipe.b.name, recipe.images.name, recipe.tap


def test_a_vlm_is_compared_on_each_benchmark_and_on_the_zero_shot_images(
    folder: Path, storage: Storage, towers: tuple[TowerSpec, TowerSpec]
) -> None:
    eye, other = towers
    given: dict[str, Any] = {"vision": eye, "suite": "two", "cka_with": other}
    plan, _ = plan_of(storage, scale(folder), Vlm(**given))
    assert [about(s) for s in comparisons(plan)] == [
        ("eye", "reference", name, "patch_mean") for name in (*NAMES, "held out")
    ]
    (trial,) = plan.trials
    assert plan.stages[trial.key].kind == "answers"
    assert list(trial.path[-3:]) == [stage.key for stage in comparisons(plan)]
    assert [stage.num_samples for stage in comparisons(plan)][-1] == 12
    few = {"taps": ("vlm",), "zero_shot": False, "layers": "final", "n": 5}
    plan, _ = plan_of(storage, scale(folder), Vlm(**given, cka=few))
    finetune = next(key for key, stage in plan.stages.items() if stage.kind == "finetune")
    for stage in comparisons(plan):
        recipe: Any = stage.recipe
        assert recipe.a.weights == f"stage:finetune/{finetune}"
        assert (stage.inputs, stage.num_samples, recipe.layers) == ((finetune,), 5, "final")
    with (console := Console(width=160)).capture() as capture:
        print_plan(plan, console)
    line = "CKA of VLM of eye with reference, vlm, on gqa, mmvp: 10 images, 2 stages, 2 to run"
    assert line in capture.get().replace("\n", " ")


def test_a_student_is_compared_with_a_teacher_that_moves_along(
    folder: Path, storage: Storage
) -> None:
    """One stage for each pair and set, whoever asks; keys of what is trained stay."""
    at, teacher = scale(folder), choose("clip_b16", "clip_l14")
    plain = Distill(student="vit_t16", teacher=teacher, loss="kl")
    asked = plain.replace(cka_with=teacher, cka={"suite": "two"})
    vlm = Vlm(vision=plain.output, suite="two", cka_with=plain.teacher)
    plan, _ = plan_of(storage, at, asked, vlm)
    trained = [k for k, s in plan.stages.items() if s.kind in ("teacher", "distill")]
    without, _ = plan_of(storage, at, plain)
    assert trained == list(without.stages)
    assert [(a, b) for a, b, _, _ in map(about, comparisons(plan))] == [
        ("mini ViT-T/16", role) for role in ("mini CLIP B/16",) * 3 + ("mini CLIP L/14",) * 3
    ]
    assert [plan.shared_by(stage.key) for stage in comparisons(plan)] == [2] * 6
    first = comparisons(plan)[0]
    assert [plan.stages[key].kind for key in first.inputs] == ["teacher", "distill"]
    assert [plan.stages[trial.key].kind for trial in plan.trials[:2]] == ["distill"] * 2
    control = Distill(student="vit_t16", loss="clip")
    alone = control.replace(cka_with=control.teacher)
    assert not comparisons(plan_of(storage, at, alone)[0])
    with pytest.raises(UnknownName, match="clip_b61"):
        plan_of(storage, at, control.replace(cka_with="clip_b61"))


def test_a_key_follows_towers_and_images_not_places(
    folder: Path,
    others: Path,
    storage: Storage,
    towers: tuple[TowerSpec, TowerSpec],
    tmp_path: Path,
) -> None:
    def keys(where: Path, **fields: Any) -> list[str]:
        recipe = Vlm(vision=towers[0], suite="two", cka_with=towers[1], **fields)
        return [stage.key for stage in comparisons(plan_of(storage, scale(where), recipe)[0])]

    own = keys(folder)
    shutil.copytree(folder, tmp_path / "moved")
    assert keys(tmp_path / "moved") == own
    assert keys(folder, llm="smollm_360m") == own  # another VLM of the same tower
    assert not set(keys(folder, cka={"n": 5})) & set(own)
    assert not set(keys(others)[:2]) & set(own)
    assert keys(others)[2] == own[2]


def finish(plan: Plan) -> None:
    """Runs comparisons in this process, and answers benchmarks by their golds."""
    jobs = []
    for stage in plan.stages.values():
        store = stage.store(plan.storage)
        if isinstance(stage.recipe, Cka):
            jobs.append(group_job(stage, "", plan.storage))
        elif isinstance(stage.recipe, Answers):
            recipe = stage.recipe
            asked = questions(recipe.benchmark, recipe.data, recipe.limit, recipe.mode)
            for block in blocks_of(asked):
                golds = [q.gold if isinstance(q.gold, str) else q.gold[0] for q in block.questions]
                write_block(store, block, golds, [1] * len(golds))
            store.finish({})
    _work({"jobs": [replace(job, lease=None) for job in jobs], "in_group": False})


def test_what_comes_out_stands_beside_the_scores(
    folder: Path, storage: Storage, towers: tuple[TowerSpec, TowerSpec]
) -> None:
    recipe = Vlm(vision=towers[0], suite="two", cka_with=towers[1])
    at = scale(folder)
    plan, sweep = plan_of(storage, at, recipe)
    assert [row.state for row in build_report(plan, [sweep]).comparisons] == ["not finished"] * 3
    own = {stage.key: stage for stage in comparisons(plan)}
    prepare(Plan(scale=at, storage=storage, stages=own), lambda _: None)
    finish(plan)
    report = build_report(plan, [sweep])
    rows = report.comparisons
    assert [(row.images, row.state) for row in rows] == [(n, "done") for n in (*NAMES, "held out")]
    for row in rows[:2]:
        assert row.biased is not None
        assert 0 < row.biased <= 1
        asked = questions(row.images, folder)
        assert row.n == len({q.image_sha256 for q in asked if q.image_sha256})
        assert row.score == 100.0
    assert (rows[2].n, rows[2].score) == (12, None)
    (grid,) = cka_grids(rows)
    assert [line[0].text for line in grid.rows] == [*NAMES, "held out"]
    assert grid.rows[0][1].text == f"{rows[0].n} images"
    assert grid.rows[0][2].text == f"{rows[0].debiased:.3f} ({rows[0].biased:.3f}), 100.0"
    documents = report.document()["cka"]
    assert [d["debiased"] for d in documents] == [row.debiased for row in rows]
    first = comparisons(plan)[0].store(storage)
    assert storage.names(*first.parts, "output") == ["cka.json", "cka.npz", "cka.png"]
    (line,) = read_steps(first)
    assert describe_line(line, 1).startswith(f"{rows[0].n} images  CKA {rows[0].debiased:.3f}  ")
    again, _ = plan_of(storage, at, recipe)
    assert all(stage.reused for stage in comparisons(again))


def test_a_trial_waits_for_its_comparisons(
    folder: Path, storage: Storage, towers: tuple[TowerSpec, TowerSpec]
) -> None:
    recipe = Distill(student="vit_t16", loss="clip", cka_with=towers[1])
    plan, _ = plan_of(storage, scale(folder), recipe)
    StageStore(storage, "distill", plan.trials[0].key).finish({})
    plan, _ = plan_of(storage, scale(folder), recipe)
    assert waiting_trials(plan) == plan.trials
    comparisons(plan)[0].store(storage).finish({})
    plan, _ = plan_of(storage, scale(folder), recipe)
    assert waiting_trials(plan) == []


def test_images_that_have_changed_are_named(
    folder: Path, others: Path, storage: Storage, towers: tuple[TowerSpec, TowerSpec]
) -> None:
    plan, _ = plan_of(
        storage, scale(folder), Vlm(vision=towers[0], suite="two", cka_with=towers[1])
    )
    recipe: Any = comparisons(plan)[0].recipe
    with pytest.raises(DataError, match=r"the images of gqa .* have changed"):
        find_images(recipe.images.replace(data=str(others)), storage)


def test_of_a_vlm_the_projector_speaks(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    place = save(tmp_path / "stages" / "finetune" / "ab" / "output")
    spec = ImageModelSpec(name="vlm", library="vlm", weights="stage:finetune/ab")
    eye = load_tower_of(spec, storage)
    rgb = [decode(jpeg(seed)) for seed in range(3)]
    pixels = torch.from_numpy(np.stack([eye.render(image) for image in rgb]))
    with torch.no_grad():
        found = eye.vectors(pixels, "vlm", "all")
        model, processor = load_vlm(place)
        whole: Any = model
        prepared = processor.image_processor([Image.fromarray(i) for i in rgb], return_tensors="pt")
        expected = whole.get_image_features(prepared["pixel_values"]).pooler_output
    assert list(found) == ["block 1", "final"]
    assert torch.allclose(found["final"], torch.stack(list(expected)).mean(dim=1), atol=1e-6)
