"""Findings of a study whose stage store is written by hand."""

from __future__ import annotations

import pytest
from studies import NUM_IMAGES, Study, answers, finish, make_sweep, recipe

from kdscale.core.types import ConfigError
from kdscale.sweep.findings import find, tally
from kdscale.sweep.findings_views import finding_grid, write_findings
from kdscale.sweep.grid import Pivot, choose

RIGHT = {"clip_kd": (30, 31, 29), "mse": (12, 13, 11), "kl": (30, 30, 30)}
CKA = {"clip_kd": (0.60, 0.62, 0.61), "mse": (0.70, 0.71, 0.72), "kl": (0.61, 0.60, 0.63)}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """One teacher, three losses, three seeds; of a second teacher only one loss is finished."""
    taught = recipe(teacher=choose("clip_b16", "siglip_so400m"), loss=choose(*RIGHT))
    sweep = make_sweep(
        "losses",
        stages=[taught],
        seeds=(0, 1, 2),
        baseline={"loss": "clip_kd"},
        table=Pivot(rows="teacher", columns="loss"),
        question="Which loss?",
    )
    study = Study(tmp_path_factory.mktemp("study"), [sweep])
    for loss, right in RIGHT.items():
        for seed, count in enumerate(right):
            stage = study.stage("clip_b16", loss, seed)
            finish(stage, study.storage, answers(count), cka=CKA[loss][seed])
    finish(study.stage("siglip_so400m", "mse"), study.storage, answers(8))
    return study


@pytest.fixture(scope="module")
def findings(study):
    """Its findings by metric."""
    found = find(study.report(), study.plan, study.sweeps[0])
    return {one.metric: one for one in found}


def test_means_are_over_seeds_with_an_interval(findings):
    top1 = findings["imagenet"]
    assert top1.names == (("clip_b16", "siglip_so400m"), ("clip_kd", "mse", "kl"))
    mean = top1.mean("clip_b16", "mse")
    assert (mean.value, mean.seeds) == (pytest.approx(100 * 12 / NUM_IMAGES), 3)
    assert mean.half_width() > 0
    assert top1.mean("siglip_so400m", "clip_kd") is None


def test_differences_are_judged_and_what_was_not_run_stays_out(findings):
    top1 = findings["imagenet"]
    worse, same = (top1.difference("clip_b16", loss) for loss in ("mse", "kl"))
    assert worse.found.value == pytest.approx(-45.0)
    assert (worse.outcome, same.outcome) == ("contradicted", "undecided")
    assert top1.difference("siglip_so400m", "mse").outcome == "not run"
    assert 0 < worse.detectable < 45
    cka = findings["cka:imagenet"].difference("clip_b16", "mse")
    assert (cka.outcome, cka.found.value) == ("holds", pytest.approx(0.1))


def test_tables_say_n_seeds_interval_and_outcome(findings):
    grid = finding_grid(findings["imagenet"])
    assert grid.title == f"Zero-shot top-1, % (n={NUM_IMAGES} a run, 1 or 3 seeds)"
    texts = [[words.text for words in row] for row in grid.rows]
    rows = [dict(zip(grid.columns, row, strict=True)) for row in texts]
    worse = rows[0]
    assert (worse["teacher"], worse["loss"]) == ("clip_b16", "mse")
    assert worse["clip_kd"].startswith("75.0 ± ")
    assert worse["change"].startswith("-45.0 ± ")
    assert (worse["p"], worse["result"]) == ("<0.001", "lower")
    assert 0 < float(worse["detects"]) < 45
    absent = rows[2]
    assert (absent["teacher"], absent["mean"] != "–") == ("siglip_so400m", True)
    assert (absent["clip_kd"], absent["result"]) == ("–", "not run")
    assert "nan" not in str(grid)


def test_what_was_not_run_is_not_undecided(findings):
    words = tally(findings["imagenet"])
    assert "of 4 differences to clip_kd 1 clear and negative, 1 undecided, 2 not run." in words
    assert "power of 0.8" in words
    assert "one seed" not in words


def test_one_seed_is_said_to_be_one(tmp_path):
    taught, alone = recipe(teacher="clip_b16", loss="clip_kd"), recipe(loss="clip")
    table = Pivot(rows="student", columns="teacher")
    sweep = make_sweep("one", stages=[taught, alone], table=table)
    study = Study(tmp_path, [sweep])
    for trial in study.plan.trials:
        finish(study.plan.stages[trial.key], study.storage, answers(20))
    (top1,) = find(study.report(), study.plan, sweep)
    assert "With one seed" in tally(top1)


def test_a_page_keeps_what_people_wrote(findings, tmp_path):
    page = tmp_path / "findings.md"
    found = list(findings.values())
    paths = write_findings(page, "losses", "Which loss?\n\nSay.", found, "kdscale findings x.py")
    assert [path.exists() for path in paths] == [True, True]
    first = page.read_text()
    assert "> Which loss?" in first
    assert "| teacher | loss | mean | clip_kd |" in first
    page.write_text(first.replace("# Findings", "# What we found") + "\nIt is mse's fault.\n")
    write_findings(page, "losses", "Another question", found, "kdscale findings x.py")
    write_findings(page, "others", "A third", found, "kdscale findings x.py")
    text = page.read_text()
    assert text.startswith("# What we found")
    assert "It is mse's fault." in text
    assert "Which loss?" not in text
    assert text.count("<!-- findings of losses -->") == text.count("## others") == 1


def test_what_no_teacher_can_have_is_not_compared(study):
    sweep = make_sweep("losses", table=Pivot(rows="loss", columns="teacher"))
    found = find(study.report(), study.plan, sweep)
    assert [one.metric for one in found] == ["imagenet"]


def test_a_sweep_without_a_reference_column_is_refused(study):
    sweep = make_sweep("other", baseline={"teacher": None})
    with pytest.raises(ConfigError, match="baseline="):
        find(study.report(), study.plan, sweep)
