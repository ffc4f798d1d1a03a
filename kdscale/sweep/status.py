"""How far a sweep is, from what its stages have written: from any machine that sees the storage."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kdscale.core.config import Execution
from kdscale.core.journal import JournalReader, Line, read_steps
from kdscale.core.lease import Lease
from kdscale.core.stage_log import logs_command
from kdscale.core.stop import stopped
from kdscale.core.storage import StageStore, Storage
from kdscale.core.types import StorageError
from kdscale.sweep.budget import done_share
from kdscale.sweep.kept import is_finished
from kdscale.sweep.plan import Plan
from kdscale.sweep.progress import describe_line, priced, print_to_choose
from kdscale.sweep.stage import Stage
from kdscale.sweep.tree import rounded

STATES = ("done", "running", "waiting", "interrupted", "stopped early", "failed")
TO_SHOW = ("running", "failed", "interrupted", "stopped early")


@dataclass(frozen=True, kw_only=True)
class StageStatus:
    """One stage of a plan.

    Attributes:
        state: One of `STATES`.
        detail: How far it is, or what went wrong.
        seconds: That its attempts have taken.
        left_s: That it will still take by what finished ones took; None where none is finished.
        samples_per_s: Of its last step, None unless it runs.
        data_wait: Share of its time that it waited for data, likewise.
    """

    stage: Stage
    state: str
    detail: str
    seconds: float
    left_s: float | None
    samples_per_s: float | None = None
    data_wait: float | None = None

    @property
    def gpus(self) -> float:
        """Accelerators that it takes."""
        run = self.stage.recipe.run or Execution()
        return run.world_size * run.gpus_per_worker


@dataclass(frozen=True, kw_only=True)
class SweepStatus:
    """All stages of a plan.

    Attributes:
        at_once: Stages that run at this moment.
    """

    plan: Plan
    stages: tuple[StageStatus, ...]
    at_once: int

    def count(self, state: str, kind: str | None = None) -> int:
        """Returns how many stages are in a state."""
        return sum(s.state == state and kind in (None, s.stage.kind) for s in self.stages)

    @property
    def gpu_hours(self) -> float:
        """Accelerators times hours that were used."""
        return sum(each.gpus * each.seconds for each in self.stages) / 3600

    @property
    def samples_per_s(self) -> float:
        """Throughput of all that runs."""
        return sum(each.samples_per_s or 0.0 for each in self.stages)

    @property
    def left_s(self) -> float | None:
        """Seconds until the end as far as is known, with as many stages at once as now."""
        rest = [each.left_s for each in self.stages if each.state != "done"]
        known = [seconds for seconds in rest if seconds is not None]
        if not self.at_once or len(known) < len(rest):
            return None
        return sum(known) / self.at_once

    def document(self) -> dict[str, Any]:
        """Returns it as JSON; what is not known is null."""
        return {
            "stages": {state: self.count(state) for state in STATES},
            "gpu_hours": self.gpu_hours,
            "money": self.plan.rates.money(self.gpu_hours),
            "currency": self.plan.rates.currency,
            "samples_per_s": self.samples_per_s,
            "left_s": self.left_s,
            "unfinished": [
                {
                    "kind": each.stage.kind,
                    "key": each.stage.key,
                    "name": each.stage.name,
                    "state": each.state,
                    "detail": each.detail,
                    "seconds": each.seconds,
                    "left_s": each.left_s,
                    "samples_per_s": each.samples_per_s,
                    "data_wait": each.data_wait,
                }
                for each in self.stages
                if each.state != "done"
            ],
        }


def look(plan: Plan) -> SweepStatus:
    """Reads how far every stage of a plan is."""
    found: list[tuple[Stage, str, str, list[Line], float]] = []
    for stage in plan.stages.values():
        state, detail = stage_state(stage, plan.storage)
        lines: list[Line] = []
        if state != "done":
            lines = JournalReader(stage.store(plan.storage)).new_lines()
        seconds = _recorded(stage, plan.storage) if state == "done" else _spent(lines)
        found.append((stage, state, detail, lines, seconds))
    paces = _Paces([(stage, seconds) for stage, state, *_, seconds in found if state == "done"])
    stages: list[StageStatus] = []
    for stage, state, detail, lines, seconds in found:
        last = lines[-1] if lines and state == "running" else {}
        status = StageStatus(
            stage=stage,
            state=state,
            detail=detail,
            seconds=seconds,
            left_s=0.0 if state == "done" else paces.left(stage, plan),
            samples_per_s=last.get("samples_per_s"),
            data_wait=last.get("data_wait"),
        )
        stages.append(status)
    at_once = sum(state == "running" for _, state, *_ in found)
    return SweepStatus(plan=plan, stages=tuple(stages), at_once=at_once)


class _Paces:
    """How long stages take, by those that are finished: of one kind, work and time go together."""

    def __init__(self, done: Sequence[tuple[Stage, float]]) -> None:
        self._work: defaultdict[str, float] = defaultdict(float)
        self._seconds: defaultdict[str, float] = defaultdict(float)
        for stage, seconds in done:
            if stage.flops and seconds:
                for kind in (stage.kind, ""):
                    self._work[kind] += stage.flops
                    self._seconds[kind] += seconds

    def left(self, stage: Stage, plan: Plan) -> float | None:
        """Returns the seconds that an unfinished stage will take; None where nothing is known."""
        kind = stage.kind if self._work[stage.kind] else ""
        if stage.flops is None or not self._work[kind]:
            return None
        whole = stage.flops * self._seconds[kind] / self._work[kind]
        return whole * (1 - done_share(stage, plan))


def _recorded(stage: Stage, storage: Storage) -> float:
    """Returns the seconds that a finished stage says it took."""
    try:
        return float(stage.store(storage).record().get("seconds", 0.0))
    except (StorageError, ValueError):  # written by an older version, or being done again
        return 0.0


def _spent(lines: Sequence[Line]) -> float:
    """Returns the seconds from the first to the last line of each attempt, summed."""
    times: dict[str, list[float]] = {}
    for line in lines:
        times.setdefault(line["attempt"], []).append(line["time"])
    return sum(max(own) - min(own) for own in times.values())


def stage_state(stage: Stage, storage: Storage) -> tuple[str, str]:
    """Returns a stage's state, one of `STATES`, and how far it is."""
    store = stage.store(storage)
    if is_finished(stage, storage):
        return "done", ""
    if store.is_done():
        return "waiting", stage.note
    return unfinished_state(store, stage.total_steps)


