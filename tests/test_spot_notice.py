"""A spot node's notice: waited for, read, and handed to Ray."""

from __future__ import annotations

import http.server
import json
import subprocess
import threading
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from kdscale.sweep import spot_notice
from kdscale.sweep.spot_notice import drain_this_node, wait_for_notice


class _Metadata(http.server.BaseHTTPRequestHandler):
    """What a spot instance of EC2 is told at its third question, after moments of trouble."""

    asked, troubles = 0, 2

    def do_PUT(self) -> None:
        type(self).troubles -= 1
        if self.troubles == 0:
            self.wfile.write(b"no HTTP at all\r\n\r\n")
        else:
            self._answer(200 if self.troubles < 0 else 503, "the token")

    def do_GET(self) -> None:
        assert self.path == "/latest/meta-data/spot/instance-action"
        assert self.headers["X-aws-ec2-metadata-token"] == "the token"
        type(self).asked += 1
        when = datetime.now(UTC) + timedelta(seconds=118)
        notice = {"action": "terminate", "time": f"{when:%Y-%m-%dT%H:%M:%SZ}"}
        self._answer(200 if self.asked > 2 else 404, json.dumps(notice))

    def _answer(self, code: int, text: str) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


def test_a_spot_notice_is_waited_for() -> None:
    said: list[str] = []
    with http.server.HTTPServer(("127.0.0.1", 0), _Metadata) as server:
        url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        left = wait_for_notice(url, 0.05, said.append)
        server.shutdown()
    assert left is not None
    assert 100 < left <= 118
    assert len(said) == 1
    assert "503" in said[0]


@pytest.mark.parametrize(
    ("when", "left"),
    [
        (f"{datetime.now(UTC) + timedelta(hours=1):%Y-%m-%dT%H:%M:%SZ}", 3600),
        (f"{datetime.now(UTC) + timedelta(hours=1):%Y-%m-%dT%H:%M:%S}", 3600),
        ("soon", None),
        (None, None),
    ],
)
def test_a_time_is_read_in_any_form(when: str | None, left: float | None) -> None:
    found = spot_notice._seconds_left(json.dumps({"action": "stop", "time": when}))
    assert found == (None if left is None else pytest.approx(left, abs=600))


def test_a_drain_is_tried_again_until_it_is_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[list[str]] = []
    refusals = [2]

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        if "drain-node" not in command:
            return subprocess.CompletedProcess(command, 0, "some words\nthe-node\n")
        said.append(command)
        refusals[0] -= 1
        if refusals[0] == 0:
            raise subprocess.TimeoutExpired(command, 1)
        if refusals[0] > 0:
            raise subprocess.CalledProcessError(1, command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(spot_notice, "AGAIN_S", 0.01)
    monkeypatch.setattr(spot_notice.subprocess, "run", run)
    drain_this_node(100)
    assert len(said) == 3
    assert said[-1][2:4] == ["--node-id", "the-node"]
    assert 80 < int(said[-1][-1]) <= 90
    refusals[0] = 99
    with pytest.raises(subprocess.CalledProcessError):
        drain_this_node(10)
    assert len(said) == 4
