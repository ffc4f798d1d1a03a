"""Thirty random kills of readers, workers and drivers: no step ever shows other samples."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import pair
from test_study import descendants

from kdscale.core.config import DataSpec
from kdscale.data.order import Order
from kdscale.data.shards import build_manifest, read_tar

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(3000)]
GLOBAL, WINDOW, KILLS = 48, 100, 30
PROGRAM = """
import json, os, sys, time
from concurrent.futures import ThreadPoolExecutor
import ray
from kdscale.data.shards import Manifest
from kdscale.data.stream import StreamConfig, TrainStream, train_dataset
from kdscale.sweep.schedule import start_ray

folder, workers, stop = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
manifest = Manifest.from_json(open(f"{folder}/manifest.json").read())

def cursor():
    done = {}
    for name in os.listdir(folder):
        if name.startswith("log-"):
            for line in open(f"{folder}/{name}"):
                if line.endswith("\\n"):
                    found = json.loads(line)
                    done.setdefault(found["step"], set()).update(found["rows"])
    whole = [step for step, rows in done.items() if len(rows) == 48]
    return max(whole, default=-1) + 1

@ray.remote(num_cpus=0.1)
class Worker:
    def consume(self, split, config, rank):
        with open(f"{folder}/log-{time.time_ns()}-{rank}", "a") as log:
            for batch in TrainStream(split, config, rank):
                time.sleep(0.05)
                line = {"step": batch.step, "rows": batch.rows.tolist(), "keys": batch.keys}
                log.write(json.dumps(line) + "\\n")
                log.flush()

def attempt():
    config = StreamConfig(
        manifest, 48, (16,), total_steps=stop, seed=3, window_samples=100, num_workers=workers,
        start_step=cursor(),
    )
    splits = train_dataset(config).streaming_split(workers, equal=True)
    group = [Worker.remote() for _ in splits]
    try:
        ray.get([w.consume.remote(s, config, r) for r, (w, s) in enumerate(zip(group, splits))])
    finally:
        for worker in group:
            ray.kill(worker)

start_ray()
while cursor() < stop:
    try:
        attempt()
    except ray.exceptions.RayActorError as error:
        print("a worker died", flush=True)
"""


def lines_of(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for log in folder.glob("log-*"):
        found += [json.loads(line) for line in log.read_text().splitlines(True) if line[-1] == "\n"]
    return found


def reached(folder: Path) -> int:
    return max((line["step"] for line in lines_of(folder)), default=-1)


def start(folder: Path, workers: int, stop: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", PROGRAM, str(folder), str(workers), str(stop)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def named(root: int, *names: str) -> list[int]:
    """Returns the processes below a driver that do one of these things."""
    found: list[int] = []
    for pid in descendants(root):
        with suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
            if command.startswith("ray::") and any(name in command for name in names):
                found.append(pid)
    return found


def kill(pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def folder(tmp_path: Path, write_tar: Any) -> Path:
    for number in range(8):
        parts = [p for i in range(40 + number) for p in pair(f"{number}{i:04d}", 100 * number + i)]
        write_tar(tmp_path / f"{number:05d}.tar", parts)
    manifest = build_manifest(DataSpec(name="t", urls=f"{tmp_path}/*.tar"))
    (tmp_path / "manifest.json").write_text(manifest.to_json())
    return tmp_path


def assert_same_samples(folder: Path, stop: int) -> None:
    import fsspec

    manifest = build_manifest(DataSpec(name="t", urls=f"{folder}/*.tar"))
    local = fsspec.filesystem("file")
    keys = [[s.key for s in read_tar(shard.path, local)] for shard in manifest.shards]
    order = Order(manifest.counts, 3, GLOBAL, None, stop, WINDOW)
    seen: dict[int, set[int]] = {}
    for line in lines_of(folder):
        shards, places = order.rows(line["step"], line["step"] + 1)
        expected = {
            line["step"] * GLOBAL + i: keys[shard][place]
            for i, (shard, place) in enumerate(zip(shards, places, strict=True))
        }
        assert [expected[row] for row in line["rows"]] == line["keys"], line["step"]
        seen.setdefault(line["step"], set()).update(line["rows"])
    assert {step: len(rows) for step, rows in seen.items()} == dict.fromkeys(range(stop), GLOBAL)


def test_thirty_kills_show_the_same_samples(folder: Path) -> None:
    stop, drawn = 2000, random.Random(time.time_ns())
    counts = {"reader": 0, "worker": 0, "driver": 0}
    process = start(folder, 2, stop)
    while sum(counts.values()) < KILLS:
        before = reached(folder)
        deadline = time.monotonic() + 200
        while reached(folder) < before + drawn.randint(1, 6):
            assert time.monotonic() < deadline, f"no progress after step {before}: {counts}"
            time.sleep(0.1)
        kind = min(counts, key=lambda name: (counts[name], drawn.random()))
        if kind == "driver":
            kill([process.pid, *descendants(process.pid)])
            process.wait()
            process = start(folder, 2, stop)
        else:
            tasks = ("ReadShards", "MapBatches", "Repartition")
            found = named(process.pid, *(tasks if kind == "reader" else ("Worker.consume",)))
            if not found:
                continue
            kill([drawn.choice(found)])
        counts[kind] += 1
    kill([process.pid, *descendants(process.pid)])
    process.wait()
    last = min(stop, reached(folder))
    process = start(folder, 2, last + 3)
    assert process.wait(timeout=300) == 0
    assert_same_samples(folder, last + 3)
    assert min(counts.values()) == KILLS // 3


def test_two_then_one_then_three_workers_share_the_same_global_batches(folder: Path) -> None:
    for workers, stop in ((2, 5), (1, 9), (3, 14)):
        assert start(folder, workers, stop).wait(timeout=300) == 0
    assert_same_samples(folder, 14)
