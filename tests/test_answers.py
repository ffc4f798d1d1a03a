"""A pool of actors answers as one process does, whatever is killed meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import asking
import pytest
from test_study import descendants

from kdscale.core.config import Execution
from kdscale.eval import answers as kept
from kdscale.stages.ask import ask
from kdscale.stages.jobs import AnswersJob

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
COUNT, BLOCK = 48, 4
# A driver of its own, to be killed: it answers in its own process, slowly.
DRIVER = """
import sys, time
sys.path.insert(0, sys.argv[3])
import asking
from kdscale.eval import answers as kept
from kdscale.stages.ask import ask
kept.BLOCK = int(sys.argv[4])
asked = asking.long_questions(int(sys.argv[5]))
ask(asking.job(sys.argv[1], sys.argv[2], asked), asked, lambda *_: time.sleep(0.2))
"""


def written(job: AnswersJob) -> dict[str, int]:
    """Returns when each block was written."""
    folder = Path(job.stage.url("output"))
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("[0-9]*.parquet")}


def actors() -> list[int]:
    """Returns the processes below this one that hold a model."""
    found: list[int] = []
    for pid in descendants(os.getpid()):
        with suppress(OSError):
            if b"MapWorker(" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def test_actors_and_kills_change_nothing(
    ray_cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "BLOCK", BLOCK)
    model, asked = asking.save(tmp_path / "vlm"), asking.long_questions(COUNT)
    alone = asking.job(tmp_path / "alone", model, asked)
    ask(alone, asked)
    expected = kept.load_rows(alone.stage)

    pooled = asking.job(tmp_path / "pooled", model, asked)
    here = [sys.executable, "-c", DRIVER, pooled.storage_root, model, str(Path(__file__).parent)]
    driver = subprocess.Popen([*here, str(BLOCK), str(COUNT)])
    while len(written(pooled)) < 3:
        assert driver.poll() is None
        time.sleep(0.02)
    driver.kill()
    driver.wait()
    before = written(pooled)
    assert 3 <= len(before) < COUNT // BLOCK

    killed: list[int] = []

    def kill_one() -> None:
        """Kills an actor as soon as one has answered a block."""
        while len(written(pooled)) < COUNT // BLOCK and not killed:
            if len(written(pooled)) > len(before) and (living := actors()):
                killed.append(living[0])
                os.kill(living[0], signal.SIGKILL)
            time.sleep(0.01)

    run = Execution(num_workers=3, cpus_per_worker=0.5)
    again = asking.job(tmp_path / "pooled", model, asked, run=run)
    assert again.key == pooled.key == alone.key
    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    ask(again, asked)
    killer.join()
    assert killed
    assert kept.load_rows(again.stage) == expected
    assert Counter(row["item_id"] for row in expected) == {str(n): 1 for n in range(COUNT)}
    after = written(again)
    assert {name: after[name] for name in before} == before  # what was there was not asked again
