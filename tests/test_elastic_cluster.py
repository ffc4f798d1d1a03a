"""Nodes come and go: the samples are those of a run that nothing disturbed."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray.cloudpickle
from worlds import small_job

from kdscale.core.config import DataSpec, Execution
from kdscale.core.journal import JournalReader, read_steps
from kdscale.core.storage import StageStore
from kdscale.data.shards import build_manifest

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]
STEPS, EVERY = 80, 10
ELASTIC = Execution(
    num_workers=2, min_workers=1, cpus_per_worker=4, data_cpus=2, cpus_per_data_task=0.5,
    checkpoint_every=EVERY, log_every=1,
)  # fmt: skip


def slow_loss(image: Any, text: Any, *_: Any) -> Any:
    """Gives a step the time that nodes need to come and go."""
    time.sleep(0.25)
    return (image * text).sum(-1).mean()


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head for data tasks, and one node with room for one worker."""
    import ray
    from ray.cluster_utils import Cluster

    tests = Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", f"{tests.parent}:{tests}")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 3})
    made.add_node(num_cpus=4)
    ray.init(address=made.address, log_to_driver=False, logging_level=logging.ERROR)
    yield made
    ray.shutdown()
    made.shutdown()


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.1)


def attempts(stage: StageStore) -> int:
    return len({line["attempt"] for line in JournalReader(stage).new_lines()})


def test_nodes_that_come_and_go_change_no_sample(
    cluster: Any, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kdscale.data.stream import TrainStream
    from kdscale.stages import group
    from kdscale.stages.loop import World
    from kdscale.stages.run import Run
    from kdscale.stages.streams import stream_config
    from kdscale.stages.worker import fit

    monkeypatch.setattr(group, "GROW_EVERY_S", 1.0)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    manifest = build_manifest(DataSpec(name="pairs", urls=shards))
    fields: dict[str, Any] = {"loss": slow_loss, "teacher": None, "epochs": 100, "run": ELASTIC}

    def job(name: str) -> Any:
        made = small_job(str(tmp_path / name), total_steps=STEPS, **fields)
        small: Any = made.recipe.student
        student = small.replace(clip_config=_true_vocabulary(small))
        return replace(made, data=manifest, recipe=made.recipe.replace(student=student))

    whole = job("whole")
    stream = TrainStream(None, replace(stream_config(whole), own_steps=STEPS), 0)
    Run(whole, World(), lambda _: None).train(lambda _: iter(stream))

    moved = job("moved")

    def until_done() -> None:
        while not moved.stage.is_done():
            fit([moved])

    thread = threading.Thread(target=until_done, daemon=True)
    thread.start()
    wait_for(lambda: attempts(moved.stage) == 1, "a group of one worker")
    second = cluster.add_node(num_cpus=4)
    wait_for(lambda: attempts(moved.stage) == 2, "a group of two workers")
    command = [str(Path(sys.executable).with_name("ray")), "drain-node"]
    command += ["--address", cluster.address, "--node-id", second.node_id]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    subprocess.run([*command, "--deadline-remaining-seconds", "60"], check=True)
    wait_for(lambda: attempts(moved.stage) == 3, "a group of one worker again")
    cluster.remove_node(second)
    thread.join(timeout=300)
    lines = JournalReader(moved.stage).new_lines()
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["ids"] for line in read_steps(whole.stage)] == [line["ids"] for line in lines]
    expected = [line["total"] for line in read_steps(whole.stage)]
    assert [line["total"] for line in lines] == pytest.approx(expected, rel=1e-3, abs=1e-5)


def _true_vocabulary(student: Any) -> dict[str, Any]:
    """Returns a student's config with an entry for each token that captions have."""
    config = dict(student.clip_config)
    return config | {"text_cfg": config["text_cfg"] | {"vocab_size": 49408}}
