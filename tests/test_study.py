"""A whole study on Ray: trials, MLflow, kills of workers and driver, a second run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import pair

from kdscale.core.journal import JournalReader, read_steps
from kdscale.core.lease import Lease
from kdscale.core.storage import StageStore, Storage

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]
STEPS, EVERY = 24, 4
SWEEP = '''
"""A study small enough to be killed often."""
from kdscale import DataSpec, Distill, Execution, Sweep, TowerSpec, ZeroShotSpec
text = {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
def vit(dim):
    return TowerSpec(
        name=f"vit {dim}", image_px=32, context_length=8, embed_dim=dim, width=32, patch_px=8,
        clip_config={"embed_dim": dim, "vision_cfg": vision, "text_cfg": text},
    )
data = DataSpec(name="pairs", max_bad_fraction=0.5)
classes = ZeroShotSpec(
    name="pairs", data=data, classnames=tuple("abcdefghij"), templates=("a {}",)
)
distill = Distill(
    student=vit(16), teacher=vit(24), loss="clip_kd", data=data, zero_shot=classes,
    global_batch_size=4, bn_group=4, epochs=2, warmup_steps=2, precision="fp32",
    run=Execution(num_workers=2, cpus_per_worker=0.5, checkpoint_every=4, log_every=1),
)
sweep = Sweep(name="kills", stages=[distill], scale="true_size_cpu")
if __name__ == "__main__":
    sweep.main()
'''


class Study:
    """A sweep file with its own storage."""

    def __init__(
        self, folder: Path, pattern: str, sweep: str = SWEEP, root: str | None = None
    ) -> None:
        self.folder, self.pattern = folder, pattern
        self.file = folder / "kills.py"
        self.file.write_text(sweep)
        self.storage = Storage(root or str(folder / "runs"))

    def start(self) -> subprocess.Popen[str]:
        command = [sys.executable, str(self.file), "--storage", self.storage.root]
        return subprocess.Popen(
            [*command, "--data", self.pattern],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def finish(self) -> str:
        process = self.start()
        output, _ = process.communicate(timeout=500)
        assert process.returncode == 0, output[-3000:]
        return output

    @property
    def stage(self) -> StageStore:
        (key,) = self.storage.names("stages", "distill")
        return StageStore(self.storage, "distill", key)

    def wait_for(self, condition: Callable[[StageStore], bool], timeout_s: float = 400) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.storage.names("stages", "distill") and condition(self.stage):
                return
            time.sleep(0.02)
        raise AssertionError("the study did not get so far")


def descendants(root: int) -> list[int]:
    """Returns the processes that a process started, and those that they started."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            parents[int(entry.name)] = int(fields[1])
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found[1:]


def kill(process: subprocess.Popen[str]) -> None:
    """Kills a driver with Ray's own processes, which would outlive it by some seconds and steps."""
    kill_all([process.pid, *descendants(process.pid)])
    process.communicate()


