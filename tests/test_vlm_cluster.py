"""The VLM stages on Ray Train workers: the same losses, also under DeepSpeed and after a kill."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from talks import manifest_of, parts_of
from test_study import descendants
from test_vlm_stage import attempt, changed, jobs

from kdscale.core.checkpoints import Checkpoints
from kdscale.core.config import Execution
from kdscale.core.journal import read_steps
from kdscale.data.shards import Manifest
from kdscale.stages.jobs import VlmJob

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1500)]
NAMES = ("vit_t16", "qwen2_0_5b")
WORKERS = Execution(num_workers=2, cpus_per_worker=0.5, checkpoint_every=2, log_every=1)


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory, write_tar: Any) -> Manifest:
    folder = tmp_path_factory.mktemp("talks")
    members = [m for n in range(40) for m in parts_of(f"{n:06d}", n, image=n % 4 != 3)]
    write_tar(folder / "0.tar", members)
    return manifest_of(f"{folder}/*.tar")


def finetuning(root: Path, recipe: str, talks: Manifest, steps: int) -> VlmJob:
    """Makes a fine-tuning that starts from a random projector."""
    root.mkdir(exist_ok=True)
    _, job = jobs(root, recipe, NAMES, (talks, talks))
    return replace(changed(job, projector=None), total_steps=steps)


def losses(job: VlmJob) -> list[float]:
    """Returns the loss of every step, once."""
    lines = read_steps(job.stage)
    assert [line["step"] for line in lines] == list(range(1, job.total_steps + 1))
    return [line["total"] for line in lines]


def test_two_recipes_share_a_group_of_workers(
    ray_cluster: Any, tmp_path: Path, talks: Manifest
) -> None:
    from kdscale.stages.worker import fit

    expected, group = {}, []
    for number, recipe in enumerate(("tinyllava", "bunny")):
        alone = finetuning(tmp_path / f"{recipe}-alone", recipe, talks, 3)
        expected[recipe] = attempt(alone)
        shared = finetuning(tmp_path / recipe, recipe, talks, 3)
        group.append(replace(changed(shared, run=WORKERS), key=f"{number:016x}"))
    fit(group)
    for job, recipe in zip(group, expected, strict=True):
        assert job.stage.is_done()
        assert losses(job) == pytest.approx(expected[recipe], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_deepspeed_gives_the_same_losses_and_survives_a_kill(
    ray_cluster: Any, tmp_path: Path, talks: Manifest, zero_stage: int
) -> None:
    from kdscale.stages.worker import fit

    alone = finetuning(tmp_path / "alone", "tinyllava", talks, 8)
    expected = attempt(alone)
    sharded = finetuning(tmp_path / "sharded", "tinyllava", talks, 8)
    run = WORKERS.replace(deepspeed=True)
    sharded = changed(sharded, run=run, zero_stage=zero_stage)
    stop, killed = threading.Event(), []

    def kill_one() -> None:
        while not stop.is_set():
            if Checkpoints(sharded.stage, keep=1).latest_step() >= 2:
                workers = [pid for pid in descendants(os.getpid()) if _trains(pid)]
                if workers:
                    killed.append(random.choice(workers))
                    os.kill(killed[0], signal.SIGKILL)
                    return
            time.sleep(0.05)

    thread = threading.Thread(target=kill_one)
    thread.start()
    try:
        fit([sharded])
    finally:
        stop.set()
        thread.join()
    assert killed
    assert losses(sharded) == pytest.approx(expected, rel=1e-4)


def _trains(pid: int) -> bool:
    """Tells whether a process is one of Ray Train's workers."""
    try:
        return b"RayTrainWorker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
