"""A spot node's notice: what the cloud announces beforehand is handed to Ray.

EC2 says two minutes before it takes a spot instance away, and says so to the instance alone
(https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html). Ray
does not ask. Drained, a node gets nothing new, and the stages on it write a checkpoint and go on
elsewhere.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

METADATA = "http://169.254.169.254"  # of EC2, from within an instance
TOKEN_S = 21_600
ANSWER_S = 2.0
MARGIN_S = 10.0
AGAIN_S = 5.0
RAY_ANSWERS_S = 30.0
OWN_ID = "import ray; ray.init(log_to_driver=False); print(ray.get_runtime_context().get_node_id())"


def wait_for_notice(
    metadata: str, every_s: float, say: Callable[[str], None] = print
) -> float | None:
    """Waits until this instance is to be taken away.

    Args:
        metadata: Root of the instance's own metadata service.
        every_s: How often it is asked; one that does not answer is asked again.
        say: Is told, once, that it does not answer.

    Returns:
        Seconds that are left, None where the notice names no time.
    """
    silent = False
    while True:
        try:
            found = _notice(metadata)
        except (URLError, HTTPException, TimeoutError, ConnectionError, UnicodeError) as error:
            if not silent:
                say(f"{metadata} does not answer ({error}): is this an instance of EC2?")
            silent, found = True, None
        if found is not None:
            return _seconds_left(found)
        time.sleep(every_s)


def _notice(metadata: str) -> str | None:
    """Asks once; None where there is no notice."""
    asked = Request(
        f"{metadata}/latest/api/token",
        method="PUT",
        headers={"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_S)},
    )
    with urlopen(asked, timeout=ANSWER_S) as answer:
        token = answer.read().decode()
    address = f"{metadata}/latest/meta-data/spot/instance-action"
    asked = Request(address, headers={"X-aws-ec2-metadata-token": token})
    try:
        with urlopen(asked, timeout=ANSWER_S) as answer:
            return answer.read().decode()
    except HTTPError as error:
        if error.code == 404:
            return None
        raise


def _seconds_left(notice: str) -> float | None:
    """Reads when it will be: `{"action": "terminate", "time": "2026-01-02T03:04:05Z"}`."""
    try:
        when = datetime.fromisoformat(json.loads(notice)["time"])
    except (ValueError, KeyError, TypeError):
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    return (when - datetime.now(UTC)).total_seconds()


def drain_this_node(seconds: float) -> None:
    """Tells Ray that this node goes away, again and again while Ray does not hear it.

    Args:
        seconds: How long it will still be there.

    Raises:
        CalledProcessError, TimeoutExpired: If until then Ray refuses, or does not answer.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            return _drain(deadline - time.monotonic())
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
            if time.monotonic() + AGAIN_S > deadline - MARGIN_S:
                raise
        time.sleep(AGAIN_S)


def _drain(seconds: float) -> None:
    """Tells Ray once."""
    patience: dict[str, Any] = {"check": True, "timeout": min(RAY_ANSWERS_S, max(1.0, seconds))}
    asked = [sys.executable, "-c", OWN_ID]
    own = subprocess.run(asked, capture_output=True, text=True, **patience)
    program = str(Path(sys.executable).with_name("ray"))
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot notice"]
    left = ["--deadline-remaining-seconds", str(max(1, int(seconds - MARGIN_S)))]
    node = ["--node-id", own.stdout.split()[-1]]
    subprocess.run([program, "drain-node", *node, *reason, *left], **patience)
