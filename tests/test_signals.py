"""SIGTERM and Ctrl-C: a checkpoint of the step that was under way, and nothing done twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from worlds import small_job, spawn, synthetic

from kdscale import Distill, Sweep
from kdscale.core.checkpoints import Checkpoints
from kdscale.core.config import Execution
from kdscale.core.journal import JournalReader
from kdscale.core.lease import Lease
from kdscale.core.scale import MINI
from kdscale.core.signals import own_handlers, take_notice, was_noticed
from kdscale.core.stop import check_stop, stop_asked, stopped
from kdscale.core.storage import Storage
from kdscale.core.types import Interrupted, StageStopped
from kdscale.stages.ahead import Ahead
from kdscale.stages.loop import World
from kdscale.stages.run import Run
from kdscale.sweep.interrupt import Interrupt
from kdscale.sweep.plan import make_plan

STEPS, AT = 7, 3
SELDOM = Execution(checkpoint_every=100, log_every=100)


@pytest.fixture
def heeding() -> Iterator[None]:
    with own_handlers(signal.SIGTERM):
        take_notice(signal.SIGTERM)
        yield


def with_sigterm(job: Any, world: World, hangs: bool) -> Callable[[int], Iterator[Any]]:
    """Returns batches; the last worker gets SIGTERM while it waits for that after step `AT`.

    Args:
        hangs: That batch never comes.
    """

    def batches(start: int) -> Iterator[Any]:
        for batch in synthetic(job, world)(start):
            if batch.step == AT and world.rank == world.size - 1:
                os.kill(os.getpid(), signal.SIGTERM)
                if hangs:
                    threading.Event().wait()
            yield batch

    return batches


def outputs(root: Path) -> dict[str, bytes]:
    """Returns the files of a finished student."""
    (output,) = root.glob("stages/*/*/output")
    return {str(p.relative_to(output)): p.read_bytes() for p in output.rglob("*") if p.is_file()}


def steps(job: Any) -> list[int]:
    return [line["step"] for line in JournalReader(job.stage).new_lines()]


def test_sigterm_leaves_a_checkpoint_of_its_step_and_the_same_student(
    tmp_path: Path, heeding: None
) -> None:
    whole = small_job(str(tmp_path / "whole"), total_steps=STEPS, run=SELDOM)
    Run(whole, World(), lambda _: None).train(synthetic(whole, World()))
    job = small_job(str(tmp_path / "broken"), total_steps=STEPS, run=SELDOM)
    leaving = World(noticed=was_noticed)
    with pytest.raises(StageStopped):
        Run(job, leaving, lambda _: None).train(with_sigterm(job, leaving, hangs=False))
    assert Checkpoints(job.stage, keep=1).latest_step() == AT
    assert stopped(job.stage) is None  # nobody wanted this stage to stay as it is
    Run(job, World(), lambda _: None).train(synthetic(job, World()))
    assert steps(job) == list(range(1, STEPS + 1))
    assert outputs(tmp_path / "broken") == outputs(tmp_path / "whole")


def leave(world: World, root: str, hangs: bool) -> None:
    """Trains until the second of two workers has got SIGTERM."""
    torch.set_num_threads(1)
    take_notice(signal.SIGTERM)
    world = World(rank=world.rank, size=world.size, noticed=was_noticed)
    job = small_job(root, total_steps=STEPS, run=SELDOM)
    with pytest.raises(StageStopped):
        Run(job, world, lambda _: None).train(with_sigterm(job, world, hangs))
    assert was_noticed() == (world.rank == 1)


@pytest.mark.parametrize("hangs", [False, True])
def test_all_workers_stop_after_the_same_step(tmp_path: Path, hangs: bool) -> None:
    spawn(leave, 2, str(tmp_path), hangs)
    job = small_job(str(tmp_path), total_steps=STEPS, run=SELDOM)
    assert Checkpoints(job.stage, keep=1).latest_step() == AT
    assert steps(job) == list(range(1, AT + 1))


def test_a_notice_is_heeded_while_the_first_batch_is_waited_for(tmp_path: Path) -> None:
    waits = threading.Event()

    def batches(_: int) -> Iterator[Any]:
        waits.set()
        threading.Event().wait()
        yield

    job = small_job(str(tmp_path), total_steps=STEPS, run=SELDOM)
    with pytest.raises(StageStopped):
        Run(job, World(noticed=waits.is_set), lambda _: None).train(batches)
    assert Checkpoints(job.stage, keep=1).latest_step() == 0


def test_what_a_source_raises_is_raised_by_whoever_waits() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("no second one")

    ahead = Ahead(items())
    assert ahead.ready(60)
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="no second one"):
        ahead.ready(60)
    with pytest.raises(ValueError, match="no second one"):
        next(ahead)
    assert list(Ahead(iter("abc"))) == ["a", "b", "c"]


def test_a_second_signal_ends_the_process() -> None:
    program = (
        "import os, signal, time\n"
        "from kdscale.core.signals import take_notice, was_noticed\n"
        "take_notice(signal.SIGTERM)\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "print(was_noticed(), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "print('still here')\n"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (found.stdout, found.returncode) == ("True\n", -signal.SIGTERM)


def test_a_driver_that_gets_ctrl_c_stops_its_own_attempts_and_no_other(tmp_path: Path) -> None:
    recipe = Distill(student="vit_t16", loss="clip", epochs=64)
    sweep = Sweep(name="one", stages=[recipe], scale="mini")
    plan = make_plan([sweep], Storage(str(tmp_path)), MINI, {})
    (stage,) = plan.stages.values()
    store, said = stage.store(plan.storage), list[str]()
    before = signal.getsignal(signal.SIGINT)
    with Interrupt(plan, said.append) as mine, Interrupt(plan, said.append) as other:
        check_stop(store, mine.run)
        lease = Lease.acquire(store, other.run)
        assert lease is not None
        with lease:
            os.kill(os.getpid(), signal.SIGINT)
            deadline = time.monotonic() + 4
            while not said and time.monotonic() < deadline:
                time.sleep(0.01)
            assert other.has_come
            assert not mine.has_come
            while stop_asked(store, lease.token) is None and time.monotonic() < deadline:
                time.sleep(0.01)
            with pytest.raises(StageStopped, match="SIGINT"):
                check_stop(store, lease.token)
        check_stop(store, mine.run)
        check_stop(store)
    assert signal.getsignal(signal.SIGINT) is before
    assert said == ["[yellow]SIGINT[/]: what runs writes a checkpoint and stops; twice ends it"]
    mine.raise_if_stopped("kdscale run one.py")
    with pytest.raises(Interrupted, match=r"1 of 1 stages are not finished.* To go on: kdscale"):
        other.raise_if_stopped("kdscale run one.py")
    assert not plan.storage.names("stops")
