"""A Ray cluster of a row's own: one node, or a head and a node that a wire connects.

The nodes of two have each their own network, process table and mounts, as machines have; storage
is the same directory. Their namespaces hang on one process each: nothing is left of them when it
ends. Only root may make them.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from faults.processes import Process, below, beside, command_of, kill, wait_for

CPUS = 4
STORE_BYTES = 256 << 20
OWN = ["unshare", "--net", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]
HEAD, NODE = "10.213.1", "10.213.2"  # networks of the head's and the node's side of the wire
READY = """
import sys, time, ray
ray.init(log_to_driver=False, logging_level="error")
for _ in range(100):
    if ray.cluster_resources().get("CPU", 0) > 0:
        sys.exit()
    time.sleep(0.2)
sys.exit(1)
"""


class Machine:
    """Where processes run: this machine, or namespaces of their own.

    Args:
        folder: For temporary files; its path must be short enough for Ray's sockets.
        apart: Whether it has namespaces of its own.
    """

    def __init__(self, folder: Path, apart: bool) -> None:
        self.folder, self.host, self._inside = folder, _own_address(), 0
        folder.mkdir(parents=True, exist_ok=True)
        if apart:
            # Stopped by a signal only; children whose parents end become its own.
            holder = subprocess.Popen([*OWN, "sleep", "infinity"], start_new_session=True)
            self._inside = wait_for(lambda: _child(holder.pid), "namespaces", 60).pid

    def command(self, *words: str) -> list[str]:
        """Returns how to run something here."""
        if not self._inside:
            return list(words)
        own = ["nsenter", "--target", str(self._inside), "--net", "--pid", "--mount"]
        return [*own, "--", *words]

    def run(self, *words: str) -> None:
        """Runs a command here to its end."""
        subprocess.run(self.command(*words), check=True, capture_output=True, text=True)

    def processes(self) -> list[Process]:
        """Returns what runs here, but for what holds the namespaces."""
        return beside(self._inside) if self._inside else below(os.getpid())

    @property
    def network(self) -> str:
        """Names its network for `ip`."""
        return str(self._inside)


class Node:
    """A raylet and all that comes with it; a head has the cluster's books as well.

    Args:
        machine: Where it runs.
        env: Its environment.
        num_cpus: What it offers.
        head: The head's address, None to be the head.
    """

    def __init__(
        self, machine: Machine, env: Mapping[str, str], num_cpus: int, head: str | None
    ) -> None:
        self.machine, self.address = machine, head or f"{machine.host}:{free_port()}"
        own = ["--address", self.address]
        if head is None:
            port = self.address.rpartition(":")[2]
            own = ["--head", "--port", port, "--ray-client-server-port", str(free_port())]
            own += ["--include-dashboard", "false"]
        own += ["--dashboard-agent-listen-port", str(free_port())]
        ray = [str(Path(sys.executable).with_name("ray")), "start", "--block", *own]
        ray += ["--node-ip-address", machine.host, "--num-cpus", str(num_cpus)]
        ray += ["--temp-dir", str(machine.folder / "r"), "--disable-usage-stats"]
        ray += ["--object-store-memory", str(STORE_BYTES)]
        ray += ["--min-worker-port", "0", "--max-worker-port", "0"]  # others may have a cluster
        log = (machine.folder / f"{'head' if head is None else 'node'}.log").open("ab")
        own_env = {**env, "TMPDIR": str(machine.folder)}
        self._process = subprocess.Popen(
            machine.command(*ray), env=own_env, stdout=log, stderr=log, start_new_session=True
        )

    def processes(self) -> list[Process]:
        """Returns the node's own processes, its workers among them."""
        own = Process(self._process.pid, command_of(self._process.pid))
        return [own, *below(own.pid)] if self.is_up() else []

    def raylet(self) -> Process | None:
        """Returns its raylet."""
        found = [p for p in self.processes() if "/raylet/raylet " in p.command]
        return found[0] if found else None

    def id(self) -> str:
        """Returns what Ray calls the node."""
        raylet = self.raylet()
        found = re.search(r"--node[-_]id[= ]([0-9a-f]+)", raylet.command if raylet else "")
        assert found is not None, "a raylet names its node"
        return found[1]

    def is_up(self) -> bool:
        """Tells whether its processes have not been told to end, and have not ended."""
        return self._process.poll() is None

    def stop(self, timeout_s: float) -> None:
        """Asks it to end, as `ray stop` does, and waits."""
        asked = [p for p in self.processes() if " start --block" in p.command]
        kill([p for p in asked if not p.command.startswith("nsenter")], signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)


