"""A sweep whose driver is killed twice and one of whose trials has a bug: the rest is finished."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest
from test_drivers import (
    STEPS,
    TRAINING,
    assert_each_step_once,
    attempts,
    in_training,
    stages,
    wait_for,
)
from test_study import SWEEP, Study, kill, runs_in

from kdscale.core.journal import read_steps
from kdscale.core.lease import Lease
from kdscale.core.stage_log import LogReader
from kdscale.core.storage import StageStore

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(2400)]
BUG = 'raise RuntimeError("the well is poisoned")'
POISONED = SWEEP.replace(
    TRAINING,
    f"""
calls = []
def poisoned(student_image, student_text, teacher_image, teacher_text, scale, teacher_scale):
    calls.append(None)
    if len(calls) % 3 == 0:
        {BUG}
    return (student_image * student_text).sum()
distill = Distill(
    student=vit(16), teacher=vit(24), loss=choose("kl", poisoned, "icl", "clip_kd"), data=data,
    zero_shot=None, global_batch_size=4, epochs=2, warmup_steps=2, precision="fp32", views=2,
    teacher_outputs="cached", run=Execution(num_workers=0, checkpoint_every=4, log_every=1),
)
sweep = Sweep(name="poisoned", stages=[distill], scale="true_size_cpu")
if __name__ == "__main__":
    sweep.main()
""",
).replace("import DataSpec", "import choose, DataSpec")
LINE = next(number for number, line in enumerate(POISONED.splitlines(), 1) if BUG in line)


@pytest.fixture
def study(tmp_path: Path, shards: str) -> Study:
    return Study(tmp_path, shards, POISONED)


def done(study: Study) -> list[StageStore]:
    return [stage for stage in stages(study) if stage.is_done()]


def files(stage: StageStore) -> dict[Path, int]:
    """Returns what a stage consists of, with the time of each file's last change."""
    return {path: path.stat().st_mtime_ns for path in Path(stage.url()).rglob("*")}


def killed_when(
    study: Study, condition: Callable[[], Any], what: str, killer: Callable[[Popen[str]], None]
) -> Any:
    """Runs the study until something holds, and kills it."""
    process = study.start()
    try:
        return wait_for(condition, what)
    finally:
        killer(process)


def kill_driver(process: Popen[str]) -> None:
    """Kills a driver alone: Ray's processes, the writers of stages among them, outlive it."""
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def run_to_its_end(study: Study) -> str:
    process = study.start()
    output, _ = process.communicate(timeout=1000)
    assert process.returncode == 1, output[-3000:]
    return output


def assert_told(study: Study, output: str) -> None:
    """Checks that the summary names the one trial that failed, with its error, file and line."""
    _, line, *_ = output[output.index("1 trial(s) failed") :].splitlines()
    name, _, error = line.partition(": ")
    assert "poisoned" in name
    place = f"({study.file}:{LINE}, in poisoned)"
    assert error.endswith(f"failed: RuntimeError: the well is poisoned {place}")


def assert_one_writer_at_a_time(stage: StageStore) -> None:
    found = attempts(stage)
    for lines in found:
        assert_each_step_once(stage, lines)
    for before, after in pairwise(found):
        assert before[-1]["time"] <= after[0]["time"], stage.url()


def test_a_sweep_survives_kills_of_its_driver_and_a_bug_in_one_trial(study: Study) -> None:
    killed_when(study, lambda: done(study), "a finished stage", kill_driver)
    stage = killed_when(study, lambda: in_training(study), "a stage in training", kill)
    at, before, finished = time.time(), len(attempts(stage)), done(study)
    kept = {each.url(): files(each) for each in finished}

    output = run_to_its_end(study)
    assert_told(study, output)
    # The start of Python and Ray is most of it; `test_drivers` bounds it where a driver waits.
    print(f"gone on with after {attempts(stage)[before][0]['time'] - at:.1f} s")
    assert {each.url(): files(each) for each in finished} == kept
    (poisoned,) = [each for each in stages(study) if not each.is_done()]
    assert (poisoned.failure() or {})["message"].startswith("RuntimeError: the well is poisoned")
    log = "\n".join(line for lines in LogReader(poisoned).new_lines().values() for line in lines)
    assert "worker0 on " in log
    assert re.search(rf'File "{study.file}", line {LINE}, in poisoned', log)
    for each in stages(study):
        assert not Lease.seems_held(each)
        assert_one_writer_at_a_time(each)
        if each.kind == "distill" and each.key != poisoned.key:
            assert [line["step"] for line in read_steps(each)] == list(range(1, STEPS + 1))
    for client, run in runs_in(study):
        steps = [m.step for m in client.get_metric_history(run.info.run_id, "samples_per_s")]
        assert len(set(steps)) == len(steps) > 0

    kept = {each.url(): files(each) for each in done(study)}
    tried = len(attempts(poisoned))
    assert len(kept) == 4
    assert_told(study, run_to_its_end(study))
    assert {each.url(): files(each) for each in done(study)} == kept
    assert len(attempts(poisoned)) > tried
