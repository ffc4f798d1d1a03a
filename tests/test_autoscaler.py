"""A sweep that asks for more than the head has: nodes come, are used, and go when they are idle.

Ray's fake multi-node provider starts the nodes as processes of this machine. The head offers no
CPU, as that of `cluster.yaml`, so whatever a stage does is done on nodes that were brought for it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from faults.cluster import free_port
from test_study import SWEEP, descendants, kill_all

from kdscale.core.nodes import GROWS_TO, NodeType, announced
from kdscale.core.stage_log import LogReader
from kdscale.core.storage import StageStore, Storage

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parent.parent
NODE = NodeType(resources={"CPU": 3}, count=2)  # a stage takes 2.5
IDLE_MINUTES = 0.1
COMMANDS = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray",
            "worker_start_ray")  # fmt: skip


@dataclass(frozen=True)
class Cluster:
    """A head whose autoscaler may bring nodes."""

    address: str
    environment: dict[str, str]

    def nodes(self) -> set[str]:
        """Returns the ids of the nodes that are there beside the head."""
        import ray
        from ray.core.generated import gcs_pb2

        books: Any = gcs_pb2
        client: Any = ray._raylet.GcsClient(address=self.address)  # type: ignore[attr-defined]
        nodes = client.get_all_node_info(30).values()
        alive = [node for node in nodes if node.state == books.GcsNodeInfo.ALIVE]
        return {node.node_id.hex() for node in alive if not node.is_head_node}


def configuration(address: str) -> dict[str, Any]:
    """Returns what `ray up` would be given, for nodes that are processes."""
    worker = {"resources": NODE.resources, "node_config": {}, "min_workers": 0,
              "max_workers": NODE.count}  # fmt: skip
    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    return {
        "cluster_name": "fake",
        "max_workers": NODE.count,
        "idle_timeout_minutes": IDLE_MINUTES,
        "upscaling_speed": 1.0,
        "provider": {
            "type": "fake_multinode",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "gcs_address": address,
        },
        "auth": {},
        "available_node_types": {"ray.head.default": head, "worker": worker},
        "head_node_type": "ray.head.default",
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
    } | {f"{name}_commands": [] for name in COMMANDS}


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float) -> float:
    """Waits until something holds; gives the seconds that it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < timeout_s, f"waited in vain for {what}"
        time.sleep(0.25)
    return time.monotonic() - began


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    import ray.util
    from ray._private.authentication import authentication_token_setup as tokens

    tokens.enable_token_auth_by_default()  # as `ray.init` does where no cluster is
    tokens.ensure_token_if_auth_enabled()
    port, client_port = free_port(), free_port()
    address = f"{ray.util.get_node_ip_address()}:{port}"
    file, scratch = tmp_path / "cluster.json", tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    file.write_text(json.dumps(configuration(address)))
    environment = os.environ | {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "0",  # it does not know these nodes
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_raylet_start_wait_time_s": "600",  # the machine may be busy
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        GROWS_TO: announced([NODE]),
    }
    options = ["--num-cpus=0", f"--port={port}", f"--ray-client-server-port={client_port}"]
    options += ["--min-worker-port=0", "--max-worker-port=0", "--include-dashboard=false"]
    options += ["--object-store-memory=200000000", "--disable-usage-stats", f"--temp-dir={scratch}"]
    program = str(Path(sys.executable).with_name("ray"))
    command = [program, "start", "--head", "--block", f"--autoscaling-config={file}", *options]
    with (tmp_path / "head.log").open("w") as log:
        head = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )

    def has_started() -> bool:
        said = (tmp_path / "head.log").read_text()
        assert head.poll() is None, said
        return "Ray runtime started" in said

    try:
        wait_for(has_started, "Ray", 300)
        yield Cluster(address, environment)
    finally:
        below = descendants(head.pid)
        head.send_signal(signal.SIGTERM)
        time.sleep(2)
        kill_all([head.pid, *below])
        head.wait()
        shutil.rmtree(scratch, ignore_errors=True)


def said(stage: StageStore) -> str:
    """Returns all that a stage's processes have said."""
    return "\n".join(line for lines in LogReader(stage).new_lines().values() for line in lines)


def test_nodes_come_for_a_sweep_are_used_and_go(
    cluster: Cluster, tmp_path: Path, shards: str
) -> None:
    file, storage = tmp_path / "grows.py", Storage(str(tmp_path / "runs"))
    file.write_text(SWEEP)
    assert cluster.nodes() == set()
    driver = subprocess.Popen(
        [sys.executable, str(file), "--storage", storage.root, "--data", shards, "--seeds", "0,1"],
        env=cluster.environment | {"RAY_ADDRESS": cluster.address},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    seen: set[str] = set()

    def is_over() -> bool:
        seen.update(cluster.nodes())
        return driver.poll() is not None

    came_s = wait_for(lambda: is_over() or seen, "a node", 600)
    ran_s = came_s + wait_for(is_over, "the sweep's end", 900)
    output = driver.communicate()[0]
    assert driver.returncode == 0, output[-3000:]
    gone_s = wait_for(lambda: not cluster.nodes(), "the nodes to go", 300)
    print(f"{len(seen)} nodes: the first after {came_s:.0f} s, sweep over after {ran_s:.0f} s, "
          f"all gone {gone_s:.0f} s later")  # fmt: skip

    found = [StageStore(storage, "distill", key) for key in storage.names("stages", "distill")]
    assert len(found) == 2
    assert all(stage.is_done() for stage in found)
    used = {node for node in seen for stage in found if f"node {node}" in said(stage)}
    assert used
    assert len(seen) == NODE.count
    assert all("worker0 on" in said(stage) for stage in found)
