"""One row: a cluster and a sweep of its own, a fault, five checks; `python -m faults.row`.

A row is a process of its own, in mounts of its own where root runs it, and leaves its result in
`row.json`; what it has started ends with it.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from faults import check
from faults.cluster import Cluster, free_port
from faults.disturb import CONTROL, FAULTS, Fault
from faults.processes import Process, adopt, below, end_all, kill, wait_for
from faults.results import FAILED, Row, verdict
from kdscale.core.storage import Storage

REPOSITORY = Path(__file__).parents[2]
SWEEP = REPOSITORY / "tests" / "fault_sweep.py"
TOKEN = secrets.token_hex(32)  # without it no driver may connect to a head
RUN_S, FREE_S, END_S = 400, 60, 30
STORAGE_DISK, NODE_DISK = "1g", "512m"
RESOURCES = """
import json, ray
ray.init(log_to_driver=False, logging_level="error")
print(json.dumps([ray.cluster_resources(), ray.available_resources()]))
"""


class Missed(Exception):
    """The sweep ended before its fault's moment."""


class Run:
    """A sweep under way, as its fault sees it.

    Args:
        fault: What will be done to it.
        seed: What its moment is drawn from.
        work: The matrix's directory, with `prepared` and the control's `control.json`.
        patience: What time limits are multiplied by, on a busy machine.
    """

    def __init__(self, fault: Fault, seed: int, work: Path, patience: float) -> None:
        self.fault, self.patience = fault, patience
        self.drawn = random.Random(f"{fault.name} {seed}")
        self.folder = place(work, fault.name, seed)
        self.runs, self.exit_code = 0, None
        known = work / "control.json"
        self.control = check.Outcome.from_json(known.read_text()) if known.exists() else None
        self.storage = Storage(str(self.folder / "s"))
        self.tracking_uri = self._tracked_in = f"sqlite:///{self.folder}/m/mlflow.db"
        self._make_folders(work)
        self._server: subprocess.Popen[bytes] | None = None
        if fault.server:
            self._port = free_port()
            self.tracking_uri = f"http://127.0.0.1:{self._port}"
            self.start_server()
        self.cluster = Cluster(own_ray(work), fault.apart, self._env(), patience)
        self._prepare_node()
        self.cluster.start()
        self._driver: subprocess.Popen[bytes] | None = None

    def _make_folders(self, work: Path) -> None:
        """Makes the row's directories anew, with all that is drawn in its storage."""
        shutil.rmtree(self.folder, ignore_errors=True)
        root = Path(self.storage.root)
        for folder in (root, self.folder / "m"):
            folder.mkdir(parents=True)
        if self.fault.mounted:
            self._mount(root, STORAGE_DISK)
        shutil.copytree(work / "prepared", root, dirs_exist_ok=True)

    def _mount(self, folder: Path, size: str) -> None:
        """Makes a directory a file system of its own, gone with this process's mounts."""
        folder.mkdir(parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "faults", str(folder)]
        subprocess.run(command, check=True)

    def _prepare_node(self) -> None:
        """Gives the node of two a small disk, and a view of its memory that can be changed."""
        if not self.fault.apart:
            return
        node = self.cluster.machines[1]
        node.run("mount", "-t", "tmpfs", "-o", f"size={NODE_DISK}", "faults", str(node.folder))
        shown = self.folder / "meminfo"
        shown.write_text(Path("/proc/meminfo").read_text())
        node.run("mount", "--bind", str(shown), "/proc/meminfo")

    def _env(self) -> dict[str, str]:
        """Returns the environment of everything that is started."""
        dropped = ("RAY_", "MLFLOW_", "KDSCALE_")
        env = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
        paths = [str(REPOSITORY), env.get("PYTHONPATH", "")]
        return env | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": TOKEN,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "RAY_TRAIN_V2_ENABLED": "1",
            "RAY_worker_niceness": "0",
            "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "600",  # the machine may be busy
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # a head would wait, for nobody
        }

    def start(self) -> None:
        """Gives the command."""
        self.runs += 1
        env = self._env() | {"RAY_ADDRESS": self.cluster.address}
        env["TMPDIR"] = str(self.cluster.machines[0].folder)
        command = [sys.executable, str(SWEEP), "--storage", self.storage.root]
        command += ["--tracking-uri", self.tracking_uri]
        log = (self.folder / f"run-{self.runs}.log").open("wb")
        self._driver = subprocess.Popen(
            self.cluster.machines[0].command(*command),
            env=env,
            cwd=self.folder,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    def driver(self) -> Process:
        """Returns the command's own process."""
        assert self._driver is not None
        root = Process(self._driver.pid, "")
        found = [root, *below(root.pid)] if not self.fault.apart else below(root.pid)
        return found[0]

    def ended(self) -> bool:
        """Tells whether the command has ended."""
        assert self._driver is not None
        return self._driver.poll() is not None

    def finish(self) -> None:
        """Waits for the command's end, replacing a node that is lost; ends it if it does not."""
        assert self._driver is not None
        deadline = time.monotonic() + RUN_S * self.patience
        while not self.ended() and time.monotonic() < deadline:
            self.cluster.heal()
            time.sleep(0.5)
        self.exit_code = self._driver.poll()
        if self.exit_code is None:
            kill([Process(self._driver.pid, ""), *below(self._driver.pid)])
            self._driver.wait()

    def wait_for(self, condition: Callable[[], Any], what: str, timeout_s: float = RUN_S) -> Any:
        """Returns a condition's first true value.

        Raises:
            Missed: The command ended before.
            TimeoutError: It did not come in time.
        """

        def found() -> Any:
            value = condition()
            if not value and self.ended():
                raise Missed(f"the command ended before there was {what}")
            return value

        return wait_for(found, what, timeout_s * self.patience)

    def sleep(self, seconds: float) -> None:
        """Waits, or until the command has ended."""
        with suppress(TimeoutError):
            wait_for(self.ended, "the end", seconds, every_s=0.2)

    def until_moment(self, kinds: tuple[str, ...]) -> str:
        """Waits for a drawn step of a drawn stage, and says which."""
        name = self.drawn.choice(self._stages(kinds))
        last = len(self._steps(name))
        step = self.drawn.randint(1, max(1, last - 2))
        self.wait_for(lambda: self._journal(name) >= step, f"step {step} of {name}")
        return f"at step {step} of {last} of {name.partition('/')[0]}"

    def until_before(self, kinds: tuple[str, ...]) -> str:
        """Waits until a drawn stage is the next one, and names its kind."""
        assert self.control is not None
        name = self.drawn.choice(self._stages(kinds))
        order = list(self.control.steps)
        before = order[: order.index(name)]
        self.wait_for(lambda: all(map(self._is_done, before)), f"the beginning of {name}")
        return name.partition("/")[0]

    def _stages(self, kinds: tuple[str, ...]) -> list[str]:
        """Returns the stages of some kinds, in the order that they are run in."""
        assert self.control is not None
        return [name for name in self.control.steps if name.partition("/")[0] in kinds]

    def _steps(self, name: str) -> list[dict[str, Any]]:
        assert self.control is not None
        return self.control.steps[name]

    def _journal(self, name: str) -> int:
        """Counts the segments of a stage's journal: one is written a step."""
        return len(self.storage.names("stages", *name.split("/"), "journal"))

    def _is_done(self, name: str) -> bool:
        return self.storage.exists("stages", *name.split("/"), "DONE")

    def start_server(self) -> None:
        """Starts MLflow's server."""
        program = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
        program += ["--host", "127.0.0.1", "--port", str(self._port)]
        program += ["--backend-store-uri", self._tracked_in]
        program += ["--artifacts-destination", f"{self.folder}/m/artifacts"]
        log = (self.folder / "mlflow.log").open("ab")
        self._server = subprocess.Popen(program, stdout=log, stderr=log, start_new_session=True)
        wait_for(self._server_answers, "MLflow's server", 120 * self.patience, every_s=1.0)

    def _server_answers(self) -> bool:
        with suppress(OSError), urlopen(f"{self.tracking_uri}/health", timeout=10) as answer:
            return answer.status == 200
        return False

    def stop_server(self) -> None:
        """Kills MLflow's server with all its processes."""
        if self._server is not None:
            kill([Process(self._server.pid, ""), *below(self._server.pid)], signal.SIGKILL)
            self._server.wait()
            self._server = None

    def call(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Runs a command whose failure may be part of the matter."""
        return subprocess.run(command, env=self._env(), capture_output=True, text=True)

    def outcome(self) -> check.Outcome:
        """Reads what there is so far."""
        return check.outcome(self.storage, self._tracked_in)

    def held(self) -> str:
        """Tells what is still held a minute after the end, as a driver of its own sees it."""
        command = self.cluster.machines[0].command(sys.executable, "-c", RESOURCES)
        env = self._env() | {"RAY_ADDRESS": self.cluster.address}
        deadline, said = time.monotonic() + FREE_S * self.patience, "nobody answers"
        while said and time.monotonic() < deadline:
            done = subprocess.run(command, env=env, capture_output=True, text=True)
            if done.returncode == 0:
                said = check.held(*json.loads(done.stdout.splitlines()[-1]))
            time.sleep(1)
        return said or check.leases(self.storage)

    def left(self) -> str:
        """Stops the cluster, and tells which processes are left."""
        self.stop_server()
        self.cluster.stop()
        with suppress(TimeoutError):
            wait_for(lambda: not self.cluster.left(), "the last process", END_S * self.patience)
        return check.orphans(process.name for process in self.cluster.left())


def place(work: Path, fault: str, seed: int) -> Path:
    """Returns a row's directory."""
    return work / "rows" / f"{fault}{seed}"


def own_ray(work: Path) -> Path:
    """Returns this process's directory for Ray, moved into its row's in the end.

    Ray's sockets need a short path.
    """
    return work / str(os.getpid())


def run_row(fault: Fault, seed: int, work: Path, patience: float) -> Row:
    """Runs a row and checks it."""
    run = Run(fault, seed, work, patience)
    began, moment, why = time.monotonic(), "", ""
    run.start()
    try:
        moment = fault.inject(run)
    except (Missed, TimeoutError, OSError, AssertionError) as error:
        why = f"{type(error).__name__}: {error}"
    run.finish()
    found = run.outcome()
    control = run.control or found
    if fault.again and not why and (run.exit_code != 0 or check.tracked(control, found)):
        run.cluster.start()
        run.start()
        run.finish()
        found = run.outcome()
    seconds = time.monotonic() - began
    checks = {
        "finished": check.finished(control, found, run.exit_code),
        "identical": check.identical(control, found, told=fault.told),
        "mlflow": check.tracked(control, found),
        "resources": run.held(),
        "orphans": run.left(),
    }
    if fault is CONTROL and verdict(checks) != FAILED:
        (work / "control.json").write_text(found.to_json())
    status = verdict(checks, why)
    counts = {"runs": run.runs, "repeated": found.repeated, "seconds": round(seconds, 1)}
    return Row(fault.name, seed, status, moment, checks, why, **counts)


def main() -> None:
    """Runs a row: `python -m faults.row WORK FAULT SEED PATIENCE`."""
    work, name, seed, patience = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
    adopt()
    fault = FAULTS.get(name, CONTROL)
    try:
        row = run_row(fault, seed, work, float(patience))
    finally:
        end_all()
        shutil.move(own_ray(work), place(work, name, seed) / "ray")
    (place(work, name, seed) / "row.json").write_text(json.dumps(asdict(row)))


if __name__ == "__main__":
    main()
