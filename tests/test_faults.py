"""The fault matrix's own parts: its results, its table, its checks; and one row whole."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from faults import check
from faults.__main__ import main, page
from faults.check import CHECKS, Outcome
from faults.disturb import FAULTS, full
from faults.processes import wait_for
from faults.results import (
    BEGIN,
    END,
    FAILED,
    NOT_RUN,
    PASSED,
    Row,
    append_row,
    left_to_do,
    read_rows,
    table,
    verdict,
    write_block,
)

TESTS = Path(__file__).parent
WELL = dict.fromkeys(CHECKS, "")
CONTROL = Outcome(
    outputs={"distill/a/student.pt": "1", "evaluate/b/scores.json": "2"},
    steps={"distill/a": [{"step": 1, "total": 0.5}, {"step": 2, "total": 0.25}], "evaluate/b": []},
    metrics={"distill/a": {"loss": [1, 2]}},
    runs={"distill/a": 1, "evaluate/b": 1},
)


def row(fault: str, seed: int, status: str = PASSED, **fields: object) -> Row:
    return Row(fault, seed, status, **({"checks": WELL, "runs": 1} | fields))  # pyright: ignore


def test_a_matrix_goes_on_where_it_was_broken_off(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    wanted = [("worker", 0), ("worker", 1), ("cut", 0)]
    assert left_to_do(wanted, read_rows(file)) == wanted
    append_row(file, row("worker", 0, repeated=3))
    append_row(file, Row("cut", 0, NOT_RUN, why="not root"))
    with file.open("a") as half:
        half.write('{"fault": "worker", "se')
    assert left_to_do(wanted, read_rows(file)) == [("worker", 1), ("cut", 0)]
    append_row(file, row("worker", 1, FAILED))
    append_row(file, row("cut", 0))
    rows = read_rows(file)
    assert left_to_do(wanted, rows) == []
    assert rows["worker", 0].repeated == 3
    assert rows["cut", 0].status == PASSED


def test_a_row_passes_only_if_every_check_was_made_and_found_nothing() -> None:
    assert verdict(WELL) == PASSED
    assert verdict(WELL, why="Missed: no moment") == FAILED
    assert verdict(WELL | {"orphans": "left: raylet"}) == FAILED
    assert verdict({name: "" for name in CHECKS if name != "resources"}) == FAILED


def test_the_table_tells_what_passed_what_failed_and_what_was_not_run() -> None:
    rows = [
        row("worker", 0, repeated=2, seconds=61.2),
        row("worker", 1, FAILED, checks=WELL | {"mlflow": "a | b"}, repeated=5, seconds=80.0),
        Row("cut", 0, NOT_RUN, why="only root can"),
    ]
    lines = table(rows, {"worker": "a worker", "cut": "a cut", "head": "a head"}).splitlines()
    assert lines[2:] == [
        "| a worker | 1 of 2 | 1 x | 2-5 | 61-80 s | seed 1: mlflow: a / b |",
        "| a cut | - | - | - | - | not run: only root can |",
        "| a head | - | - | - | - | not run yet |",
    ]


def test_a_page_keeps_what_people_have_written(tmp_path: Path) -> None:
    file = tmp_path / "page.md"
    file.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    for text in ("new", "newer \\1"):
        write_block(file, text)
        assert file.read_text() == f"before\n{BEGIN}\n{text}\n{END}\nafter\n"
    file.write_text("no block")
    with pytest.raises(ValueError, match="needs the lines"):
        write_block(file, "new")
    assert all(fault.title in page([]) for fault in FAULTS.values())


def test_the_checks_find_nothing_in_the_same_outcome() -> None:
    same = Outcome.from_json(CONTROL.to_json())
    assert check.finished(CONTROL, same, 0) == ""
    assert check.identical(CONTROL, same) == ""
    assert check.tracked(CONTROL, same) == ""


def test_the_checks_find_what_is_different() -> None:
    assert "1" in check.finished(CONTROL, CONTROL, 1)
    assert "in time" in check.finished(CONTROL, CONTROL, None)
    unfinished = replace(CONTROL, steps={"distill/a": CONTROL.steps["distill/a"]})
    assert check.finished(CONTROL, unfinished, 0) == "not finished: evaluate/b"

    other = {"distill/a/student.pt": "3", "distill/a/more": "4"}
    steps = {"distill/a": [{"step": 1, "total": 0.5}, {"step": 2, "total": 0.26}], "evaluate/b": []}
    wrong = check.identical(CONTROL, replace(CONTROL, outputs=other, steps=steps))
    for words in ("student.pt differs", "more is too much", "scores.json is missing", "step 2 on"):
        assert words in wrong

    twice = replace(CONTROL, repeated=2)
    assert check.identical(CONTROL, twice) == ""
    assert "2 steps were done twice" in check.identical(CONTROL, twice, told=True)
    for there, words in (([1, 1, 2], "twice [1]"), ([2], "missing [1]"), ([1, 2, 3], "unknown")):
        found = replace(CONTROL, metrics={"distill/a": {"loss": there}})
        assert words in check.tracked(CONTROL, found)
    assert "2 runs" in check.tracked(CONTROL, replace(CONTROL, runs={"distill/a": 2}))


def test_what_is_held_or_left_is_named() -> None:
    assert check.held({"CPU": 4.0, "memory": 9.0}, {"CPU": 4.0, "memory": 1.0}) == ""
    assert check.held({"CPU": 4.0, "GPU": 1.0}, {"CPU": 3.0}) == "1 of 4 CPU held; 1 of 1 GPU held"
    assert check.orphans([]) == ""
    assert check.orphans(["raylet"]) == "left: raylet"


def test_speed_is_not_a_result() -> None:
    lines = [{"step": 1, "total": 0.5, "time": 3.0, "samples_per_s": 7.0, "attempt": "0"}]
    assert check.results_in(lines) == [{"step": 1, "total": 0.5}]


def test_a_full_machine_is_shown_to_the_memory_monitor() -> None:
    usual = "MemTotal: 1000000 kB\nMemFree: 5 kB\nMemAvailable: 700000 kB\nCached: 9 kB\n"
    shown = dict(line.split(":") for line in full(usual).splitlines())
    assert int(shown["MemTotal"].split()[0]) == 1_000_000
    assert int(shown["MemAvailable"].split()[0]) < 20_000


def test_orphans_are_adopted_and_ended() -> None:
    program = """