class Cluster:
    """The cluster of a row.

    Args:
        folder: For its temporary files.
        apart: Two machines and a wire rather than one node on this machine.
        env: Environment of its nodes.
        patience: What time limits are multiplied by, on a busy machine.
    """

    def __init__(
        self, folder: Path, apart: bool, env: Mapping[str, str], patience: float = 1.0
    ) -> None:
        self.env, self.patience = dict(env), patience
        self.machines = [Machine(folder / name, apart) for name in ("a", "b")[: 1 + apart]]
        self._wire: Machine | None = None
        if apart:
            self._wire = Machine(folder / "w", apart)
            for machine, network in zip(self.machines, (HEAD, NODE), strict=True):
                _plug(machine, self._wire, network)
            self._let_through(True)
        self.nodes: list[Node] = []

    @property
    def address(self) -> str:
        """The head's."""
        return self.nodes[0].address

    def start(self) -> None:
        """Starts what is not running, and waits until the head answers and somebody can work."""
        wait_for(self._is_ready, "a cluster that can work", 120 * self.patience, every_s=0.5)

    def _is_ready(self) -> bool:
        """Starts what is not running, or has missed Ray's own limits of start-up; asks the head."""
        if not self.nodes or not self.nodes[0].is_up():
            for node in self.nodes:
                node.stop(30 * self.patience)
            cpus = 0 if len(self.machines) > 1 else CPUS
            self.nodes = [Node(self.machines[0], self.env, cpus, None)]
        self.heal()
        command = self.machines[0].command(sys.executable, "-c", READY)
        env = self.env | {"RAY_ADDRESS": self.address}
        return subprocess.run(command, env=env, capture_output=True).returncode == 0

    def heal(self) -> None:
        """Starts a node in place of one that is lost; a head is not replaced below a driver."""
        lost = len(self.nodes) < len(self.machines) or not self.nodes[-1].is_up()
        if len(self.machines) > 1 and lost and self.nodes[0].is_up():
            self.add()

    def add(self) -> None:
        """Starts one more node that works."""
        self.nodes.append(Node(self.machines[1], self.env, CPUS, self.address))

    def cut(self) -> None:
        """Loses whatever is sent between the two machines, silently."""
        self._let_through(False)

    def mend(self) -> None:
        """Ends what `cut` has begun."""
        self._let_through(True)

    def _let_through(self, yes: bool) -> None:
        assert self._wire is not None
        self._wire.run("sh", "-c", f"echo {int(yes)} > /proc/sys/net/ipv4/ip_forward")

    def stop(self) -> None:
        """Ends the nodes in order; what is left then was nobody's."""
        for node in reversed(self.nodes):
            node.stop(60 * self.patience)

    def left(self) -> list[Process]:
        """Returns the processes on its machines."""
        return [process for machine in self.machines for process in machine.processes()]


def _child(pid: int) -> Process | None:
    """Returns a process's only child, the first of new namespaces, when it has begun."""
    found = [p for p in below(pid) if p.command.startswith("sleep")]
    return found[0] if found else None


def _plug(machine: Machine, wire: Machine, network: str) -> None:
    """Connects a machine with the wire, through which it reaches all others."""
    name = f"e{network.rpartition('.')[2]}"
    # In the wire's network alone: another process table would not know the machine's number.
    inside = ["nsenter", "--target", wire.network, "--net", "ip", "link", "add", name]
    ends = ["type", "veth", "peer", "name", "eth0", "netns", machine.network]
    subprocess.run([*inside, *ends], check=True, capture_output=True)
    for where, side, number in ((wire, name, 1), (machine, "eth0", 2)):
        where.run("ip", "link", "set", "lo", "up")
        where.run("ip", "address", "add", f"{network}.{number}/24", "dev", side)
        where.run("ip", "link", "set", side, "up")
    machine.run("ip", "route", "add", "default", "via", f"{network}.1")
    machine.host = f"{network}.2"


def free_port() -> int:
    """Returns a port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _own_address() -> str:
    """Returns the address that Ray gives this machine: the one that it would send from."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        probe.connect(("8.8.8.8", 80))  # nothing is sent
        return probe.getsockname()[0]
    return "127.0.0.1"
