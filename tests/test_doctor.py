"""What `kdscale doctor` finds, on this machine and on nodes made up by hand."""

from __future__ import annotations

import http.server
import os
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kdscale.core.storage import Storage
from kdscale.core.types import StorageError
from kdscale.sweep.doctor import Diagnosis, compare_clocks, compare_versions, diagnose, pairs
from kdscale.sweep.node_checks import (
    Node,
    check_disk,
    check_jpeg,
    check_mlflow,
    check_shared_memory,
    check_storage,
    guarded,
    read_marks,
    versions,
)


def node(host: str, **changed: str) -> Node:
    """A node with the packages of this one but for some."""
    return Node(host=host, time=0.0, versions=versions() | changed, checks=())


def test_a_node_with_another_package_is_named() -> None:
    assert compare_versions([node("a"), node("b")]).ok
    found = compare_versions([node("a"), node("b", torch="2.9.0", timm="")])
    assert not found.ok
    assert f"b: torch 2.9.0, here {versions()['torch']}" in found.found
    assert "b: timm absent" in found.found
    assert "requirements.lock" in found.advice


def test_the_clock_that_is_furthest_off_counts() -> None:
    assert compare_clocks({"a": 0.0, "b": 1.2}).ok
    found = compare_clocks({"a": 0.0, "b": 90.0})
    assert (found.ok, found.found) == (False, "b is off by 90 s")


def test_gpus_are_asked_to_add_where_two_nodes_have_them() -> None:
    head, decode, one, two = (
        {"NodeID": name, "Resources": {"CPU": 4.0} | ({"GPU": 8.0} if name in "cd" else {})}
        for name in "abcd"
    )
    assert pairs([head]) == {"gloo": [head, head]}
    assert pairs([head, decode, one]) == {"gloo": [head, decode]}
    assert pairs([head, one, decode, two]) == {"gloo": [head, one], "nccl": [one, two]}


def test_room_is_compared_with_what_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check_disk(str(tmp_path), least_gb=0.0).ok
    assert "RAY_TMPDIR" in check_disk(str(tmp_path), least_gb=1e9).advice
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "absent"))
    assert "absent" in guarded("disk", check_disk).found
    monkeypatch.setenv("RAY_TMPDIR", "/proc")  # where there is never room
    assert "free /proc" in check_disk().advice
    assert "--shm-size" in check_shared_memory(tmp_path, least_gb=1e9).advice
    assert check_shared_memory(tmp_path / "absent").ok is None


def test_storage_is_written_and_read(tmp_path: Path) -> None:
    assert check_storage(str(tmp_path), "doctor-1").ok
    assert read_marks(str(tmp_path), ["doctor-1"]) == []
    assert read_marks(str(tmp_path), ["doctor-1", "doctor-2"]) == ["doctor-2"]
    file = tmp_path / "file"
    file.write_text("")
    found = check_storage(str(file), "doctor-1")
    assert not found.ok
    assert "--storage" in found.advice


def test_an_object_store_without_credentials_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    storage = Storage("s3://somebodys/runs")
    for ask in (storage.names, storage.exists, partial(storage.remove, "doctor")):
        with pytest.raises(
            StorageError, match=r"cannot reach s3://somebodys/runs: .*; give them as"
        ):
            ask()
    found = check_storage(storage.root, "doctor-1")
    assert not found.ok
    assert "credentials" in found.found


def test_a_check_that_raises_is_a_finding() -> None:
    def broken() -> Any:
        raise OSError("no such device")

    found = guarded("gpu", broken)
    assert (found.ok, found.found) == (False, "OSError: no such device")


def test_the_decoder_decodes() -> None:
    assert check_jpeg().ok


class _Health(http.server.BaseHTTPRequestHandler):
    """An MLflow server's answer to `/health`."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


def test_a_server_answers_or_is_named_as_absent() -> None:
    assert check_mlflow(None).ok is check_mlflow("sqlite:///x.db").ok is None
    with http.server.HTTPServer(("127.0.0.1", 0), _Health) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{server.server_port}"
        assert check_mlflow(uri).ok
        server.shutdown()
    found = check_mlflow(uri)
    assert not found.ok
    assert "refused" in found.found


@pytest.mark.ray
def test_a_cluster_of_one_node_is_well(ray_cluster: Any, tmp_path: Path) -> None:
    found = diagnose(str(tmp_path / "runs"), None)
    assert isinstance(found, Diagnosis)
    assert len(found.nodes) == 1
    wrong = [check for check in (*found.across, *found.nodes[0].checks) if check.ok is False]
    assert [check for check in wrong if check.name not in ("disk", "shared memory")] == []
    assert {check.name for check in found.across} == {"versions", "clocks", "all-reduce by gloo"}
    assert not Storage(str(tmp_path / "runs")).exists("doctor")
    assert found.document()["nodes"][0]["versions"]["ray"] == versions()["ray"]
