"""Limits of what a sweep may use: refused before it starts, or stopped while it runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from kdscale.core.answers_config import Answers
from kdscale.core.checkpoints import Checkpoints
from kdscale.core.config import Embed, Execution
from kdscale.core.journal import read_steps
from kdscale.core.lease import Lease
from kdscale.core.stop import ask_to_stop, let_run
from kdscale.core.types import LimitReached, OverBudget, StorageError
from kdscale.core.vlm_config import Features
from kdscale.sweep.kept import is_finished
from kdscale.sweep.plan import Plan
from kdscale.sweep.stage import Stage
from kdscale.sweep.tree import rounded


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a run may use at most.

    Attributes:
        gpu_hours: Accelerators times hours; None for no limit.
        cost: Money, in the currency of the rates; likewise.
        spot: Count money at the spot price.
    """

    gpu_hours: float | None = None
    cost: float | None = None
    spot: bool = False

    def __bool__(self) -> bool:
        return self.gpu_hours is not None or self.cost is not None


NO_LIMITS = Limits()


class Budget:
    """Watches what a plan uses while it runs, and asks its stages to stop at the limit.

    Stages are counted from outside, by their leases: whoever runs a stage of the plan uses it up.

    Args:
        plan: What is run.
        limits: What it may use.
        say: Told in a line what happens.
        every_s: Seconds between two looks.
    """

    def __init__(
        self, plan: Plan, limits: Limits, say: Callable[[str], None], every_s: float = 5.0
    ) -> None:
        self._plan, self._limits, self._say, self._every_s = plan, limits, say, every_s
        self._on_gpus = any(_run_of(stage).gpus_per_worker for stage in plan.remaining())
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True, name="budget")
        self.hours = 0.0
        self.reason = ""  # why the stages were asked to stop; empty while they were not

    @property
    def unit(self) -> str:
        """What hours are counted in: where no stage asks for a GPU, workers."""
        return "GPU-hours" if self._on_gpus else "worker-hours"

    def check(self) -> None:
        """Compares the estimate of what is left with the limits.

        Raises:
            OverBudget: It is above one, or not known.
        """
        if not self._limits:
            return
        left = self._plan.remaining()
        unknown = [stage for stage in left if stage.flops is None]
        if unknown:
            names = ", ".join(f"{stage.kind} {stage.name!r}" for stage in unknown[:3])
            raise OverBudget(
                f"what {names} will cost is not known, so no limit can be kept: leave out "
                "--max-gpu-hours and --max-cost, or give `facts` of its towers and the size of its "
                "data"
            )
        rates = self._plan.rates
        flops = sum((s.flops or 0.0) * (1 - done_share(s, self._plan)) for s in left)
        hours = rates.gpu_hours(flops)
        self._refuse("GPU-hours", hours, self._limits.gpu_hours, "--max-gpu-hours")
        if self._limits.cost is not None:
            cost = self._price() * hours
            self._refuse(rates.currency, cost, self._limits.cost, "--max-cost")
        if left and not self._on_gpus:
            self._say("no stage of this plan asks for a GPU: while it runs, hours of workers count")

    def __enter__(self) -> Budget:
        for stage in self._plan.remaining():
            let_run(stage.store(self._plan.storage))
        if self._limits:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._limits:
            self._thread.join()
        if self.reason:
            for stage in self._plan.remaining():
                let_run(stage.store(self._plan.storage))

    def look(self, elapsed_s: float) -> None:
        """Adds what has been used since the last look, and stops the sweep at the limit."""
        for stage in running_stages(self._plan):
            run = _run_of(stage)
            units = run.gpus_per_worker if self._on_gpus else 1.0
            self.hours += run.world_size * units * elapsed_s / 3600
        if not self.reason and (text := self._reached()):
            self.reason = text
            self._say(f"[yellow]{text}[/]: running stages stop at their next checkpoint")
            for stage in self._plan.remaining():
                if not is_finished(stage, self._plan.storage):
                    ask_to_stop(stage.store(self._plan.storage), text)

    def raise_if_stopped(self) -> None:
        """Says that the sweep was stopped, and how it goes on.

        Raises:
            LimitReached: It was, before all stages were finished.
        """
        left = sum(not is_finished(stage, self._plan.storage) for stage in self._plan.remaining())
        if self.reason and left:
            raise LimitReached(
                f"{self.reason}; {left} of {len(self._plan.stages)} stages are not finished. Run "
                "it again to go on from the checkpoints; each run counts anew"
            )

    def _loop(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(self._every_s):
            now = time.monotonic()
            with suppress(OSError, StorageError):  # the next look counts for this one, too
                self.look(now - last)
                last = now

    def _reached(self) -> str:
        """Says which limit has been reached, empty where none has."""
        hours, cost = self._limits.gpu_hours, self._limits.cost
        if hours is not None and self.hours >= hours:
            return f"the limit of {rounded(hours)} {self.unit} is reached"
        if cost is not None and self.hours * self._price() >= cost:
            spent = f"{rounded(self.hours)} {self.unit}"
            return f"the limit of {rounded(cost)} {self._plan.rates.currency} is reached ({spent})"
        return ""

    def _price(self) -> float:
        """Returns the price of an hour.

        Raises:
            OverBudget: It is not known.
        """
        price = self._plan.rates.price(spot=self._limits.spot)
        if price is None:
            market = "spot" if self._limits.spot else "on-demand"
            raise OverBudget(
                f"the {market} price of an hour of {self._plan.rates.name} is not known, so "
                "--max-cost cannot be kept: name it in a file (--prices FILE)"
            )
        return price

    def _refuse(self, unit: str, estimate: float, limit: float | None, option: str) -> None:
        """Refuses an estimate above a limit."""
        if limit is not None and estimate > limit:
            rates = self._plan.rates
            raise OverBudget(
                f"what is left of this plan is estimated at {rounded(estimate)} {unit} "
                f"({rates.name} at {rates.efficiency:.0%} of its peak), the limit is "
                f"{rounded(limit)}: raise {option}, or ask for less (`kdscale plan` shows what "
                "each stage takes)"
            )


def running_stages(plan: Plan) -> list[Stage]:
    """Returns the stages of a plan that run at this moment.

    A trial holds the leases of all that it has still to do and does it in turn: only the first of
    them runs.
    """
    found: dict[str, Stage] = {}
    for trial in plan.trials:
        for stage in (plan.stages[key] for key in trial.path if not plan.stages[key].reused):
            if is_finished(stage, plan.storage):
                continue
            if Lease.seems_held(stage.store(plan.storage)):
                found[stage.key] = stage
            break
    return list(found.values())


def done_share(stage: Stage, plan: Plan) -> float:
    """Returns how much of an unfinished stage is done and will not be done again, 0 to 1."""
    store, whole = stage.store(plan.storage), stage.total_steps or 0
    if isinstance(stage.recipe, Answers | Embed | Features):
        lines = read_steps(store)
        done = lines[-1]["step"] if lines else 0
        whole = lines[-1].get("shards", whole) if lines else whole
    else:
        done = Checkpoints(store, keep=1).latest_step()
    return min(1.0, done / whole) if whole else 0.0


def _run_of(stage: Stage) -> Execution:
    """Returns how a stage is run."""
    return stage.recipe.run or Execution()
