"""A writer on an S3 server is killed: one of those that wait takes its stage over."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kdscale.core.journal import JournalReader
from kdscale.core.lease import Lease
from kdscale.core.storage import StageStore, Storage

TAKE_OVER_S = 120
STEPS = 5
# Writes a stage as soon as it may; by another name than this machine's its heartbeat alone counts.
WRITER = """
import os, sys, time
from kdscale.core import lease
from kdscale.core.journal import JournalWriter
from kdscale.core.storage import StageStore, Storage
root, machine, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
if machine:
    lease._host = lambda: machine
stage = StageStore(Storage(root), "distill", "k")
while not stage.is_done():
    held = lease.Lease.acquire(stage)
    if held is None:
        print("waits", flush=True)
        time.sleep(0.1)
        continue
    with held:
        if stage.is_done():
            break
        journal = JournalWriter(stage, 1)
        for step in range(steps):
            lease.check_lease(stage, held.token)
            journal.append({"step": step, "writer": os.getpid()})
            time.sleep(0.05)
        stage.finish({})
"""


@contextmanager
def writer(root: str, machine: str, steps: int = STEPS) -> Iterator[subprocess.Popen[str]]:
    """Starts a writer; none is left when the block ends."""
    program = [sys.executable, "-c", WRITER, root, machine, str(steps)]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("machines", ["   ", pytest.param("abc", marks=pytest.mark.slow)])
def test_of_two_that_wait_one_takes_over(bucket: Path, machines: str) -> None:
    root = f"s3://bucket/{machines.strip() or 'here'}"
    stage = StageStore(Storage(root), "distill", "k")
    first, second, third = (name.strip() for name in machines)
    with writer(root, first, 10**9) as killed:
        while len(stage.storage.names(*stage.parts, "journal")) < 3:
            time.sleep(0.1)
        with writer(root, second) as one, writer(root, third) as other:
            for waiting in (one, other):
                assert waiting.stdout is not None
                assert waiting.stdout.readline() == "waits\n"
            killed.kill()
            at = time.time()
            assert (one.wait(TAKE_OVER_S), other.wait(TAKE_OVER_S)) == (0, 0)
    lines = JournalReader(stage).new_lines()
    after = [line for line in lines if line["writer"] != killed.pid]
    print(f"taken over after {after[0]['time'] - at:.1f} s")
    assert at <= after[0]["time"] < at + TAKE_OVER_S
    assert [line["step"] for line in after] == list(range(STEPS))
    assert {line["writer"] for line in after} in ({one.pid}, {other.pid})
    assert lines == sorted(lines, key=lambda line: line["time"])
    assert stage.is_done()
    assert not Lease.is_left(stage)
