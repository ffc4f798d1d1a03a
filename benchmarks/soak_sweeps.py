"""Whether memory and open files stay flat: small sweeps, back to back, from one driver.

One Ray instance, one storage, one MLflow database; each round is a sweep of new seeds, whose stages
are removed once their report is written. After a warm-up (the first third, for imports, caches and
Ray's pool of processes) a line is fitted to what each process holds. It is FLAT if over what was
measured the line rises by less than 3 % of the mean, or by less than 8 MiB of memory or 4 files. In
less than 15 minutes the start still shows: there it is 8 %, 24 MiB or 12 files. The exit code is 1
where something is not flat.

    python benchmarks/soak_sweeps.py [--minutes 30]
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from _common import table
from _process import children, held
from _tiny import tiny_plan, tiny_scale, tiny_sweep
from rich.console import Console

from kdscale.core.scale import Scale
from kdscale.sweep.run import execute
from kdscale.sweep.schedule import start_ray
from kdscale.sweep.tracking import default_tracking_uri

SAMPLE_EVERY_S = 2.0
WARM_UP = 1 / 3
LONG_S = 900.0
PROGRAMS = {"raylet": "raylet", "gcs": "gcs_server", "Ray's agent": "ray::DashboardAgent"}


@dataclass
class Series:
    """What one process held over time."""

    times: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    files: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Verdict:
    """A fitted line.

    Attributes:
        mean: Of what was measured after the warm-up.
        rise: Of the line, from its beginning to its end.
        flat: By the rule of this benchmark.
    """

    mean: float
    rise: float
    flat: bool


class Monitor(threading.Thread):
    """Notes every few seconds what this process and Ray's hold; Ray has to be running."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.processes = {"driver, MLflow's client in it": os.getpid(), **rays_own()}
        self.series: dict[str, Series] = {}
        self.stop = threading.Event()

    def run(self) -> None:
        began = time.monotonic()
        while not self.stop.wait(SAMPLE_EVERY_S):
            for name, pid in self.processes.items():
                found, series = held(pid), self.series.setdefault(name, Series())
                series.times.append(time.monotonic() - began)
                series.memory.append(found.resident_mib)
                series.files.append(found.files)


def rays_own() -> dict[str, int]:
    """Finds Ray's own processes below this one, by their programs or the titles they have."""
    below = children(os.getpid())
    programs = {Path(command.partition(" ")[0]).name: pid for pid, command in below.items()}
    if absent := [program for program in PROGRAMS.values() if program not in programs]:
        sys.exit(f"no process of Ray's is called {' or '.join(absent)}; there are: {below}")
    return {name: programs[program] for name, program in PROGRAMS.items()}


def judge(times: Sequence[float], values: Sequence[float], least: float) -> Verdict:
    """Fits a line to what came after the warm-up.

    Args:
        times: Seconds.
        values: What was held.
        least: A rise below which nothing is said to rise.
    """
    at, value = np.array(times), np.array(values)
    late = at >= at[0] + WARM_UP * (at[-1] - at[0])
    slope = np.polyfit(at[late], value[late], 1)[0]
    rise, mean = float(slope * (at[-1] - at[late][0])), float(value[late].mean())
    is_long = at[-1] - at[0] >= LONG_S
    bound = max(least if is_long else 3 * least, (0.03 if is_long else 0.08) * mean)
    return Verdict(mean, rise, rise < bound)


def one_round(number: int, root: str, scale: Scale, trials: int) -> None:
    """Runs a small sweep of new seeds and removes its stages."""
    sweep = tiny_sweep("soak", range(number * trials, (number + 1) * trials))
    plan = tiny_plan(sweep, root, scale)
    uri = default_tracking_uri(plan.storage)
    quiet = Console(file=io.StringIO(), width=160)
    execute(plan, [sweep], console=quiet, tracking_uri=uri, command="")
    for stage in plan.stages.values():
        assert stage.store(plan.storage).is_done()
        plan.storage.remove(*stage.store(plan.storage).parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--trials", type=int, default=2, help="of a sweep")
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/kdscale-bench"))
    options = parser.parse_args()
    scale, rounds = tiny_scale(options.scratch), 0
    with tempfile.TemporaryDirectory() as root:
        start_ray()
        one_round(0, root, scale, options.trials)  # imports, and Ray's processes
        monitor = Monitor()
        monitor.start()
        began = time.monotonic()
        while time.monotonic() - began < 60 * options.minutes:
            rounds += 1
            one_round(rounds, root, scale, options.trials)
        elapsed = time.monotonic() - began
        monitor.stop.set()
        monitor.join()
    rows: list[tuple[str, ...]] = []
    rising: list[str] = []
    for name, series in monitor.series.items():
        for what, values, least in (("MiB", series.memory, 8.0), ("files", series.files, 4.0)):
            found = judge(series.times, values, least)
            rows.append(
                (
                    f"{name}, {what}",
                    f"{values[0]:,.0f}",
                    f"{max(values):,.0f}",
                    f"{values[-1]:,.0f}",
                    f"{found.rise:+,.1f}",
                    "FLAT" if found.flat else "RISES",
                )
            )
            rising += [] if found.flat else [f"{name} ({what})"]
    title = f"{rounds} sweeps of {options.trials} trials in {elapsed / 60:.0f} minutes, one driver"
    header = ("process", "first", "most", "last", "rise of the fitted line", "")
    print(table(title, header, rows))
    if rising:
        sys.exit(f"not flat: {', '.join(rising)}")


if __name__ == "__main__":
    main()