def unfinished_state(store: StageStore, total_steps: int | None = None) -> tuple[str, str]:
    """Returns state and detail of a stage that is not finished."""
    lines = read_steps(store)
    detail = describe_line(lines[-1], total_steps) if lines else ""
    if Lease.seems_held(store):
        return "waiting" if Lease.waits(store) else "running", detail
    note = stopped(store)
    if note is not None:
        value = _last_evaluation(lines)
        return "stopped early", f"at step {note['step']}{value} ({note['reason']})"
    failure = store.failure()
    if failure is not None:
        return "failed", failure["message"]
    was_begun = lines or Lease.is_left(store)
    return ("interrupted", detail) if was_begun else ("waiting", "")


def _last_evaluation(lines: list[Line]) -> str:
    """Says what the last evaluation found."""
    found = [line["zero_shot_top1"] for line in lines if "zero_shot_top1" in line]
    return f", top-1 {found[-1]:.1f} %" if found else ""


def print_status(status: SweepStatus, console: Console, *, every_stage: bool = False) -> None:
    """Prints how many stages are where, those that need a look, and what is left.

    Args:
        status: From `look`.
        console: Where to.
        every_stage: Print those that are done or waiting as well.
    """
    console.print(_by_kind(status))
    shown = STATES if every_stage else TO_SHOW
    rows = [each for each in status.stages if each.state in shown]
    if rows:
        table = Table("stage", "name", "key", "state", "progress", title="Stages")
        for each in rows:
            name, detail = escape(each.stage.name), escape(each.detail)
            table.add_row(each.stage.kind, name, each.stage.key, each.state, detail)
        console.print(table)
    if troubled := [each for each in rows if each.state in ("failed", "interrupted")]:
        command = logs_command(troubled[0].stage.key[:8], status.plan.storage)
        console.print(f"what a stage has said: {escape(command)}", soft_wrap=True, highlight=False)
    print_to_choose(status.plan, console)
    console.print(summary(status))


def _by_kind(status: SweepStatus) -> Table:
    """Returns the counts of states by kind of stage; states that none is in are left out."""
    states = [state for state in STATES if status.count(state)]
    table = Table("kind", *states, "time used", "to go")
    for kind in dict.fromkeys(each.stage.kind for each in status.stages):
        own = [each for each in status.stages if each.stage.kind == kind]
        left = [each.left_s for each in own]
        known = [seconds for seconds in left if seconds is not None]
        counts = [str(status.count(state, kind) or "") for state in states]
        to_go = duration(sum(known)) if len(known) == len(left) else "?"
        table.add_row(kind, *counts, duration(sum(each.seconds for each in own)), to_go)
    return table


def summary(status: SweepStatus) -> str:
    """Says in a line how far it is, how fast, what it has cost and when it ends."""
    parts = [f"{status.count('done')} of {len(status.stages)} stages done"]
    if status.at_once:
        waits = [each.data_wait for each in status.stages if each.data_wait is not None]
        waiting = f", data wait up to {100 * max(waits):.0f} %" if waits else ""
        speed = f"{status.samples_per_s:,.0f} samples/s"
        parts.append(f"{status.at_once} running at {speed} together{waiting}")
    if status.gpu_hours:
        money = priced(status.plan.rates.money(status.gpu_hours), status.plan.rates.currency)
        parts.append(f"{rounded(status.gpu_hours)} GPU-hours used{money}")
    if status.left_s is not None:
        parts.append(f"about {duration(status.left_s)} to go" if status.left_s else "finished")
    elif status.count("done") == len(status.stages):
        parts.append("finished")
    elif not status.at_once:
        parts.append("nothing runs")
    return "; ".join(parts)


def duration(seconds: float) -> str:
    """Writes a duration in the two units that matter."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
