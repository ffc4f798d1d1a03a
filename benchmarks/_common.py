"""What the benchmarks share: photograph-like shards, the machine's name, a table."""

from __future__ import annotations

import io
import json
import os
import platform
import subprocess
import tarfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import simplejpeg

if TYPE_CHECKING:
    import torch

WORDS = (Path(__file__).parent / "words.txt").read_text().split()


def photograph(seed: int, px: int) -> bytes:
    """Draws coloured noise with the 1/f spectrum of photographs: about 29 kB at 256 px, q90."""
    random = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(px)[:, None], np.fft.rfftfreq(px)[None, :])
    weights = 1 / np.maximum(frequency, 1 / px) ** 1.45
    layers = [
        np.fft.irfft2(np.fft.rfft2(random.standard_normal((px, px))) * weights, s=(px, px))
        for _ in range(3)
    ]
    grey = layers[0] / layers[0].std()
    colours = [grey + 0.3 * layer / layer.std() for layer in layers]
    image = np.clip(128 + 48 * np.stack(colours, axis=-1), 0, 255).astype(np.uint8)
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=90)


def caption(seed: int) -> str:
    """Draws a caption as long as CC12M's are on average, some 20 words."""
    random = np.random.default_rng(seed)
    return " ".join(random.choice(WORDS, random.integers(8, 32)))


def write_shard(path: str, first: int, samples: int, px: int) -> None:
    """Writes one CC12M-style shard."""
    with tarfile.open(path, "w") as tar:
        for number in range(first, first + samples):
            parts = {
                "jpg": photograph(number, px),
                "txt": caption(number).encode(),
                "json": json.dumps({"label": number % 10}).encode(),
            }
            for suffix, data in parts.items():
                info = tarfile.TarInfo(f"{number:09d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def make_shards(folder: Path, shards: int, samples: int, px: int = 256) -> str:
    """Writes shards unless they are there, and returns their pattern."""
    folder = folder / f"{shards}x{samples}-{px}px"
    marker = folder / "written"
    if not marker.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor() as pool:
            jobs = [
                pool.submit(write_shard, str(folder / f"{i:05d}.tar"), i * samples, samples, px)
                for i in range(shards)
            ]
            for job in jobs:
                job.result()
        marker.touch()
    return f"{folder}/*.tar"


def machine() -> str:
    """Names the processor and the number of cores."""
    name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    return f"{os.cpu_count()} x {name}"


def gpu_name(device: torch.device) -> str:
    """Names a GPU with its driver, as the end of a title; nothing for a CPU."""
    import torch

    if device.type != "cuda":
        return ""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    return f", {torch.cuda.get_device_name(device)}, driver {driver}, torch {torch.__version__}"


def settle(device: torch.device) -> None:
    """Waits until a device has done what it was told, so that a clock can be read."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Formats a Markdown table below a title that names the machine."""
    lines = [f"### {title}", "", machine(), "", "| " + " | ".join(header) + " |"]
    lines.append("|" + "---|" * len(header))
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"