def kill_all(pids: list[int]) -> None:
    """Kills processes, some of which may be gone."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def train_workers(root: int) -> list[int]:
    """Returns the processes below a process that train."""
    found: list[int] = []
    for pid in descendants(root):
        with suppress(OSError):
            if b"RayTrainWorker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def open_to_others(root: int) -> list[tuple[int, str]]:
    """Returns (pid, address) of what a process and those below it listen on, the loopback aside."""
    found: list[tuple[int, str]] = []
    for pid in [root, *descendants(root)]:
        with suppress(psutil.Error):
            sockets = psutil.Process(pid).net_connections("inet")
            places = {each.laddr.ip for each in sockets if each.status == psutil.CONN_LISTEN}
            found += [(pid, ip) for ip in places if not ip.endswith("127.0.0.1") and ip != "::1"]
    return found


def at_step(step: int) -> Callable[[StageStore], bool]:
    def reached(stage: StageStore) -> bool:
        return len(stage.storage.names(*stage.parts, "journal")) >= step  # one segment a step

    return reached


@pytest.fixture(scope="module")
def pattern(tmp_path_factory: pytest.TempPathFactory, write_tar: Any) -> str:
    folder = tmp_path_factory.mktemp("pairs")
    for number in range(4):
        parts = [p for i in range(12) for p in pair(f"{number}{i:04d}", 100 * number + i)]
        write_tar(folder / f"{number:05d}.tar", parts)
    broken = [("90000.jpg", b"\xff\xd8broken"), ("90000.txt", b"x"), ("90000.json", b"{}")]
    write_tar(folder / "00004.tar", [*broken, *pair("40001", 401), *pair("40002", 402)])
    return f"{folder}/{{00000..00004}}.tar"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, pattern: str) -> Study:
    study = Study(tmp_path_factory.mktemp("whole"), pattern)
    study.finish()
    return study


def runs_in(study: Study) -> list[Any]:
    from mlflow import MlflowClient

    place = study.storage.root if study.storage.is_local else study.folder
    client = MlflowClient(tracking_uri=f"sqlite:///{place}/mlflow.db")
    ids = [e.experiment_id for e in client.search_experiments() if e.name.startswith("kdscale/")]
    return [(client, run) for run in client.search_runs(ids) if "kdscale.key" in run.data.tags]


def assert_same_training(whole: Study, broken: Study) -> None:
    one, two = read_steps(whole.stage), read_steps(broken.stage)
    assert [line["step"] for line in two] == list(range(1, STEPS + 1))
    for name in ("ids", "total", "task", "fd", "icl", "ckd", "zero_shot_top1", "cka_debiased"):
        assert [line.get(name) for line in one] == [line.get(name) for line in two], name
    ((client, run),) = runs_in(broken)
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "loss")
    assert sorted(metric.step for metric in history) == list(range(1, STEPS + 1))


def assert_little_was_repeated(study: Study, kills: int) -> None:
    lines = JournalReader(study.stage).new_lines()
    assert len({line["attempt"] for line in lines}) == kills + 1
    assert STEPS <= len(lines) <= STEPS + kills * EVERY


def test_an_undisturbed_study_is_complete(undisturbed: Study) -> None:
    record = undisturbed.stage.record()
    assert record["total_steps"] == STEPS
    assert sum(record["quarantined"].values()) == 1
    assert record["versions"]["torch"]
    assert (Path(undisturbed.storage.root) / "reports/kills/report.html").stat().st_size > 10_000
    assert len(runs_in(undisturbed)) == 1


def test_a_second_run_runs_nothing(undisturbed: Study) -> None:
    before = sorted(Path(undisturbed.stage.url()).rglob("*"))
    output = undisturbed.finish()
    assert "nothing to run" in output
    assert sorted(Path(undisturbed.stage.url()).rglob("*")) == before


def test_kills_of_a_worker_and_of_the_driver_change_nothing(
    undisturbed: Study, pattern: str, tmp_path: Path
) -> None:
    study = Study(tmp_path, pattern)
    process = study.start()
    drawn = random.Random(time.time_ns())
    # In the second epoch, each after two checkpoints at least.
    study.wait_for(at_step(drawn.randint(13, 15)))
    assert open_to_others(process.pid) == []
    os.kill(drawn.choice(train_workers(process.pid)), signal.SIGKILL)
    before = len(study.stage.storage.names(*study.stage.parts, "journal"))
    study.wait_for(at_step(before + drawn.randint(1, EVERY)))
    kill(process)
    assert not study.stage.is_done()
    study.finish()
    assert_same_training(undisturbed, study)
    assert_little_was_repeated(study, kills=2)


@pytest.mark.slow
def test_notices_to_a_worker_and_to_the_driver_repeat_no_step(
    undisturbed: Study, pattern: str, tmp_path: Path
) -> None:
    def attempts(stage: StageStore) -> int:
        return len({line["attempt"] for line in JournalReader(stage).new_lines()})

    study = Study(tmp_path, pattern)
    process = study.start()
    study.wait_for(at_step(3))
    os.kill(train_workers(process.pid)[-1], signal.SIGTERM)
    study.wait_for(lambda stage: attempts(stage) == 2)
    process.terminate()
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 3, output[-3000:]
    assert "1 of 1 stages are not finished; kept: distill" in output
    assert "To go on: python" in output
    assert not Lease.is_left(study.stage)
    assert {run.info.status for _, run in runs_in(study)} == {"KILLED"}
    study.finish()
    assert_same_training(undisturbed, study)
    assert len(JournalReader(study.stage).new_lines()) == STEPS
    assert attempts(study.stage) == 3


def test_plan_and_report_speak_json(undisturbed: Study) -> None:
    options = ["--storage", undisturbed.storage.root, "--data", undisturbed.pattern, "--json"]
    program = str(Path(sys.executable).with_name("kdscale"))
    for command in ("plan", "report"):
        line = [program, command, str(undisturbed.file), *options]
        found = subprocess.run(line, capture_output=True, text=True, check=True)
        document = json.loads(found.stdout)
        assert document["trials"]
    assert document["trials"][0]["n"] == 50
