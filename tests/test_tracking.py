"""MLflow as a view of the journals, and progress without it."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from kdscale import Distill, Sweep
from kdscale.core.answers_config import Answers
from kdscale.core.journal import JournalReader, JournalWriter
from kdscale.core.scale import MINI
from kdscale.core.storage import Storage
from kdscale.eval.answers import blocks_of, write_block
from kdscale.eval.questions import Question
from kdscale.sweep.plan import Plan, Stage, make_plan
from kdscale.sweep.progress import Follower, Progress
from kdscale.sweep.tracked import MAX_METRICS_PER_CALL, StageRun, in_calls, unsent


class Client:
    """As much of an MLflow server as a stage's run needs."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.status, self.is_away, self.tags = "RUNNING", False, {}

    def get_run(self, _: str) -> Any:
        return SimpleNamespace(
            data=SimpleNamespace(params={}), info=SimpleNamespace(status=self.status)
        )

    def get_metric_history(self, _: str, name: str) -> list[Any]:
        return [metric for metric in self.sent if metric.key == name]

    def log_batch(self, _: str, metrics: Any = (), params: Any = ()) -> None:
        assert len(metrics) <= MAX_METRICS_PER_CALL
        self.sent += metrics
        if self.is_away and metrics:
            raise OSError("timed out after the server had taken it")

    def set_tag(self, _: str, name: str, value: str) -> None:
        self.tags[name] = value

    def set_terminated(self, _: str, status: str) -> None:
        self.status = status

    update_run = set_terminated


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    sweep = Sweep(name="x", stages=[Distill(student="vit_t16", loss="clip")])
    return make_plan([sweep], Storage(str(tmp_path)), MINI, {})


def write(plan: Plan, steps: range) -> None:
    (stage,) = plan.stages.values()
    writer = JournalWriter(stage.store(plan.storage), flush_every=1000)
    for step in steps:
        speed = {"samples_per_s": 1.0, "data_wait": 0.0}
        writer.append({"step": step, "epoch": 0, "total": 1.0 / step, **speed})
    writer.flush()


def run_of(client: Client, plan: Plan) -> StageRun:
    (stage,) = plan.stages.values()
    return StageRun(client, "id", stage, plan.storage)


def test_every_step_is_sent_once_whatever_the_server_does(plan: Plan) -> None:
    client = Client()
    write(plan, range(1, 13))
    first, second = run_of(client, plan), run_of(client, plan)
    client.is_away = True
    with pytest.raises(OSError, match="timed out"):
        first.send()
    client.is_away = False
    for run in (first, second):
        run.send()
    write(plan, range(10, 15))
    for run in (second, first):
        run.send()
    assert [m.step for m in client.get_metric_history("id", "loss")] == list(range(1, 15))
    assert {m.key for m in client.sent} == {"loss", "samples_per_s", "data_wait"}


def test_a_line_sent_twice_is_the_same_metric(plan: Plan) -> None:
    write(plan, range(1, 3))
    (stage,) = plan.stages.values()
    lines = JournalReader(stage.store(plan.storage)).new_lines()
    calls = [[[vars(m) for m in call] for call in in_calls(lines)] for _ in range(2)]
    assert calls[0] == calls[1]
    assert all(metric["_timestamp"] > 1e12 for metric in calls[0][0])


def test_calls_are_full_but_not_too_large() -> None:
    lines = [{"step": step, "a": 1.0, "b": 2.0, "c": 3.0, "time": 5.0} for step in range(1000)]
    calls = list(in_calls(lines))
    assert [len(call) for call in calls] == [999, 999, 999, 3]
    assert len(unsent([*lines, *lines], known={0, 1})) == 998


def test_a_stage_that_failed_is_shown_as_failed_until_it_runs_again(plan: Plan) -> None:
    client = Client()
    write(plan, range(1, 3))
    (stage,) = plan.stages.values()
    stage.store(plan.storage).fail("DataError: no shard", final=True)
    run_of(client, plan).end()
    assert (client.status, client.tags["mlflow.note.content"]) == ("FAILED", "DataError: no shard")
    run_of(client, plan)
    assert client.status == "RUNNING"


def test_progress_needs_no_server(plan: Plan) -> None:
    text = io.StringIO()
    write(plan, range(1, 3))
    (stage,) = plan.stages.values()
    stage.store(plan.storage).fail("last week's", final=True)
    with Follower(plan, Progress(Console(file=text, width=200)), every_s=60):
        write(plan, range(3, 4))
        stage.store(plan.storage).fail("DataError: no shard", final=True)
    assert "step 3/" in text.getvalue()
    assert "step 2/" not in text.getvalue()
    assert "last week" not in text.getvalue()
    assert f"distill failed {stage.name}: DataError: no shard" in text.getvalue()


def test_finished_answers_carry_their_score_once(tmp_path: Path) -> None:
    client, storage = Client(), Storage(str(tmp_path))
    recipe = Answers(model="stage:finetune/" + "a" * 16, benchmark="ocrbench", questions="q")
    amounts: dict[str, Any] = dict.fromkeys(("num_samples", "total_steps"), 4)
    amounts |= {"flops": None, "bytes_out": None, "reused": False, "inputs": ()}
    stage = Stage(kind="answers", key="b" * 16, name="ocrbench", recipe=recipe, **amounts)
    store = stage.store(storage)
    asked = [
        Question(
            benchmark="ocrbench", item_id=str(n), prompt="?", image=None, image_sha256="", gold="7"
        )
        for n in range(4)
    ]
    journal = JournalWriter(store, 1)
    (block,) = blocks_of(asked)
    write_block(store, block, ["7", "7", "7", "8"], [1] * 4)
    journal.append({"step": 4, "asked": 4, "samples_per_s": 2.0})
    run = StageRun(client, "id", stage, storage)
    run.send()
    assert {m.key for m in client.sent} == {"samples_per_s"}  # not before it is finished
    store.finish({})
    for each in (run, run, StageRun(client, "id", stage, storage)):
        each.send()
    found = {m.key: m.value for m in client.sent}
    assert len(found) == len(client.sent)
    assert (found["score"], found["n"], found["chance"]) == (75.0, 4.0, 0.0)
    assert found["constant_share"] == 0.75
    assert found["score_low"] < 75 < found["score_high"]
    assert {(m.step, m.timestamp) for m in client.sent if m.key != "samples_per_s"} == {
        (m.step, m.timestamp) for m in client.sent if m.key == "samples_per_s"
    }
    storage.write(b"torn", *store.parts, "output", "00000.parquet")
    broken = Client()
    StageRun(broken, "id", stage, storage).send()
    assert "is damaged" in broken.tags["mlflow.note.content"]
