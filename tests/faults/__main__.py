"""Runs the fault matrix, row by row, and goes on where it was broken off.

    cd tests && python -m faults [--work DIR] [--only FAULT,...] [--seeds 0,1,2] [--page PAGE]
                                 [--at-once 2]

Results are kept in DIR/results.jsonl: a row that has one is not run again (`--again` does).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from faults.disturb import CONTROL, FAULTS, Fault
from faults.processes import adopt, end_all
from faults.results import (
    FAILED,
    NOT_RUN,
    PASSED,
    Row,
    append_row,
    left_to_do,
    read_rows,
    table,
    write_block,
)
from faults.row import REPOSITORY, SWEEP, place
from kdscale.core.storage import Storage

LONGEST_PATH = 29  # Ray's sockets lie deep below it, and their names are limited to 107 bytes
ROW_S = 1200
RESULTS = "results.jsonl"
OWN_MOUNTS = ["unshare", "--mount", "--propagation", "private"]
COMMAND = "make faults"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the rows that are asked for; returns 1 if one of them has failed."""
    options = _parsed(arguments)
    faults = _chosen(options.only)
    work = Path(options.work or tempfile.mkdtemp(prefix="faults", dir="/tmp")).absolute()
    if len(str(work)) > LONGEST_PATH:
        raise SystemExit(f"--work {work} is too long for Ray's sockets: choose a shorter path")
    work.mkdir(parents=True, exist_ok=True)
    wanted = [(fault.name, seed) for seed in map(int, options.seeds.split(",")) for fault in faults]
    wanted.insert(0, (CONTROL.name, 0))
    results = work / RESULTS
    adopt()
    prepare(work)
    rows = read_rows(results)
    left = [key for key in wanted if options.again or key in left_to_do(wanted, rows)]
    matrix = Matrix(work, options.patience or float(options.at_once))
    if not (work / "control.json").exists() and matrix.run(CONTROL.name, 0).status != PASSED:
        raise SystemExit("the control has failed: nothing to compare with")
    with ThreadPoolExecutor(options.at_once) as pool:
        list(pool.map(lambda key: matrix.run(*key), [key for key in left if key != wanted[0]]))
    rows = read_rows(results)
    text = page(list(rows.values()))
    print(text)
    if options.page:
        write_block(options.page, text)
    return int(any(row.status == FAILED for key, row in rows.items() if key in set(wanted)))


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    about = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser("python -m faults", **about)
    parser.add_argument("--work", help="directory for everything, a short path; default: a new one")
    parser.add_argument("--only", help=f"of {', '.join(FAULTS)}")
    parser.add_argument("--seeds", default="0,1,2", help="each draws its own moments")
    parser.add_argument("--again", action="store_true", help="run rows that have a result, too")
    parser.add_argument("--page", type=Path, help="Markdown page whose block is written anew")
    parser.add_argument("--at-once", type=int, default=1, help="rows; a row idles half of its time")
    patience = "what time limits are multiplied by, on a busy machine; default: rows at once"
    parser.add_argument("--patience", type=float, help=patience)
    return parser.parse_args(arguments)


def _chosen(only: str | None) -> list[Fault]:
    """Returns the faults with these names."""
    names = list(FAULTS) if only is None else only.split(",")
    unknown = [name for name in names if name not in FAULTS and name != CONTROL.name]
    if unknown:
        raise SystemExit(f"no fault {', '.join(unknown)}: there are {', '.join(FAULTS)}")
    return [FAULTS[name] for name in names if name in FAULTS]


def prepare(work: Path) -> None:
    """Draws, once, all that the sweep reads; rows begin with copies of it."""
    done = work / "prepared.json"
    if done.exists():
        return
    program = (
        "import sys, runpy\n"
        "from kdscale.core.scale import MINI\n"
        "from kdscale.core.storage import Storage\n"
        "from kdscale.sweep.plan import make_plan\n"
        "from kdscale.sweep.prepare import prepare\n"
        "sweep = runpy.run_path(sys.argv[1])['sweep']\n"
        "prepare(make_plan([sweep], Storage(sys.argv[2]), MINI, {}), print)\n"
    )
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-c", program, str(SWEEP), str(work / "prepared")]
    subprocess.run(command, check=True, env=env)
    done.write_text(json.dumps(Storage(str(work / "prepared")).names("data")))


class Matrix:
    """Runs rows, several at once, each in a process of its own.

    Args:
        work: Where everything is kept.
        patience: What time limits are multiplied by.
    """

    def __init__(self, work: Path, patience: float) -> None:
        self.work, self.patience = work, patience
        self._rows: set[int] = set()
        self._lock = Lock()

    def run(self, name: str, seed: int) -> Row:
        """Runs a row, and notes and prints its result."""
        row = self._run(name, seed)
        with self._lock:
            append_row(self.work / RESULTS, row)
            print(f"{time.strftime('%H:%M:%S')} {name} {seed}: {row.status} in {row.seconds:.0f} s")
            print("".join(f"    {t}\n" for t in (row.moment, row.trouble) if t), flush=True)
        return row

    def _run(self, name: str, seed: int) -> Row:
        lacking = FAULTS.get(name, CONTROL).lacking()
        if lacking:
            return Row(name, seed, NOT_RUN, why=lacking)
        own = [str(self.work), name, str(seed), str(self.patience)]
        command = [sys.executable, "-m", "faults.row", *own]
        command = [*(OWN_MOUNTS if os.geteuid() == 0 else []), *command]
        paths = [str(REPOSITORY / "tests"), str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        result = place(self.work, name, seed) / "row.json"
        result.unlink(missing_ok=True)
        why = "the row itself broke: see above"
        with self._lock:
            process = subprocess.Popen(command, env=env)
            self._rows.add(process.pid)
        try:
            process.wait(ROW_S * self.patience)
        except subprocess.TimeoutExpired:
            why = f"the row did not end in {ROW_S * self.patience:.0f} s"
        with self._lock:
            self._rows.remove(process.pid)
            end_all(but=self._rows)  # what rows have left behind is ours
        process.wait()
        if not result.exists():
            return Row(name, seed, FAILED, why=why)
        return Row(**json.loads(result.read_text()))


def page(rows: Sequence[Row]) -> str:
    """Returns what stands in the documentation: the table and the command that makes it."""
    titles = {CONTROL.name: CONTROL.title} | {name: f.title for name, f in FAULTS.items()}
    again = "; ".join(fault.title for fault in FAULTS.values() if fault.again)
    return "\n".join(
        [
            f"Written by `{COMMAND}`.",
            "",
            table(rows, titles),
            "",
            f"The command may be given again after these, as a user would: {again}.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