import os, subprocess
from faults.processes import adopt, below, end_all, wait_for
adopt()
commands = lambda: sorted(process.command for process in below(os.getpid()))
subprocess.run(["sh", "-c", "sleep 321 & sleep 322 &"])
wait_for(lambda: commands() == ["sleep 321", "sleep 322"], "orphans", 60)
with subprocess.Popen(["sleep", "323"]) as other:
    wait_for(lambda: "sleep 323" in commands(), "another", 60)
    end_all(but=[other.pid])
    print(commands())
    end_all()
print(commands())
"""
    env = os.environ | {"PYTHONPATH": str(TESTS)}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert done.stdout == "['sleep 323']\n[]\n", done.stderr


def test_waiting_ends() -> None:
    assert wait_for(lambda: "found", "it", 1) == "found"
    with pytest.raises(TimeoutError, match="in vain for the impossible"):
        wait_for(lambda: None, "the impossible", 0.05)


def test_the_sweep_has_every_kind_of_stage_and_workers_of_its_own(tmp_path: Path) -> None:
    import fault_sweep

    from kdscale.core.scale import MINI
    from kdscale.core.storage import Storage
    from kdscale.sweep.plan import make_plan

    plan = make_plan([fault_sweep.sweep], Storage(str(tmp_path)), MINI, {})
    kinds = {stage.recipe.kind for stage in plan.stages.values()}
    assert kinds == {"embed", "distill", "pretrain", "finetune", "evaluate"}
    assert all(s.recipe.run.num_workers == 1 for s in plan.stages.values() if s.recipe.run)


def test_unknown_faults_and_long_paths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no fault flood"):
        main(["--only", "flood"])
    with pytest.raises(SystemExit, match="shorter path"):
        main(["--work", str(tmp_path / ("long" * 20))])


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(3600)
def test_a_row_passes() -> None:
    work = tempfile.mkdtemp(prefix="faults", dir="/tmp")
    options = ["--work", work, "--only", "worker", "--seeds", "0", "--patience", "3"]
    try:
        done = subprocess.run([sys.executable, "-m", "faults", *options], cwd=TESTS)
        assert done.returncode == 0
        assert read_rows(Path(work, "results.jsonl"))["worker", 0].status == PASSED
    finally:
        shutil.rmtree(work, ignore_errors=True)
