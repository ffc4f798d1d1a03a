"""A VLM's benchmarks in plans and reports, with outcomes made by hand; nothing is trained."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from kdscale.core.answers_config import Answers
from kdscale.core.config import Distill, MiniWorld
from kdscale.core.scale import MINI, PAPER, Scale
from kdscale.core.storage import StageStore, Storage
from kdscale.core.types import BadBenchmark, MissingBenchmark, UnknownName
from kdscale.core.vlm_config import SuiteSpec, Vlm
from kdscale.eval import BadItem, score
from kdscale.eval.answers import blocks_of, write_block
from kdscale.eval.benchmarks import BENCHMARKS
from kdscale.eval.sources import questions
from kdscale.mini.benchmarks import write_benchmarks
from kdscale.sweep import suite as suites
from kdscale.sweep.benchmark_outcomes import (
    BenchmarkRow,
    averages,
    interval_of,
    is_limited,
    minus_blind,
)
from kdscale.sweep.cost import image_tokens
from kdscale.sweep.grid import Pivot, Sweep
from kdscale.sweep.grids import benchmark_grid
from kdscale.sweep.outcomes import Outcome, read_outcome
from kdscale.sweep.page import html_page
from kdscale.sweep.plan import Plan, Stage, make_plan
from kdscale.sweep.prepare import prepare
from kdscale.sweep.progress import print_plan
from kdscale.sweep.render import print_report
from kdscale.sweep.report import build_report
from kdscale.sweep.schedule import waiting_trials
from kdscale.sweep.tracked_facts import score_trial, trial_scores
from kdscale.sweep.tracking import Tracker
from kdscale.sweep.vlm_outcomes import VlmRow, family_scores, vlm_rows

Rows = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]
N = 32
WORLD = MiniWorld(split="eval", content="instruct", seed=98, image_px=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All miniature benchmarks."""
    root = tmp_path_factory.mktemp("benchmarks")
    write_benchmarks(root, WORLD, N)
    return root


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """An empty stage store."""
    return Storage(str(tmp_path / "runs"))


def plan_of(storage: Storage, *chosen: Any, scale: Scale = MINI) -> tuple[Plan, Sweep]:
    """Plans a VLM with an untrained tower for each suite."""
    vlms: list[Distill | Vlm] = [
        Vlm(vision="vit_t16", llm="qwen2_0_5b", suite=suite) for suite in chosen
    ]
    table = Pivot(rows="teacher", columns="loss")
    sweep = Sweep(name="suites", stages=vlms, table=table, scale=scale.name)
    return make_plan([sweep], storage, scale, {}), sweep


def answers_in(plan: Plan) -> list[Stage]:
    """The stages of answers."""
    return [stage for stage in plan.stages.values() if isinstance(stage.recipe, Answers)]


def recipe_of(stage: Stage) -> Answers:
    """The recipe of a stage of answers."""
    assert isinstance(stage.recipe, Answers)
    return stage.recipe


def answer(stage: Stage, storage: Storage, prediction: str | None = None) -> Stage:
    """Writes a stage's answers as if a model had given them: the golds, or always the same."""
    recipe, store = recipe_of(stage), StageStore(storage, stage.kind, stage.key)
    asked = questions(recipe.benchmark, recipe.data, recipe.limit, recipe.mode)
    for block in blocks_of(asked):
        golds = [q.gold if isinstance(q.gold, str) else q.gold[0] for q in block.questions]
        texts = golds if prediction is None else [prediction] * len(golds)
        write_block(store, block, texts, [1] * len(texts))
    store.finish({"seconds": 2.0})
    return stage


def outcomes_of(plan: Plan) -> dict[str, Outcome]:
    """What all stages have left."""
    return {key: read_outcome(stage, plan.storage) for key, stage in plan.stages.items()}


def row_of(plan: Plan, place: int = 0) -> VlmRow:
    """The report of a trial."""
    return vlm_rows(plan.trials, outcomes_of(plan), plan.scale)[place]


def suite(folder: Path, *names: str, **fields: Any) -> SuiteSpec:
    """Some of the benchmarks in a folder."""
    return SuiteSpec(name="own", data=str(folder), benchmarks=names, **fields)


