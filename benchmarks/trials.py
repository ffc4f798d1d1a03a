"""What a sweep of many trials costs beside its work: to run them, and to find them all finished.

First all trials are run, each of a few steps of a tiny student, so that what is timed is starting,
watching and tracking them. Then the same command is given again, part by part and as a whole: what
it takes is the price of stages that are reused. Memory is the driver's.

    python benchmarks/trials.py [--trials 200] [--tracking-uri http://127.0.0.1:5000]
"""

from __future__ import annotations

import argparse
import io
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from _common import table
from _process import resident_mib
from _tiny import tiny_plan, tiny_scale, tiny_sweep
from rich.console import Console

from kdscale.core.scale import Scale
from kdscale.core.storage import Storage
from kdscale.sweep.grid import Sweep
from kdscale.sweep.plan import Plan
from kdscale.sweep.progress import print_plan
from kdscale.sweep.report import build_report
from kdscale.sweep.report_files import write_files
from kdscale.sweep.run import execute
from kdscale.sweep.tracking import Tracker, default_tracking_uri

AT_MOST_MS = 50.0


class Timer:
    """Times parts of a run: {name: seconds}."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Times a block."""
        began = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - began


def quiet() -> Console:
    """Returns a console that nobody reads."""
    return Console(file=io.StringIO(), width=160)


def reuse(sweep: Sweep, root: str, scale: Scale, uri: str, scratch: str) -> tuple[Timer, Plan]:
    """Times what a run does that finds every stage finished."""
    timer = Timer()
    with timer.part("plan"):
        plan = tiny_plan(sweep, root, scale)
    assert not plan.remaining()
    with timer.part("show the plan"):
        print_plan(plan, quiet())
    with timer.part("report, intervals included"):
        report = build_report(plan, [sweep])
    with timer.part("report's files"):
        files = write_files(report, plan, scratch)
    with timer.part("MLflow: connect and find the runs"):
        tracker = Tracker(uri, sweep.name, plan)
    with timer.part("MLflow: synchronise"):
        tracker.sync()
    with timer.part("MLflow: close"):
        tracker.close(files)
    return timer, plan


def run(sweep: Sweep, root: str, scale: Scale, uri: str, peek: Callable[[], None]) -> float:
    """Runs what is left of a sweep; returns the seconds that it took."""
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(1.0):
            peek()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    began = time.perf_counter()
    execute(tiny_plan(sweep, root, scale), [sweep], console=quiet(), tracking_uri=uri, command="")
    elapsed = time.perf_counter() - began
    stop.set()
    thread.join()
    return elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--tracking-uri", help="MLflow's server; else SQLite in the storage")
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/kdscale-bench"))
    options = parser.parse_args()
    sweep, scale = tiny_sweep("trials", range(options.trials)), tiny_scale(options.scratch)
    memory: list[tuple[int, float]] = []
    with tempfile.TemporaryDirectory() as root:
        storage = Storage(root)
        uri = options.tracking_uri or default_tracking_uri(storage)

        def peek() -> None:
            memory.append((len(storage.names("stages", "distill")), resident_mib()))

        first_s = run(sweep, root, scale, uri, peek)
        timer, plan = reuse(sweep, root, scale, uri, root)
        again_s = run(sweep, root, scale, uri, lambda: None)
    count = len(plan.stages)
    parts = [(name, f"{s:.2f}", f"{1000 * s / count:.1f}") for name, s in timer.seconds.items()]
    tracked = sum(s for name, s in timer.seconds.items() if name.startswith("MLflow"))
    rest = sum(timer.seconds.values()) - tracked
    parts += [("together, without MLflow", f"{rest:.2f}", f"{1000 * rest / count:.1f}")]
    parts += [("the whole command again", f"{again_s:.2f}", f"{1000 * again_s / count:.1f}")]
    title = f"{len(plan.trials)} trials, {count} stages, all finished"
    print(table(title, ("part", "s", "ms per reused stage"), parts))
    begun = [(done, mib) for done, mib in memory if done]
    rows = [
        (f"{100 * part // 4} %", *begun[min(len(begun) - 1, part * len(begun) // 4)])
        for part in range(5)
    ]
    shown = [(at, done, f"{mib:,.0f}") for at, done, mib in rows]
    title = f"{len(plan.trials)} trials run in {first_s:.0f} s, {first_s / count:.2f} s a stage"
    print(table(title, ("of the time", "trials begun", "driver's memory, MiB"), shown))
    verdict = "within" if 1000 * again_s / count <= AT_MOST_MS else "ABOVE"
    print(f"{1000 * again_s / count:.1f} ms per reused stage: {verdict} {AT_MOST_MS:g} ms")


if __name__ == "__main__":
    main()
