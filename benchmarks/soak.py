"""Whether memory stays flat: 200,000 samples streamed to two training workers.

python benchmarks/soak.py [--samples 200000]
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from _common import make_shards, table

STORE_BYTES = 512 << 20
PX = 64
FIRST_STEP = 16  # the object store has filled by then


class Monitor(threading.Thread):
    """Notes once a second what the object store and all of Ray's processes hold.

    Args:
        marker: File that appears with the first batch; before, processes are still starting.
    """

    def __init__(self, marker: Path) -> None:
        super().__init__(daemon=True)
        self.marker = marker
        self.store: list[int] = []
        self.anonymous: list[int] = []
        self.spilled = 0
        self.stop = threading.Event()

    def run(self) -> None:
        while not self.stop.wait(1.0):
            used, self.spilled = store_use()
            if not self.marker.exists():
                continue
            self.store.append(used)
            self.anonymous.append(anonymous_memory())


def store_use() -> tuple[int, int]:
    """Returns the shared memory in use, nearly all of it the object store's, and bytes spilled."""
    shared = 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("Shmem:"):
            shared = int(line.split()[1]) * 1024
    spill = Path("/tmp/ray/session_latest").glob("ray_spilled_objects*/*")
    return shared, sum(file.stat().st_size for file in spill if file.is_file())


def anonymous_memory() -> int:
    """Adds the unshared memory of Ray's workers, in bytes."""
    total = 0
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            if b"ray::" not in (status.parent / "cmdline").read_bytes():
                continue
            for line in status.read_text().splitlines():
                if line.startswith("RssAnon"):
                    total += int(line.split()[1]) * 1024
        except OSError:
            continue
    return total


def consume(options: dict[str, Any]) -> None:
    """Touches every batch; runs on each training worker."""
    import ray.train

    from kdscale.data.stream import TrainStream

    rank = ray.train.get_context().get_world_rank()
    for batch in TrainStream(ray.train.get_dataset_shard("train"), options["config"], rank):
        batch.images[PX].clone()
        if batch.step == FIRST_STEP:
            Path(options["marker"]).touch()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=200_000)
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/kdscale-bench"))
    options = parser.parse_args()

    import ray
    import ray.train.torch

    from kdscale.core.config import DataSpec
    from kdscale.core.storage import Storage
    from kdscale.data.stream import StreamConfig, data_config, train_dataset
    from kdscale.stages.inputs import find_source
    from kdscale.sweep.schedule import QUIET, local_cpus

    pattern = make_shards(options.scratch, 16, 512, px=PX)
    with tempfile.TemporaryDirectory() as root:
        source = find_source(DataSpec(name="soak", urls=pattern), Storage(root))
        marker = Path(root, "begun")
        epochs = -(-options.samples // source.num_samples)
        config = StreamConfig(source.manifest(), 256, (PX,), epochs=epochs, num_workers=2)
        ray.init(
            num_cpus=local_cpus(),
            object_store_memory=STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            runtime_env={"env_vars": QUIET},
        )
        monitor = Monitor(marker)
        monitor.start()
        began = time.perf_counter()
        ray.train.torch.TorchTrainer(
            consume,
            train_loop_config={"config": config, "marker": str(marker)},
            scaling_config=ray.train.ScalingConfig(
                num_workers=2, resources_per_worker={"CPU": 0.5}
            ),
            datasets={"train": lambda: train_dataset(config)},
            dataset_config=data_config(object_store_bytes=STORE_BYTES // 2),
            run_config=ray.train.RunConfig(storage_path=root),
        ).fit()
        elapsed = time.perf_counter() - began
        monitor.stop.set()
    rows: list[tuple[str, ...]] = []
    for name, values in (("shared memory", monitor.store), ("RssAnon", monitor.anonymous)):
        quarters = np.array_split(np.array(values, float) / 2**20, 4)
        peaks = [f"{quarter.max():,.0f}" for quarter in quarters]
        means = [quarter.mean() for quarter in quarters]
        rows.append((name, *peaks, f"{means[3] / means[1] - 1:+.1%}"))
    header = ("MiB, peak of a quarter", "1st", "2nd", "3rd", "4th", "mean of 4th against 2nd")
    total = config.order.num_steps * config.global_batch_size
    title = (
        f"Soak: {total:,} samples in {elapsed:.0f} s to two workers, object store budget "
        f"{STORE_BYTES >> 20} MiB, spilled {monitor.spilled:,} bytes"
    )
    print(table(title, header, rows))


if __name__ == "__main__":
    main()
