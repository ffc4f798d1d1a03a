"""Leases: one writer a stage, whoever dies, wakes or comes at the same time."""

from __future__ import annotations

import errno
import json
import multiprocessing
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from kdscale import Distill
from kdscale.core import lease as lease_module
from kdscale.core.lease import Lease, check_lease
from kdscale.core.scale import MINI, resolve
from kdscale.core.storage import StageStore, Storage
from kdscale.core.types import LeaseLost, StorageError
from kdscale.sweep.plan import Stage
from kdscale.sweep.schedule import run_stages
from kdscale.sweep.status import stage_state

FORK = multiprocessing.get_context("fork")


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    stage = StageStore(Storage(str(tmp_path)), "distill", "k" * 16)
    first = Lease.acquire(stage)
    assert first is not None
    with first:
        assert Lease.acquire(stage) is None
    assert Lease.acquire(stage) is not None


def test_a_lease_outlives_a_fault_of_the_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "HEARTBEAT_S", 0.02)
    stage = StageStore(Storage(str(tmp_path)), "distill", "k" * 16)
    lease = Lease.acquire(stage)
    assert lease is not None
    reads = 0

    def refuse(*_: object) -> bytes:
        nonlocal reads
        reads += 1
        raise PermissionError("not now")

    with lease:
        monkeypatch.setattr(stage.storage.fs, "cat_file", refuse)
        while reads < 2:
            time.sleep(0.01)
        monkeypatch.undo()
        check_lease(stage, lease.token)


def _planned(stage: StageStore) -> Stage:
    fields: dict[str, object] = dict.fromkeys(("num_samples", "total_steps", "flops", "bytes_out"))
    fields |= {"kind": stage.kind, "key": stage.key, "name": "x", "inputs": (), "reused": False}
    recipe = resolve(Distill(student="vit_t16", teacher="clip_b16"), MINI)
    return Stage(recipe=recipe, **fields)  # pyright: ignore


def _state(stage: StageStore) -> str:
    return stage_state(_planned(stage), stage.storage)[0]


def test_status_tells_the_dead_from_the_living(tmp_path: Path) -> None:
    stage = StageStore(Storage(str(tmp_path)), "distill", "k" * 16)
    assert _state(stage) == "waiting"
    _die_holding(tmp_path)
    assert _state(stage) == "interrupted"
    for age_s, expected in ((1, "running"), (60, "interrupted")):
        foreign = {"host": "elsewhere", "pid": 1, "beat": time.time_ns() - int(age_s * 1e9)}
        stage.storage.write(json.dumps(foreign).encode(), *stage.parts, "LEASE-1")
        assert _state(stage) == expected
    stage.storage.remove(*stage.parts, "LEASE-1")
    lease = Lease.acquire(stage)
    assert lease is not None
    with lease:
        assert _state(stage) == "running"


def _leave_a_lease(root: str) -> None:
    assert Lease.acquire(StageStore(Storage(root), "distill", "k" * 16)) is not None


def _die_holding(root: Path) -> None:
    process = FORK.Process(target=_leave_a_lease, args=(str(root),))
    process.start()
    process.join()


def test_a_dead_writer_is_replaced_at_once(tmp_path: Path) -> None:
    _die_holding(tmp_path)
    assert Lease.acquire(StageStore(Storage(str(tmp_path)), "distill", "k" * 16)) is not None


def test_a_silent_writer_elsewhere_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "LEASE_TIMEOUT_S", 0.1)
    monkeypatch.setattr(lease_module, "HEARTBEAT_S", 0.05)
    stage = StageStore(Storage(str(tmp_path)), "distill", "k" * 16)
    foreign = {"token": "x", "host": f"not-{socket.gethostname()}", "pid": 1, "beat": 5}
    stage.storage.write(json.dumps(foreign).encode(), *stage.parts, "LEASE-1")
    assert Lease.acquire(stage) is not None


def test_a_writer_that_lost_its_lease_stops(tmp_path: Path) -> None:
    stage = StageStore(Storage(str(tmp_path)), "distill", "k")
    lease = Lease.acquire(stage)
    assert lease is not None
    check_lease(stage, lease.token)
    check_lease(stage, None)
    stage.storage.write(b'{"token": "another"}', *stage.parts, "LEASE-1")
    with pytest.raises(LeaseLost, match="taken over"):
        check_lease(stage, lease.token)


def _compete(root: str, barrier: Any, won: Any) -> None:
    stage = StageStore(Storage(root), "distill", "k" * 16)
    barrier.wait()
    if Lease.acquire(stage) is not None:
        won.put(1)
    barrier.wait()  # a winner that went at once would be dead, and rightly replaced


@pytest.mark.parametrize("is_left", [False, True])
def test_of_many_that_come_at_once_one_wins(
    tmp_path: Path, is_left: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "HEARTBEAT_S", 0.05)  # how long a loser watches the winner
    for attempt in range(3):
        root = tmp_path / str(attempt)
        if is_left:
            _die_holding(root)
        barrier, won = FORK.Barrier(4), FORK.Queue()
        racers = [FORK.Process(target=_compete, args=(str(root), barrier, won)) for _ in range(4)]
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join()
        assert won.get(timeout=10) == 1
        assert won.empty()


