"""Fixtures that several test files share."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import simplejpeg
from hypothesis import settings

# The same examples in every run: a failure is then a change's, and can be had again.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

Part = tuple[str, bytes]


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Any]:
    """One Ray instance for all tests marked `ray`."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Workers inherit the environment, not this process's import path.
    here = [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, here))
    import ray

    ray.init(
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=512 << 20,
    )
    yield ray
    ray.shutdown()


def jpeg(seed: int, height: int = 40, width: int = 48) -> bytes:
    """Draws a smooth random picture and compresses it."""
    coarse = np.random.default_rng(seed).integers(0, 255, (5, 6, 3), np.uint8)
    tiles = coarse.repeat(-(-height // 5), 0).repeat(-(-width // 6), 1)
    return simplejpeg.encode_jpeg(np.ascontiguousarray(tiles[:height, :width]), 90)


def pair(key: str, seed: int, caption: bytes | None = None) -> list[Part]:
    """Makes the three members of one sample."""
    text = f"picture number {seed}".encode() if caption is None else caption
    meta = json.dumps({"label": seed % 10}).encode()
    return [(f"{key}.jpg", jpeg(seed)), (f"{key}.txt", text), (f"{key}.json", meta)]


@pytest.fixture(scope="session")
def write_tar() -> Callable[[Path, list[Part]], Path]:
    """Gives a function that writes named contents as a tar."""

    def write(path: Path, parts: list[Part]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for name, data in parts:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return path

    return write


@pytest.fixture(scope="session")
def shards(
    tmp_path_factory: pytest.TempPathFactory, write_tar: Callable[[Path, list[Part]], Path]
) -> str:
    """Writes four healthy shards of uneven size and gives their pattern."""
    folder = tmp_path_factory.mktemp("shards")
    for number, size in enumerate((13, 9, 17, 11)):
        parts = [p for i in range(size) for p in pair(f"{number}{i:04d}", 100 * number + i)]
        write_tar(folder / f"{number:05d}.tar", parts)
    return f"{folder}/{{00000..00003}}.tar"


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Serves a folder as s3://bucket to this process and those that it starts."""
    root = tmp_path_factory.mktemp("s3")
    (root / "bucket").mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = Path(sys.executable).with_name("rclone")
    options = ["--addr", f"127.0.0.1:{port}", "--auth-key", "kdkey,kdsecret", "--config", ""]
    server = subprocess.Popen(
        [str(program), "serve", "s3", *options, str(root)], stderr=subprocess.DEVNULL
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "kdkey")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "kdsecret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        fsspec.filesystem("s3").clear_instance_cache()
        _wait_for(port)
        yield root / "bucket"
    server.terminate()
    server.wait()
    fsspec.filesystem("s3").clear_instance_cache()


def _wait_for(port: int) -> None:
    for _ in range(200):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError("rclone did not start")
