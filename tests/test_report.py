"""The report of a study whose stage store is written by hand."""

from __future__ import annotations

import io
import json
import math
import re
import subprocess
import sys

import pytest
from rich.console import Console
from studies import (
    CLASSES,
    KEYS,
    LABELS,
    NUM_IMAGES,
    STEPS,
    Study,
    answers,
    finish,
    make_sweep,
    recipe,
    tower,
    write_journal,
    write_scores,
)

from kdscale.analysis.stats import bootstrap_interval, paired_difference
from kdscale.core.storage import Storage
from kdscale.core.types import DataError, UnknownName
from kdscale.sweep.grid import Pivot, choose
from kdscale.sweep.outcomes import Predictions, compare, score_of
from kdscale.sweep.page import html_page, write_html
from kdscale.sweep.render import print_report
from kdscale.sweep.report import build_report
from kdscale.sweep.sheet import sheet_figure


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Some trials finished, one under way, one not begun, one without predictions."""
    study = Study(tmp_path_factory.mktemp("study"), [make_sweep()])
    storage = study.storage
    finish(study.teacher("base"), storage, answers(36))
    finish(study.stage("clip_b16", "clip_kd"), storage, answers(30), cka=0.625)
    finish(study.stage("clip_b16", "mse"), storage, answers(4, start=2), cka=math.nan)
    finish(study.stage("siglip_so400m", "mse"), storage, None)
    finish(study.stage(None, "clip"), storage, answers(16), order=range(NUM_IMAGES)[::-1])
    write_journal(study.teacher("siglip"), storage, 2)
    return study


@pytest.fixture(scope="module")
def page(study, tmp_path_factory):
    """The page of the study."""
    target = tmp_path_factory.mktemp("page") / "deep" / "report.html"
    write_html(study.report(), study.plan, target)
    return target.read_text(encoding="utf-8")


def printed(report, width=150):
    """Returns what the terminal shows."""
    console = Console(width=width, file=io.StringIO())
    print_report(report, console)
    return console.file.getvalue()


def test_scores_have_n_chance_and_interval(study):
    row = study.row(study.report(), "clip_b16", "clip_kd")
    right = [a == b for a, b in zip(answers(30), LABELS, strict=True)]
    expected = bootstrap_interval(right)
    assert (row.state, row.score.n, row.score.chance) == ("done", NUM_IMAGES, 25.0)
    assert row.score.top1 == 75.0
    assert row.score.interval.low == pytest.approx(100 * expected.low)
    assert row.score.interval.high == pytest.approx(100 * expected.high)
    assert (row.cka_debiased, row.cka_biased, row.seconds) == (0.625, 0.725, 75.0)
    assert row.total_steps == row.step == STEPS


def test_difference_is_paired_by_key_and_keeps_its_sign(study):
    report = study.report()
    better, worse = (study.row(report, "clip_b16", loss).difference for loss in ("clip_kd", "mse"))
    own = [a == b for a, b in zip(answers(30), LABELS, strict=True)]
    control = [a == b for a, b in zip(answers(16), LABELS, strict=True)]
    expected = paired_difference(own, control)
    assert better.points == pytest.approx(100 * expected.difference) == pytest.approx(35.0)
    assert better.interval.low == pytest.approx(100 * expected.interval.low)
    assert better.controls == ("vit_t16 alone clip",)
    assert worse.points == pytest.approx(-30.0)
    assert worse.interval.high < 0 < better.interval.low
    assert (better.n, better.verdict, worse.verdict) == (NUM_IMAGES, "better", "worse")
    baseline = study.row(report, None, "clip")
    assert (baseline.is_baseline, baseline.difference) == (True, None)


def test_what_is_not_finished_has_no_number(study):
    report = study.report()
    row = study.row(report, "siglip_so400m", "clip_kd")
    assert (row.state, row.step) == ("not finished", None)
    assert row.score is row.difference is row.cka_debiased is row.seconds is None
    cell = report.tables[0].cells["siglip_so400m", "clip_kd"]
    assert (cell.value, cell.num_done, cell.num_trials) == (None, 0, 1)
    assert "not finished" in printed(report)
    assert report.message().startswith("5 of 7 stages are finished. For the rest run: kdscale run")


def test_finished_stage_without_predictions_says_so(study, page):
    row = study.row(study.report(), "siglip_so400m", "mse")
    assert (row.state, row.score, row.difference) == ("done", None, None)
    assert "zero_shot.parquet does not exist" in row.note
    assert "no score" in page


def test_neither_broken_nor_unmarked_output_counts(tmp_path):
    study = Study(tmp_path, [make_sweep()])
    finish(study.stage(None, "clip"), study.storage, answers(16))
    parts = study.stage(None, "clip").store(study.storage).parts
    study.storage.write(b"not parquet", *parts, "output", "zero_shot.parquet")
    row = study.row(study.report(), None, "clip")
    assert (row.state, row.score) == ("done", None)
    assert "is not a table of predictions" in row.note
    study.storage.remove(*parts, "DONE")
    row = study.row(study.report(), None, "clip")
    assert (row.state, row.score, row.step) == ("not finished", None, STEPS)


def test_undefined_cka_is_null_and_named(study, page):
    report = study.report()
    row = study.row(report, "clip_b16", "mse")
    assert math.isnan(row.cka_debiased)
    assert "CKA is undefined" in row.note
    document = next(t for t in report.document()["trials"] if t["key"] == row.key)
    assert document["cka_debiased"] is None
    assert "undefined" in page


def test_teachers_have_scores_and_towers(study):
    base, siglip = study.report().teachers
    assert (base.name, base.roles, base.state) == ("base", ("clip_b16",), "done")
    assert base.score.top1 == 90.0
    facts = (base.width, base.patch_px, base.image_px, base.tokenizer, base.loss)
    assert facts == (96, 16, 64, "mini_bpe", "clip")
    assert (siglip.state, siglip.step, siglip.score) == ("not finished", 2, None)
    assert (siglip.tokenizer, siglip.loss) == ("mini_sp", "sigmoid")
    assert "2 of 4" in printed(study.report())


def test_given_teachers_need_no_stage(tmp_path):
    given = tower("base", width=96, weights="/models/base")
    sweep = make_sweep(stages=[recipe(teacher=given), recipe(loss="clip")])
    row = Study(tmp_path, [sweep]).report().teachers[0]
    assert (row.key, row.state, row.loss, row.score) == (None, "pretrained", None, None)


def test_document_is_strict_json(study):
    document = json.loads(json.dumps(study.report().document(), allow_nan=False))
    assert document.keys() >= {"scale", "message", "command", "trials", "teachers", "tables"}
    trial = document["trials"][0]
    assert trial.keys() >= {"sweep", "name", "chosen", "key", "state", "total_steps", "seconds"}
    assert (trial["zero_shot_top1"], trial["n"], trial["chance"]) == (75.0, NUM_IMAGES, 25.0)
    assert set(trial["interval"]) == {"low", "high"}
    assert trial["difference"]["points"] == pytest.approx(35.0)
    unfinished = next(t for t in document["trials"] if t["state"] == "not finished")
    assert unfinished["zero_shot_top1"] is unfinished["interval"] is None
    cell = document["tables"][0]["cells"][0]
    assert (cell["row"], cell["column"], cell["value"]) == ("clip_b16", "clip_kd", 75.0)


def test_terminal_keeps_numbers_whole(study):
    report = study.report()
    interval = study.row(report, "clip_b16", "clip_kd").score.interval
    for width in (80, 100, 120, 160):
        text = printed(report, width)
        assert f"[{interval.low:.1f}, {interval.high:.1f}]" in text
        assert max(map(len, text.splitlines())) <= width


def test_page_has_numbers_curves_and_images(study, page):
    interval = study.row(study.report(), "clip_b16", "clip_kd").score.interval
    assert f"75.0 [{interval.low:.1f}, {interval.high:.1f}]" in page
    assert all(f"{points} [" in page for points in ("+35.0", "-30.0"))
    assert page.count("<svg") == 5
    assert page.count("data:image/png;base64,") == 24
    assert "not finished" in page
    assert "prefers-color-scheme:dark" in page


def test_page_needs_nothing_from_elsewhere(page):
    assert "http" not in page
    assert not re.search(r"<(script|link|iframe)|@import|\ssrc=", page)
    assert set(re.findall(r"url\((.)", page)) <= {"#"}
    assert set(re.findall(r'href="(.)', page)) <= {"#", "d"}


def test_names_are_escaped(tmp_path):
    sweep = make_sweep(name="<script>alert(1)</script>")
    text = html_page(Study(tmp_path, [sweep]).report(), Storage(str(tmp_path)))
    assert "<script>" not in text


def test_nothing_finished_says_what_to_run(tmp_path):
    study = Study(tmp_path, [make_sweep()])
    report = build_report(study.plan, study.sweeps, command="kdscale run little.py --scale dots")
    expected = "Nothing is finished yet (0 of 7 stages). Run: kdscale run little.py --scale dots"
    assert printed(report).strip() == report.message() == expected
    text = html_page(report, study.storage)
    assert expected in text
    assert (text.count("<svg"), text.count("Nothing to draw")) == (0, 5)


def test_seeds_have_controls_of_their_own_and_are_averaged(tmp_path):
    stages = [recipe(teacher="clip_b16"), recipe(loss="clip")]
    study = Study(tmp_path, [make_sweep(stages=stages, seeds=(0, 1))])
    for seed, (taught, alone) in enumerate([(20, 12), (30, 10)]):
        finish(study.stage("clip_b16", "clip_kd", seed), study.storage, answers(taught))
        finish(study.stage(None, "clip", seed), study.storage, answers(alone))
    report = study.report()
    points = [row.difference.points for row in report.trials if row.difference]
    assert points == pytest.approx([20.0, 50.0])
    cell = report.tables[0].cells["clip_b16", "clip_kd"]
    assert (cell.value, cell.num_done, cell.num_trials) == (pytest.approx(62.5), 2, 2)
    assert cell.interval.low < 62.5 < cell.interval.high
    assert "mean of 2" in printed(report)


def test_changed_benchmark_shows_no_wrong_images(tmp_path):
    study = Study(tmp_path, [make_sweep()])
    finish(study.stage(None, "clip"), study.storage, answers(16), order=range(NUM_IMAGES)[::-1])
    with pytest.raises(DataError, match="the benchmark has changed since"):
        sheet_figure(study.report(), "little", study.storage)


def test_a_report_counts_only_its_own_sweeps(tmp_path):
    other = make_sweep(name="other", stages=[recipe(teacher="clip_b16", loss="icl")], baseline=None)
    study = Study(tmp_path, [make_sweep(), other])
    report = build_report(study.plan, [other])
    assert [row.name for row in report.teachers] == ["base"]
    assert len(report.outcomes) == 2
    assert len(report.of("other")) == len(report.trials) == 1


def test_requests_that_no_trial_can_meet_are_named(tmp_path):
    table = Pivot(rows="teacher", columns="loss", value="average")
    sweep = make_sweep(table=table, baseline={"loss": "icl"})
    study = Study(tmp_path, [sweep])
    finish(study.stage(None, "clip"), study.storage, answers(16))
    missing, unknown = study.report().warnings
    assert "no trial is the baseline {'loss': 'icl'}" in missing
    assert "no finished trial has 'average'" in unknown
    with pytest.raises(UnknownName, match="techer"):
        build_report(study.plan, [make_sweep(table=Pivot(rows="techer", columns="loss"))])


def test_certainty_is_not_claimed():
    every = Predictions(keys=KEYS, labels=LABELS, answers=LABELS)
    score = score_of(every, len(CLASSES))
    assert (score.top1, score.method) == (100.0, "wilson")
    assert score.interval.low < 95.0


def test_keys_repeated_in_shards_are_paired_by_occurrence():
    first = Predictions(keys=["a", "a", "b"], labels=[0, 1, 2], answers=[0, 0, 2])
    second = Predictions(keys=["b", "a", "a"], labels=[2, 0, 1], answers=[0, 0, 0])
    found = compare(first, {"control": second})
    assert (found.n, found.points) == (3, pytest.approx(100 / 3))
    assert compare(first, {"c": Predictions(keys=["c"], labels=[0], answers=[0])}) is None


def test_a_report_needs_neither_torch_nor_ray():
    heavy = "{'torch', 'ray', 'mlflow', 'open_clip', 'transformers'}"
    code = f"import sys; import kdscale.sweep.report; print(len({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "0"


def test_a_student_read_at_an_epoch_is_scored_there(tmp_path):
    early = recipe(teacher="clip_b16", epochs=2, read_epoch=choose(1, 2))
    table = Pivot(rows="read_epoch", columns="teacher")
    study = Study(tmp_path, [make_sweep(stages=[early], baseline=None, table=table)])
    (key,) = {planned.key for planned in study.plan.trials}
    stage = study.plan.stages[key]
    write_scores(stage, study.storage, answers(10), "-epoch-0001")
    finish(stage, study.storage, answers(30))
    finish(study.teacher("base"), study.storage, answers(35))
    report = study.report()
    assert [row.score.top1 for row in report.trials] == [25.0, 75.0]
    assert [row.step for row in report.trials] == [STEPS, STEPS]
    cells = {row: cell.value for (row, _), cell in report.tables[0].cells.items()}
    assert cells == {"1": 25.0, "2": 75.0}
    assert "All 2 stages" in report.message()
    assert html_page(report, study.storage)