def test_a_writer_that_wakes_cannot_undo_what_has_replaced_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = StageStore(Storage(str(tmp_path)), "distill", "k")
    sleeper = Lease.acquire(stage)
    assert sleeper is not None
    monkeypatch.setattr(lease_module, "_is_dead", lambda *_: True)  # as another host would judge
    taker = Lease.acquire(stage)
    monkeypatch.undo()
    assert taker is not None
    monkeypatch.setattr(lease_module, "HEARTBEAT_S", 0.01)
    with taker:
        with sleeper:
            time.sleep(0.1)
            with pytest.raises(LeaseLost, match="taken over"):
                check_lease(stage, sleeper.token)
        check_lease(stage, taker.token)
        assert Lease.acquire(stage) is None
    assert not Lease.is_left(stage)


def test_one_who_judged_long_ago_does_not_replace_a_newcomer(tmp_path: Path) -> None:
    stage = StageStore(Storage(str(tmp_path)), "distill", "k" * 16)
    _die_holding(tmp_path)
    before = lease_module._newest(stage)
    for _ in range(2):  # somebody else takes over and fails, and another one begins
        lease = Lease.acquire(stage)
        assert lease is not None
        if before.number + 1 == lease._number:
            lease.__enter__().__exit__()
    late = Lease(stage, before.number + 1)
    assert stage.storage.create(late._beat(), *stage.parts, "LEASE-2")
    assert not late._follows(before)


def test_a_host_of_the_same_name_is_another_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(lease_module, "LEASE_TIMEOUT_S", 0.5)
    stage = StageStore(Storage(str(tmp_path)), "distill", "k")
    # A process number that nobody has here, in a container that calls itself as this one.
    foreign = {"token": "x", "host": f"{socket.gethostname()} elsewhere", "pid": 2**22 + 1}
    done = threading.Event()

    def beat() -> None:
        while not done.wait(0.02):
            text = json.dumps(foreign | {"started": "1", "beat": time.time_ns()})
            stage.storage.write(text.encode(), *stage.parts, "LEASE-1")

    thread = threading.Thread(target=beat)
    thread.start()
    time.sleep(0.1)
    try:
        assert Lease.acquire(stage) is None
    finally:
        done.set()
        thread.join()


def test_who_waited_sees_that_the_stage_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer finishes between the look for DONE and the lease: nothing is run again."""
    storage = Storage(str(tmp_path))
    stage = StageStore(storage, "distill", "k" * 16)
    acquire = Lease.acquire.__func__  # pyright: ignore

    def finished_meanwhile(cls: Any, wanted: StageStore, *rest: Any) -> Lease | None:
        stage.finish({"by": "another"})
        return acquire(cls, wanted, *rest)

    monkeypatch.setattr(Lease, "acquire", classmethod(finished_meanwhile))
    run_stages([_planned(stage)], storage)
    assert stage.record() == {"by": "another"}
    assert not Lease.is_left(stage)


def test_of_a_path_whose_leases_are_held_only_the_first_stage_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(str(tmp_path))
    stages = [StageStore(storage, "distill", name * 16) for name in "kl"]
    acquire = Lease.acquire.__func__  # pyright: ignore
    states: list[str] = []

    def look(cls: Any, wanted: StageStore, *rest: Any) -> Lease | None:
        lease = acquire(cls, wanted, *rest)
        if wanted.key == stages[1].key:
            states.extend(map(_state, stages))
            stages[0].finish({})
            states.append(_state(stages[1]))
            stages[1].finish({})
        return lease

    monkeypatch.setattr(Lease, "acquire", classmethod(look))
    run_stages([_planned(stage) for stage in stages], storage)
    assert states == ["running", "waiting", "running"]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EBUSY])
def test_a_refusal_in_a_servers_own_words_is_a_refusal(
    code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Servers word 412 differently; s3fs makes FileExistsError of one wording only."""
    storage, is_beaten = Storage(f"memory://words-{code}"), True
    opened = storage.fs.open

    def refuse(path: str, _: str) -> Any:
        if is_beaten:
            with opened(path, "wb") as file:
                file.write(b"theirs")
        raise OSError(code, "precondition")

    with monkeypatch.context() as patch:
        patch.setattr(storage.fs, "open", refuse)
        assert not storage.create(b"ours", "x")
        is_beaten = False
        with pytest.raises(StorageError, match="cannot write"):
            storage.create(b"ours", "y")
    assert storage.read("x") == b"theirs"


def test_a_server_that_knows_no_condition_is_written_to_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    storage = Storage("memory://unconditional")
    opened = storage.fs.open

    def refuse_condition(path: str, mode: str, **fields: Any) -> Any:
        if "x" in mode:
            raise OSError(errno.ENOSYS, "A header you provided implies functionality ...")
        return opened(path, mode, **fields)

    with monkeypatch.context() as patch:
        patch.setattr(storage.fs, "open", refuse_condition)
        assert storage.create(b"ours", "x")
    assert storage.read("x") == b"ours"
