"""Four losses from one teacher: the whole sweep with the teacher online and from its cache.

At the miniature scale, by the command line that users have. The teacher is trained beforehand;
the cached sweep's time includes filling the cache. The plan's estimate for the true dimensions
is printed below.

    python benchmarks/cached_sweep.py [--teacher clip_l14] [--views 2]
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _common import table

SWEEP = '''
"""Which loss?"""
from kdscale import Distill, Sweep, choose

distill = Distill(student="vit_t16", teacher="{teacher}", loss=choose({losses}), epochs={epochs})
sweep = Sweep(name="cached_sweep", stages=[distill], scale="mini")
'''
LOSSES = '"clip_kd", "mse", "icl", "kl"'


def kdscale(*words: object) -> str:
    """Runs a command and returns what it printed."""
    program = [sys.executable, "-c", "from kdscale.cli import app; app()"]
    done = subprocess.run([*program, *map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout[-3000:] + done.stderr[-3000:])
    return done.stdout


def write_sweep(path: Path, teacher: str, losses: str, epochs: int) -> Path:
    """Writes a sweep file."""
    path.write_text(SWEEP.format(teacher=teacher, losses=losses, epochs=epochs))
    return path


def run(sweep: Path, prepared: Path, *options: str) -> tuple[float, dict[str, float]]:
    """Runs a sweep on a copy of a storage that has the teacher: seconds in all, and per kind."""
    storage = prepared.with_name(prepared.name + "-" + str(len(options)))
    shutil.copytree(prepared, storage, ignore=shutil.ignore_patterns("distill", "mlflow*"))
    began = time.perf_counter()
    kdscale("run", sweep, "--storage", storage, *options)
    elapsed = time.perf_counter() - began
    kinds: dict[str, float] = {}
    for record in storage.glob("stages/*/*/stage.json"):
        kind = record.parent.parent.name
        kinds[kind] = kinds.get(kind, 0.0) + json.loads(record.read_text())["seconds"]
    return elapsed, kinds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", default="clip_l14")
    parser.add_argument("--views", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=64)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        first = write_sweep(folder / "first.py", options.teacher, '"kl"', 1)
        sweep = write_sweep(folder / "four.py", options.teacher, LOSSES, options.epochs)
        prepared = folder / "runs"
        kdscale("run", first, "--storage", prepared)
        cached = ["--set", "teacher_outputs=cached", "--set", f"views={options.views}"]
        online_s, online = run(sweep, prepared)
        cached_s, own = run(sweep, prepared, *cached)
        plan = kdscale("plan", sweep, "--scale", "paper", "--set", f"views={options.views}")
    rows = [
        ("online", f"{online_s:.0f}", f"{online['distill']:.0f}", "", ""),
        (
            f"cached, {options.views} views",
            f"{cached_s:.0f}",
            f"{own['distill']:.0f}",
            f"{own['embed']:.0f}",
            f"{online_s / cached_s:.2f} x",
        ),
    ]
    header = ("teacher", "sweep, s", "4 distillations, s", "embedding, s", "speed-up")
    print(table(f"4 losses from {options.teacher} at the mini scale", header, rows))
    print("At the paper's dimensions the plan says:")
    print("\n".join(line for line in plan.splitlines() if "cached" in line or "times" in line))


if __name__ == "__main__":
    main()
