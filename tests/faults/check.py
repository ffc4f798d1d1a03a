"""What must not be any different after a fault: the five checks of a row.

Each function returns what is wrong, in words, and nothing where all is well.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from kdscale.core.journal import JournalReader, read_steps
from kdscale.core.lease import Lease
from kdscale.core.storage import StageStore, Storage

CHECKS = ("finished", "identical", "mlflow", "resources", "orphans")
# What a run says of its own speed, or of when and where it ran: the rest are results.
MEASURED = {
    *("time", "attempt", "samples_per_s", "tokens_per_s", "data_wait", "seconds", "peak_mib"),
    "shard",  # of those left, whichever is done first
}


@dataclass(frozen=True)
class Outcome:
    """What a sweep has left behind.

    Attributes:
        outputs: Hash of every file that a finished stage has put out, by kind, key and name.
        steps: What the journals say of each step, without measured times, by stage; the stages in
            the order that they were run in.
        metrics: Steps of every metric in MLflow, as often as they are there, by stage.
        runs: MLflow's runs of each stage.
        repeated: Steps that were done again.
    """

    outputs: dict[str, str] = field(default_factory=dict)
    steps: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    metrics: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    runs: dict[str, int] = field(default_factory=dict)
    repeated: int = 0

    def to_json(self) -> str:
        """Returns it as a document."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads what `to_json` wrote."""
        return cls(**json.loads(text))


def stages_of(storage: Storage) -> list[StageStore]:
    """Returns all stages that have been begun."""
    return [
        StageStore(storage, kind, key)
        for kind in storage.names("stages")
        for key in storage.names("stages", kind)
    ]


def outcome(storage: Storage, tracking_uri: str) -> Outcome:
    """Reads what a sweep has left behind."""
    done = [stage for stage in stages_of(storage) if stage.is_done()]
    lines = {name_of(stage): JournalReader(stage).new_lines() for stage in done}
    done.sort(key=lambda stage: lines[name_of(stage)][0]["time"])
    steps = {name_of(stage): results_in(read_steps(stage)) for stage in done}
    metrics, runs = _tracked(tracking_uri)
    return Outcome(
        outputs={name: digest for stage in done for name, digest in _hashes(stage)},
        steps=steps,
        metrics=metrics,
        runs=runs,
        repeated=sum(len(lines[name]) - len(steps[name]) for name in steps),
    )


def results_in(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns journal lines without what was measured of the run itself."""
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines]


def name_of(stage: StageStore) -> str:
    """Names a stage by kind and key."""
    return f"{stage.kind}/{stage.key}"


def _hashes(stage: StageStore) -> Iterable[tuple[str, str]]:
    """Yields the names of a stage's output files with their hashes."""
    root = Path(stage.url("output"))
    for file in sorted(root.rglob("*")):
        if file.is_file():
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            yield f"{name_of(stage)}/{file.relative_to(root)}", digest


def _tracked(tracking_uri: str) -> tuple[dict[str, dict[str, list[int]]], dict[str, int]]:
    """Reads every stage's metrics and counts its runs."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=tracking_uri)
    found = client.search_experiments(filter_string="name LIKE 'kdscale/%'")
    metrics: dict[str, dict[str, list[int]]] = {}
    runs: dict[str, int] = {}
    for run in client.search_runs([each.experiment_id for each in found]):
        if "kdscale.key" not in run.data.tags:
            continue
        name = f"{run.data.tags['stage']}/{run.data.tags['kdscale.key']}"
        runs[name] = runs.get(name, 0) + 1
        for metric in run.data.metrics:
            history = client.get_metric_history(run.info.run_id, metric)
            steps = metrics.setdefault(name, {}).setdefault(metric, [])
            metrics[name][metric] = sorted([*steps, *(point.step for point in history)])
    return metrics, runs


def finished(control: Outcome, found: Outcome, exit_code: int | None) -> str:
    """Tells what has not come to its end."""
    if exit_code is None:
        return "the command did not end in time"
    if exit_code != 0:
        return f"the command ended with {exit_code}"
    return _listed("not finished", sorted(control.steps.keys() - found.steps.keys()))


def identical(control: Outcome, found: Outcome, *, told: bool = False) -> str:
    """Tells which results differ; of a fault that is announced, whether steps were repeated."""
    wrong = [
        f"{name} {what}"
        for name in sorted(control.outputs.keys() | found.outputs.keys())
        if (what := _compared(control.outputs.get(name), found.outputs.get(name)))
    ]
    for name, lines in control.steps.items():
        other = found.steps.get(name, [])
        if [line["step"] for line in lines] != [line["step"] for line in other]:
            wrong.append(f"{name} has other steps")
        elif lines != other:
            first = next(a["step"] for a, b in zip(lines, other, strict=True) if a != b)
            wrong.append(f"{name} differs from step {first} on")
    wrong += [f"{found.repeated} steps were done twice"] if told and found.repeated else []
    return _listed("differs", wrong)


def _compared(one: str | None, other: str | None) -> str:
    """Says how two hashes differ."""
    if one == other:
        return ""
    return "is missing" if other is None else "is too much" if one is None else "differs"


def tracked(control: Outcome, found: Outcome) -> str:
    """Tells which steps MLflow has twice or not at all."""
    wrong = [f"{count} runs of {name}" for name, count in found.runs.items() if count != 1]
    for name, metrics in control.metrics.items():
        for metric, steps in metrics.items():
            there = found.metrics.get(name, {}).get(metric, [])
            twice = sorted({step for step in there if there.count(step) > 1})
            missing = sorted(set(steps) - set(there))
            more = sorted(set(there) - set(steps))
            for what, which in (("twice", twice), ("missing", missing), ("unknown", more)):
                wrong += [f"{name} {metric}: {what} {which[:5]}"] if which else []
    return _listed("MLflow", wrong)


def held(total: Mapping[str, float], free: Mapping[str, float]) -> str:
    """Tells which CPUs and GPUs are not free."""
    wrong = [
        f"{total[name] - free.get(name, 0.0):g} of {total[name]:g} {name} held"
        for name in ("CPU", "GPU")
        if total.get(name, 0.0) != free.get(name, 0.0)
    ]
    return "; ".join(wrong)


def leases(storage: Storage) -> str:
    """Tells which stages somebody still holds."""
    still = [name_of(stage) for stage in stages_of(storage) if Lease.seems_held(stage)]
    return _listed("lease held", still)


def orphans(left: Iterable[str]) -> str:
    """Tells which processes are left, given their names."""
    return _listed("left", sorted(left))


def _listed(what: str, found: list[str], most: int = 4) -> str:
    """Puts a list in words; the empty one is nothing."""
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return f"{what}: {'; '.join(found[:most])}{more}" if found else ""