def texts(row: VlmRow) -> list[list[str]]:
    """The cells of a VLM's table of benchmarks."""
    return [[words.text for words in line] for line in benchmark_grid(row).rows]


def test_a_plan_asks_all_sixteen_twice(folder: Path, storage: Storage) -> None:
    plan, _ = plan_of(storage, suite(folder))
    stages = answers_in(plan)
    seen = [(recipe_of(stage).benchmark, recipe_of(stage).blind) for stage in stages]
    assert seen == [(name, blind) for name in BENCHMARKS for blind in (False, True)]
    finetune = next(key for key, stage in plan.stages.items() if stage.kind == "finetune")
    assert {stage.inputs for stage in stages} == {(finetune,)}
    assert {stage.num_samples for stage in stages} == {N}
    assert plan.missing == []


def test_keys_follow_questions_not_places(
    folder: Path, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def keys(chosen: SuiteSpec) -> list[str]:
        return [stage.key for stage in answers_in(plan_of(storage, chosen)[0])]

    own = keys(suite(folder, "gqa"))
    shutil.copytree(folder / "gqa", tmp_path / "elsewhere" / "gqa")
    assert keys(suite(tmp_path / "elsewhere", "gqa")) == own
    assert keys(suite(folder, "gqa", batch_size=3)) == own
    assert keys(suite(folder, "gqa", mode="corrected")) == own  # asks the same questions
    assert keys(suite(folder, "gqa", blind=False)) == own[:1]
    assert not set(keys(suite(folder, "gqa", limit=8))) & set(own)
    monkeypatch.chdir(folder)
    relative, _ = plan_of(storage, suite(Path("."), "gqa"))
    assert recipe_of(answers_in(relative)[0]).data == str(folder)  # Ray works elsewhere


def test_questions_are_read_again_only_where_something_changed(
    folder: Path, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = suite(folder, "gqa")
    found = suites.questions_of("gqa", str(folder), chosen, storage)
    monkeypatch.setattr("kdscale.eval.sources.questions", None)
    assert suites.questions_of("gqa", str(folder), chosen, storage) == found
    monkeypatch.setattr(suites, "_reader", lambda: "another")
    with pytest.raises(TypeError):  # it is read
        suites.questions_of("gqa", str(folder), chosen, storage)


def test_the_paper_scale_says_once_what_is_missing(storage: Storage) -> None:
    plan, _ = plan_of(storage, "paper16", SuiteSpec(name="paper16", limit=5), scale=PAPER)
    note = "benchmarks of paper16: say --data paper16=DIR"
    assert plan.missing.count(note) == 1
    assert len(answers_in(plan)) == 2 * 2 * len(BENCHMARKS)
    with (console := Console(width=200)).capture() as capture:
        print_plan(plan, console)
    assert "unknown questions" in capture.get()
    only = Plan(scale=PAPER, storage=storage, stages={s.key: s for s in answers_in(plan)})
    with pytest.raises(MissingBenchmark, match=r"mme_p.*--data"):
        prepare(only, lambda _: None)


def test_wrong_names_and_damaged_files_are_named(
    folder: Path, storage: Storage, tmp_path: Path
) -> None:
    with pytest.raises(UnknownName, match="vqav2"):
        plan_of(storage, suite(folder, "vqav2"))
    with pytest.raises(MissingBenchmark, match="gqa"):
        plan_of(storage, suite(tmp_path / "nowhere", "gqa"))
    broken = tmp_path / "broken" / "ai2d" / "data"
    broken.mkdir(parents=True)
    (broken / "test-00000-of-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(BadBenchmark, match="ai2d"):
        plan_of(storage, suite(broken.parents[1], "ai2d"))


def test_a_trial_waits_until_every_benchmark_is_answered(folder: Path, storage: Storage) -> None:
    names = ("gqa", "mmvp")
    plan, _ = plan_of(storage, suite(folder, *names))
    answer(answers_in(plan)[-1], storage)
    plan, _ = plan_of(storage, suite(folder, *names))
    assert plan.stages[plan.trials[0].key].reused
    assert waiting_trials(plan) == plan.trials
    for stage in answers_in(plan):
        answer(stage, storage)
    plan, _ = plan_of(storage, suite(folder, *names))
    assert waiting_trials(plan) == []  # the model may be gone by now


def test_a_report_shows_light_dark_and_average(folder: Path, storage: Storage) -> None:
    plan, sweep = plan_of(storage, suite(folder))
    for stage in answers_in(plan):
        answer(stage, storage, "#none#" if recipe_of(stage).blind else None)
    row = row_of(plan)
    assert [found.benchmark for found in row.benchmarks] == list(BENCHMARKS)
    assert all(found.sees and found.note == "" for found in row.benchmarks)
    assert row.average is not None
    assert row.average > 90
    assert row.blind_average == 0.0
    with (console := Console(width=160)).capture() as capture:
        print_report(build_report(plan, [sweep]), console)
    shown = capture.get()
    assert "clear of blind and chance: 16 of 16" in shown
    assert f"average of the 16, MME-P / 20: {row.average:.2f}, without images 0.00" in shown
    assert re.search(rf"{row.average:.2f} +0.00 +16 of 16", shown)


def test_of_many_trials_a_line_each_is_printed_and_the_rest_is_folded(
    folder: Path, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdscale.sweep.render.MAX_DETAILED", 0)
    plan, sweep = plan_of(storage, suite(folder, "gqa"))
    answer(answers_in(plan)[0], storage)
    report = build_report(plan, [sweep])
    shown: dict[bool, str] = {}
    for details in (False, True):
        with (console := Console(width=160)).capture() as capture:
            print_report(report, console, details=details)
        shown[details] = capture.get()
    own, hint = f"Benchmarks of {row_of(plan).name}", "1 trials: kdscale report --details"
    assert (own in shown[False], hint in shown[False]) == (False, True)
    assert (own in shown[True], hint in shown[True]) == (True, False)
    page = html_page(report, storage)
    fold = page[page.index("<details>") : page.index("</details>")]
    assert own in fold
    assert page.count(own) == 1


def test_mlflow_has_a_vlms_scores_before_the_sweep_ends(
    folder: Path, storage: Storage, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    plan, sweep = plan_of(storage, suite(folder, "gqa", "mmvp"), suite(folder, "ai2d"))
    for stage in plan.stages.values():
        if not isinstance(stage.recipe, Answers):
            stage.store(storage).finish({"seconds": 1.0})
        elif stage.recipe.benchmark != "ai2d":
            answer(stage, storage, "#none#" if stage.recipe.blind else None)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    Tracker(uri, sweep.name, plan, scored=partial(score_trial, plan, sweep)).sync()
    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name("kdscale/suites")
    assert found is not None
    ids, over = [found.experiment_id], "tags.level = 'trial' and attributes.status = 'FINISHED'"
    (run,) = client.search_runs(ids, over)
    expected = trial_scores(build_report(plan, [sweep]), sweep.name)
    assert run.data.metrics == expected[str(run.info.run_name)]
    assert (run.data.metrics["benchmark/gqa"], run.data.metrics["benchmark_blind/gqa"]) == (100, 0)
    assert found.tags["mlflow.experiment.primaryMetric.name"] == "vlm_average"


def test_what_is_not_finished_is_not_counted(folder: Path, storage: Storage) -> None:
    plan, _ = plan_of(storage, suite(folder, "gqa", "mmvp"))
    answer(answers_in(plan)[0], storage)
    row = row_of(plan)
    assert [line[1:3] for line in texts(row)] == [
        ["100.0 [80.6, 100.0]", "–"],
        ["not finished", "–"],
    ]
    assert benchmark_grid(row).notes == []
    assert (row.average, row.state) == (None, "not finished")
    answer(answers_in(plan)[1], storage, "#none#")
    assert benchmark_grid(row_of(plan)).notes == ["clear of blind and chance: 1 of 1"]
    answer(answers_in(plan)[2], storage)
    assert [line[5] for line in texts(row_of(plan))] == [f"{N}", f"{N // 2} pairs"]


def test_two_modes_share_answers_and_keep_their_rules(folder: Path, storage: Storage) -> None:
    plan, _ = plan_of(storage, suite(folder, "gqa"), suite(folder, "gqa", mode="corrected"))
    assert len(answers_in(plan)) == 2
    for stage in answers_in(plan):
        asked = questions("gqa", folder)
        gold = max({q.gold for q in asked}, key=[q.gold for q in asked].count)
        answer(stage, storage, f"The {gold}!")
    strict, lenient = (row_of(plan, place).benchmarks[0] for place in (0, 1))
    assert (strict.mode, lenient.mode) == ("paper", "corrected")
    assert strict.score is not None
    assert lenient.score is not None
    assert strict.score.value == 0.0 < lenient.score.value


def test_images_that_add_something_are_told_by_the_same_questions(
    folder: Path, storage: Storage
) -> None:
    """A paired interval clear of 0, though the intervals of both scores overlap."""
    plan, _ = plan_of(storage, suite(folder, "ocrbench"))
    for stage in answers_in(plan):
        recipe, store = recipe_of(stage), StageStore(storage, stage.kind, stage.key)
        (block,) = blocks_of(questions(recipe.benchmark, recipe.data))
        known = 12 if recipe.blind else 18
        right = [q.gold if isinstance(q.gold, str) else q.gold[0] for q in block.questions]
        said = [text if place < known else "#none#" for place, text in enumerate(right)]
        write_block(store, block, said, [1] * len(said))
        store.finish({})
    row = row_of(plan).benchmarks[0]
    assert row.score is not None
    assert row.blind is not None
    assert row.minus_blind is not None
    assert interval_of("ocrbench", row.score).low < interval_of("ocrbench", row.blind).high
    assert row.minus_blind.difference == pytest.approx(100 * 6 / N)
    assert row.minus_blind.interval.low > 0
    assert row.sees
    (line,) = texts(row_of(plan))
    assert line[3].startswith("+18.8 [+")
    assert row.document()["minus_blind"]["n"] == N


@pytest.mark.parametrize(("limit", "is_cut"), [(8, True), (N + 1, False), (None, False)])
def test_only_a_limit_that_leaves_something_out_is_one(
    folder: Path, storage: Storage, limit: int | None, is_cut: bool
) -> None:
    plan, _ = plan_of(storage, suite(folder, "mmvp", limit=limit))
    answer(answers_in(plan)[0], storage)
    assert row_of(plan).benchmarks[0].limited is is_cut
    recipe = recipe_of(answers_in(plan)[0]).replace(limit=300)
    assert not is_limited(recipe, 300)  # all that the original has
    assert is_limited(recipe, None)


def test_answers_cost_what_the_model_reads_and_writes(folder: Path, storage: Storage) -> None:
    plan, _ = plan_of(storage, suite(folder, "gqa"))
    light, dark = answers_in(plan)
    model: Any = next(s.recipe for s in plan.stages.values() if s.kind == "finetune")
    per_token, images = 2e6 * model.llm.mparams, image_tokens(model.vision)
    assert dark.flops == pytest.approx(N * per_token * 90)
    added = per_token * images + 1e9 * model.vision.facts.image_gflop
    assert light.flops == pytest.approx(dark.flops + N * added)
    assert (light.num_samples, light.total_steps) == (N, N)
    absent, _ = plan_of(storage, "paper16", scale=PAPER)
    first = next(s for s in answers_in(absent) if recipe_of(s).benchmark == "mmmu")
    assert (first.num_samples, first.estimated) == (None, True)
    assert first.flops is not None
    assert first.flops > 900 * 2e6 * 360 * 100  # 900 questions, as the original has


def test_a_limit_is_said_and_has_no_average(folder: Path, storage: Storage) -> None:
    plan, _ = plan_of(storage, suite(folder, limit=8))
    for stage in answers_in(plan):
        answer(stage, storage)
    row = row_of(plan)
    assert averages(row.benchmarks) == (None, None)
    assert any(
        note.startswith("first questions only: mme_p, ") for note in benchmark_grid(row).notes
    )


def test_damaged_answers_do_not_end_a_report(folder: Path, storage: Storage) -> None:
    plan, _ = plan_of(storage, suite(folder, "gqa", "mmvp"))
    for stage in answers_in(plan):
        answer(stage, storage)
    first = answers_in(plan)[0].store(storage)
    storage.write(b"torn", *first.parts, "output", "00000.parquet")
    row = row_of(plan)
    assert texts(row)[0][1] == "no score"
    assert row.benchmarks[0].score is None
    assert "is damaged" in row.document()["benchmarks"][0]["note"]
    assert row.benchmarks[1].score is not None


@pytest.mark.parametrize(("benchmark", "right"), [("gqa", True), ("mme_p", True), ("gqa", False)])
def test_no_spread_is_no_certainty(folder: Path, benchmark: str, right: bool) -> None:
    """One image alone shows nothing, though its only score is 100."""
    asked = questions(benchmark, folder, limit=2)
    items = [q.item(str(q.gold)) | {"image_sha256": "1"} for q in asked]
    one = score(benchmark, items)
    none = score(benchmark, [item | {"prediction": "#none#"} for item in items])
    blind = [item | {"prediction": "#none#"} for item in items]
    row = BenchmarkRow(
        benchmark=benchmark,
        mode="paper",
        score=one,
        blind=none,
        limited=True,
        minus_blind=minus_blind(benchmark, items, blind, "paper"),
    )
    assert one.interval[0] == one.interval[1]
    assert not row.sees
    found = interval_of(benchmark, one if right else none)
    assert found.low < found.high
    assert found.low <= (one if right else none).value <= found.high


def rewritten(folder: Path, target: Path, name: str, rows: Rows) -> None:
    """Writes a benchmark's file anew with other rows."""
    file = next((folder / name).rglob("*.parquet"))
    place = target / file.relative_to(folder)
    place.parent.mkdir(parents=True)
    table = pq.read_table(file)
    pq.write_table(pa.Table.from_pylist(rows(table.to_pylist()), schema=table.schema), place)


def test_what_cannot_be_scored_is_not_asked(folder: Path, tmp_path: Path) -> None:
    def changed(change: dict[str, Any]) -> Rows:
        return lambda rows: [*rows[:3], rows[3] | change, *rows[4:]]

    rewritten(folder, tmp_path, "mme_p", changed({"answer": "Yes "}))
    with pytest.raises(BadItem, match="mme_p item '3'"):
        questions("mme_p", tmp_path)
    rewritten(folder, tmp_path, "ocrbench", changed({"question_type": "Formula"}))
    with pytest.raises(BadItem, match="ocrbench item '3'"):
        questions("ocrbench", tmp_path)
    golds = ["", *["stop"] * 9]  # one of ten people said nothing
    rewritten(folder, tmp_path, "textvqa", changed({"answers": golds}))
    asked = questions("textvqa", tmp_path)[3]
    assert score("textvqa", [asked.item("stop")]).value == 100.0


def test_answers_none_of_which_counts_have_no_score(
    folder: Path, storage: Storage, tmp_path: Path
) -> None:
    rewritten(
        folder, tmp_path, "scienceqa", lambda rows: [row for row in rows if row["image"] is None]
    )
    plan, _ = plan_of(storage, suite(tmp_path, "scienceqa", mode="corrected"))
    for stage in answers_in(plan):
        answer(stage, storage)
    row = row_of(plan)
    assert row.benchmarks[0].note.startswith("scienceqa: none of the 8 items counts")
    assert texts(row)[0][1] == "no score"


def test_a_kind_of_question_is_seen_by_the_paired_difference_to_blind() -> None:
    def rows(seeing: list[int], blind: list[int]) -> list[dict[str, Any]]:
        return [
            {
                "family": "colour",
                "group": str(number),
                "gold": "red",
                "prediction": "red" if light else "blue",
                "blind_prediction": "red" if dark else "blue",
                "chance": 0.25,
            }
            for number, (light, dark) in enumerate(zip(seeing, blind, strict=True))
        ]

    better = family_scores(rows([1] * 30 + [0] * 30, [1] * 20 + [0] * 40))[0]  # all of them, and 10
    assert better.interval.low < better.blind_interval.high  # apart they could not be told
    assert better.minus_blind.difference == pytest.approx(100 / 6)
    assert better.sees
    same = family_scores(rows([1] * 30 + [0] * 30, [0] * 30 + [1] * 30))[0]
    assert not same.sees
    alike = family_scores(rows([1, 1, 1], [0, 0, 0]))[0]  # no spread: as wide as two scores
    assert alike.minus_blind.interval.low < 0 < alike.minus_blind.interval.high
    assert not alike.sees
