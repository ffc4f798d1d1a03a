"""Two drivers on one storage: each stage once, whoever is killed."""

from __future__ import annotations

import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from test_study import SWEEP, Study, descendants, kill, runs_in

from kdscale.core.journal import JournalReader
from kdscale.core.lease import Lease
from kdscale.core.storage import StageStore

pytestmark = [pytest.mark.ray, pytest.mark.timeout(2400)]
TAKE_OVER_S = 120
STEPS, EVERY = 24, 4
TRAINING = SWEEP[SWEEP.index("distill = ") :]
ONE_AT_A_TIME = """
import os
one_at_a_time = Execution(
    num_workers=0, cpus_per_worker=os.cpu_count(), checkpoint_every=4, log_every=1
)
"""
SHARED = SWEEP.replace(
    TRAINING,
    ONE_AT_A_TIME
    + """
distill = Distill(
    student=choose(vit(16), vit(20)), teacher=vit(24), loss="clip_kd", data=data, zero_shot=None,
    global_batch_size=4, epochs=2, warmup_steps=2, precision="fp32", views=2,
    teacher_outputs="cached", run=one_at_a_time,
)
sweep = Sweep(name="shared", stages=[distill], scale="true_size_cpu")
if __name__ == "__main__":
    sweep.main()
""",
).replace("import DataSpec", "import choose, DataSpec")
Line = dict[str, Any]


def stages(study: Study) -> list[StageStore]:
    return [
        StageStore(study.storage, kind, key)
        for kind in study.storage.names("stages")
        for key in study.storage.names("stages", kind)
    ]


def attempts(stage: StageStore) -> list[list[Line]]:
    """Returns the lines of a stage's journal by attempt, the oldest first."""
    found: dict[str, list[Line]] = {}
    for line in JournalReader(stage).new_lines():
        found.setdefault(line["attempt"], []).append(line)
    return [found[attempt] for attempt in sorted(found)]


def assert_each_step_once(stage: StageStore, lines: list[Line]) -> None:
    assert set(Counter(line["step"] for line in lines).values()) == {1}, stage.url()


def assert_run_once(stage: StageStore) -> None:
    assert stage.is_done()
    (lines,) = attempts(stage)
    assert_each_step_once(stage, lines)
    if stage.kind == "distill":
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))


def wait_for(condition: Any, what: str, timeout_s: float = 800) -> Any:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"waited in vain for {what}")


@contextmanager
def drivers(study: Study, count: int) -> Iterator[list[subprocess.Popen[str]]]:
    """Starts drivers at once; none is left when the block ends."""
    started = [study.start() for _ in range(count)]
    try:
        yield started
    finally:
        for process in started:
            if process.poll() is None:
                kill(process)


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=1000)
    assert process.returncode == 0, output[-3000:]
    return output


def in_training(study: Study) -> StageStore | None:
    """Returns a stage that is in its second third."""
    for stage in stages(study):
        if stage.kind == "distill" and not stage.is_done():
            lines = JournalReader(stage).new_lines()
            if lines and STEPS // 4 < lines[-1]["step"] < 3 * STEPS // 4:
                return stage
    return None


def writer(stage: StageStore) -> int:
    """Returns the process that holds a stage."""
    newest = max(n for n in stage.storage.names(*stage.parts) if n.startswith("LEASE"))
    return int(stage.storage.read_json(*stage.parts, newest)["pid"])


@pytest.fixture(params=["directory", pytest.param("s3", marks=pytest.mark.slow)])
def study(request: pytest.FixtureRequest, tmp_path: Path, shards: str) -> Study:
    if request.param == "directory":
        return Study(tmp_path, shards, SHARED)
    request.getfixturevalue("bucket")
    return Study(tmp_path, shards, SHARED, f"s3://bucket/{tmp_path.name}")


def test_two_drivers_run_each_stage_once(study: Study) -> None:
    with drivers(study, 2) as both:
        for process in both:
            finish(process)
    found = stages(study)
    assert sorted(stage.kind for stage in found) == ["distill", "distill", "embed"]
    for stage in found:
        assert_run_once(stage)
        assert not Lease.is_left(stage)
    tracked = sorted(run.data.tags["kdscale.key"] for _, run in runs_in(study))
    assert tracked == sorted(stage.key for stage in found)


@pytest.mark.slow
def test_a_killed_drivers_stage_is_taken_over(study: Study) -> None:
    with drivers(study, 2) as both:
        stage = wait_for(lambda: in_training(study), "a stage in training")
        holder = writer(stage)
        killed, other = sorted(both, key=lambda driver: holder not in descendants(driver.pid))
        kill(killed)
        at = time.time()
        wait_for(lambda: len(attempts(stage)) > 1, "a take-over", TAKE_OVER_S)
        finish(other)
    before, after = attempts(stage)
    print(f"taken over after {after[0]['time'] - at:.1f} s")
    assert at < after[0]["time"] < at + TAKE_OVER_S
    assert_each_step_once(stage, before)
    assert [line["step"] for line in after] == list(range(after[0]["step"], STEPS + 1))
    repeated = before[-1]["step"] - after[0]["step"] + 1
    assert 0 <= repeated < 2 * EVERY  # the newest checkpoint may have been under way
    assert stage.is_done()
    for another in stages(study):
        if another.key != stage.key:
            assert_run_once(another)
