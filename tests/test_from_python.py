"""A sweep from Python, on a study whose stage store is written by hand."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from studies import Study as Store
from studies import answers, finish, make_sweep

from kdscale import Study
from kdscale.core.types import UnfinishedStage, UnknownName


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """One student and its control finished."""
    store = Store(tmp_path_factory.mktemp("python"), [make_sweep()])
    finish(store.stage("clip_b16", "clip_kd"), store.storage, answers(30), cka=0.625)
    finish(store.stage(None, "clip"), store.storage, answers(16))
    return store


@pytest.fixture(scope="module")
def study(store: Store) -> Study:
    return Study(store.sweeps[0], storage=store.storage.root, scale=store.scale)


def test_rows_are_the_reports_numbers(store: Store, study: Study) -> None:
    rows = {(row["teacher"], row["loss"]): row for row in study.rows()}
    assert len(rows) == 5
    row, reported = rows["clip_b16", "clip_kd"], store.row(store.report(), "clip_b16", "clip_kd")
    assert (row["zero_shot_top1"], row["n"], row["chance"]) == (75.0, 40, 25.0)
    assert (row["low"], row["high"]) == (reported.score.interval.low, reported.score.interval.high)
    assert row["difference"] == 35.0
    assert row["difference_low"] < 35.0 < row["difference_high"]
    assert (row["key"], row["cka_debiased"], row["state"]) == (reported.key, 0.625, "done")


def test_rows_of_what_is_not_finished_have_no_number(study: Study) -> None:
    rows = {(row["teacher"], row["loss"]): row for row in study.rows()}
    row = rows["siglip_so400m", "mse"]
    assert row["state"] == "not finished"
    assert row.keys() == rows[None, "clip"].keys()
    numbers = ("zero_shot_top1", "low", "high", "n", "difference", "cka_debiased", "seconds")
    assert [row[name] for name in numbers] == [None] * len(numbers)


@pytest.mark.parametrize("name", ["scores", "accuracy", "loss", "cka", "samples"])
def test_figures_are_those_of_the_report(study: Study, name: str) -> None:
    target = io.BytesIO()
    study.figure(name).savefig(target, format="png")
    assert target.tell() > 5000


def test_figures_that_cannot_be_drawn_say_why(study: Study, tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="scores"):
        study.figure("score")
    empty = Study(study.sweep, storage=str(tmp_path), scale=study.scale)
    with pytest.raises(UnfinishedStage, match=r"no trial is finished.*Run: study\.run\(\)"):
        empty.figure("scores")


def test_settings_are_those_of_the_command_line(study: Study) -> None:
    other = Study(
        study.sweep, study.storage, study.scale, {"max_steps": 2, "run": {"log_every": 3}}
    )
    stages = other.plan().stages.values()
    assert {stage.total_steps for stage in stages} == {2}
    assert {stage.recipe.run.log_every for stage in stages if stage.recipe.run} == {3}
    assert {row["state"] for row in other.rows()} == {"not finished"}


def test_data_may_lie_elsewhere(store: Store, study: Study, tmp_path: Path) -> None:
    copy = tmp_path / "copy.tar"
    copy.write_bytes(Path(store.scale.data["cc12m"].urls).read_bytes())
    moved = replace(study, data={"train": str(copy)})
    assert {stage.recipe.data.urls for stage in moved.plan().stages.values()} == {str(copy)}
    assert [row["key"] for row in moved.rows()] == [row["key"] for row in study.rows()]
    with pytest.raises(UnknownName, match="unknown data set 'trian'"):
        replace(study, data={"trian": "x.tar"}).plan()


def test_plan_and_report_are_printed(study: Study) -> None:
    console = Console(width=150, file=io.StringIO())
    study.show_plan(console)
    study.show(console)
    text = console.file.getvalue()
    assert "7 distinct stages" in text
    assert "75.0" in text
