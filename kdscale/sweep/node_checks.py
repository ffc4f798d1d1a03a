"""What a machine must have: each check looks at one thing and says what to do where it lacks.

They run wherever they are called, on this machine or by a Ray task on another.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from kdscale.core.redaction import redacted
from kdscale.core.storage import Storage
from kdscale.core.types import StorageError

PACKAGES = (
    "kdscale",
    "ray",
    "torch",
    "torchvision",
    "transformers",
    "open_clip_torch",
    "timm",
    "peft",
    "mlflow",
    "pyarrow",
    "numpy",
)
MIN_DISK_GB = 20.0
MIN_SHARED_GB = 1.0
SHARED = Path("/dev/shm")
WAIT_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Check:
    """What was found of one thing.

    Attributes:
        ok: None where there was nothing to check.
        found: In a few words.
        advice: What to do, where it is not ok.
    """

    name: str
    ok: bool | None
    found: str
    advice: str = ""


@dataclass(frozen=True, kw_only=True)
class Node:
    """What a machine says of itself.

    Attributes:
        host: Its name.
        time: Its clock, when it answered.
        versions: {package: version}, python among them; "" where a package is not there.
        mark: Name of the file that it has left in the storage for others to read.
    """

    host: str
    time: float
    versions: Mapping[str, str]
    checks: tuple[Check, ...]
    mark: str = field(default="", compare=False)


def examine(storage: str, tracking_uri: str | None, *, wants_gpu: bool = False) -> Node:
    """Examines the machine that this runs on.

    Args:
        storage: Root of the stage store, as a run would be given it.
        tracking_uri: MLflow's, None where nothing is to be asked.
        wants_gpu: Whether Ray believes that there is a GPU.
    """
    mark = f"doctor-{uuid.uuid4().hex[:12]}"
    checks = [
        guarded("gpu", lambda: check_gpu(wants_gpu)),
        guarded("jpeg", check_jpeg),
        guarded("disk", check_disk),
        guarded("shared memory", check_shared_memory),
        guarded("storage", lambda: check_storage(storage, mark)),
        guarded("mlflow", lambda: check_mlflow(tracking_uri)),
    ]
    return Node(
        host=socket.gethostname(),
        time=time.time(),
        versions=versions(),
        checks=tuple(checks),
        mark=mark,
    )


def guarded(name: str, check: Callable[[], Check]) -> Check:
    """Runs a check; what it raises is what was found."""
    try:
        return check()
    except Exception as error:
        found = redacted(f"{type(error).__name__}: {error}")
        return Check(name=name, ok=False, found=found, advice="see the error")


def versions() -> dict[str, str]:
    """Returns the versions of what computes."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = ""
    return found


def check_gpu(wants_gpu: bool) -> Check:
    """Compares what Ray says with what torch sees."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not wants_gpu and not count:
        return Check(name="gpu", ok=None, found="none")
    if not count:
        advice = "install the driver, or start Ray there without --num-gpus"
        return Check(name="gpu", ok=False, found="Ray has one, torch none", advice=advice)
    names = sorted({torch.cuda.get_device_name(index) for index in range(count)})
    return Check(name="gpu", ok=True, found=f"{count} x {', '.join(names)}")


def check_jpeg() -> Check:
    """Encodes a picture and decodes it again with the stream's decoder."""
    import numpy as np
    import simplejpeg  # pyright: ignore[reportMissingTypeStubs]

    picture = np.full((16, 16, 3), 127, np.uint8)
    decoded = simplejpeg.decode_jpeg(simplejpeg.encode_jpeg(picture))
    ok = bool(np.abs(decoded.astype(int) - 127).max() < 4)
    advice = "" if ok else "install simplejpeg anew"
    return Check(name="jpeg", ok=ok, found="decodes" if ok else "wrong pixels", advice=advice)


def check_disk(folder: str | None = None, least_gb: float = MIN_DISK_GB) -> Check:
    """Looks at the room for temporary files and Ray's spilled objects."""
    places = {folder} if folder else {tempfile.gettempdir(), os.environ.get("RAY_TMPDIR", "")}
    room = {place: shutil.disk_usage(place).free / 1e9 for place in places if place}
    place = min(room, key=lambda place: room[place])
    free = room[place]
    ok = free >= least_gb
    advice = "" if ok else f"free {place}, or start Ray with TMPDIR and RAY_TMPDIR on a larger disk"
    return Check(name="disk", ok=ok, found=f"{free:,.0f} GB free", advice=advice)


def check_shared_memory(place: Path = SHARED, least_gb: float = MIN_SHARED_GB) -> Check:
    """Looks at the room for Ray's object store and for workers' batches."""
    if not place.is_dir():
        return Check(name="shared memory", ok=None, found=f"no {place}")
    free = shutil.disk_usage(place).free / 1e9
    ok = free >= least_gb
    advice = "" if ok else "start the container with a larger --shm-size (a third of its memory)"
    return Check(name="shared memory", ok=ok, found=f"{free:,.1f} GB free", advice=advice)


def check_storage(root: str, mark: str) -> Check:
    """Writes a file, reads it back, and sees whether one can be created only once."""
    storage, parts = Storage(root), ("doctor", mark)
    content = mark.encode()
    try:
        storage.write(content, *parts)
        same = storage.read(*parts) == content
        again = storage.create(content, *parts)
    except StorageError as error:
        advice = "give a --storage that every node can write"
        return Check(name="storage", ok=False, found=str(error), advice=advice)
    if again:
        advice = "it lets two writers create one file: use another object store or directory"
        return Check(name="storage", ok=False, found="creates twice", advice=advice)
    return Check(name="storage", ok=same, found="writes, reads" if same else "reads other bytes")


def check_mlflow(uri: str | None) -> Check:
    """Asks an MLflow server whether it is well; a file or database needs no server."""
    if uri is None or not uri.startswith(("http://", "https://")):
        return Check(name="mlflow", ok=None, found="no server")
    parts = urllib.parse.urlsplit(uri.rstrip("/"))
    server = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    try:
        with urllib.request.urlopen(f"{server}/health", timeout=WAIT_S) as answer:
            ok = answer.status == 200
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        advice = "start the server, or open its port to this node"
        return Check(name="mlflow", ok=False, found=str(reason), advice=advice)
    return Check(name="mlflow", ok=ok, found="answers")


def read_marks(root: str, marks: list[str]) -> list[str]:
    """Returns those of other nodes' files that this one cannot read."""
    storage = Storage(root)
    missing: list[str] = []
    for mark in marks:
        try:
            found = storage.read("doctor", mark)
        except StorageError:
            found = b""
        if found != mark.encode():
            missing.append(mark)
    return missing
