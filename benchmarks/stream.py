"""How fast samples reach a training worker: kdscale against open_clip's loader and bare decoding.

All three read the same tars and give the same 224 px crops on the same cores:

- `open_clip`: `get_wds_dataset` of the installed package, its own transform and tokenizer, two
  loader processes; webdataset 0.2.86 in an environment of its own, since newer ones break it.
- `bare`: kdscale's reading, decoding and cropping in one process per core, nothing else.
- `kdscale`: the stream in a Ray Train worker that touches each batch, order contract and
  tokenising on; start-up is reported apart.

    python benchmarks/stream.py [--data PATTERN] [--scratch DIR]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from _common import make_shards, table

BATCH = 256
PX = 224
OPEN_CLIP = """
import sys, time, types, json
sys.path.insert(0, sys.argv[1])
import torch, open_clip
from open_clip_train.data import get_wds_dataset
from open_clip.transform import image_transform_v2, PreprocessCfg, AugmentationCfg
torch.set_num_threads(1)
args = types.SimpleNamespace(
    train_data=sys.argv[2], train_num_samples=int(sys.argv[3]), dataset_resampled=False, seed=0,
    train_data_upsampling_factors=None, batch_size=256, workers=2, world_size=1,
)
transform = image_transform_v2(PreprocessCfg(size=224), is_train=True)
info = get_wds_dataset(args, transform, True, tokenizer=open_clip.get_tokenizer("ViT-B-16"))
began = time.perf_counter(); first = None; seen = 0
for epoch in range(int(sys.argv[4])):
    info.set_epoch(epoch)
    for images, texts in info.dataloader:
        if first is None:
            touched = torch.empty_like(images)
        touched[: len(images)].copy_(images)
        now = time.perf_counter()
        if first is None:
            first = now - began; skip = 8
        if skip:
            skip -= 1; steady = now; continue
        seen += len(images)
print(json.dumps({"first_s": first, "rate": seen / (now - steady)}))
"""


def open_clip_loader(pattern: str, samples: int, epochs: int, scratch: Path) -> dict[str, float]:
    """Measures open_clip's loader in a process whose webdataset is 0.2.86."""
    overlay = scratch / "webdataset"
    if not overlay.exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
        subprocess.run(
            [*command, str(overlay), "webdataset==0.2.86", "braceexpand==0.1.7"], check=True
        )
    folder = Path(pattern).parent
    last = len(list(folder.glob("*.tar"))) - 1
    braces = f"{folder}/{{00000..{last:05d}}}.tar"
    script = [sys.executable, "-c", OPEN_CLIP, str(overlay), braces, str(samples), str(epochs)]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def bare(pattern: str, processes: int) -> float:
    """Measures reading, decoding and cropping in processes of their own: samples/s."""
    from kdscale.data.shards import expand

    paths = expand(pattern)
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(processes + 1), context.Queue()
    workers = [
        context.Process(target=_bare, args=(paths[rank::processes], barrier, results))
        for rank in range(processes)
    ]
    for worker in workers:
        worker.start()
    barrier.wait()
    began = time.perf_counter()
    counts = [results.get() for _ in workers]
    elapsed = time.perf_counter() - began
    for worker in workers:
        worker.join()
    return sum(counts) / elapsed


def _bare(paths: list[str], barrier: Any, results: Any) -> None:
    import cv2
    import fsspec

    from kdscale.data.samples import Crop, render
    from kdscale.data.shards import read_tar

    cv2.setNumThreads(1)
    fs, crop, count = fsspec.filesystem("file"), Crop(), 0
    barrier.wait()
    for path in paths:
        for sample in read_tar(path, fs):
            render(sample.jpg or b"", sample.key, 0, crop, (PX,))
            count += 1
    results.put(count)


def kdscale_stream(pattern: str, epochs: int, storage: Path) -> list[dict[str, float]]:
    """Measures the stream in a Train worker: its processes to be started (cold), then again."""
    import ray.train.torch

    from kdscale.core.config import DataSpec
    from kdscale.core.storage import Storage
    from kdscale.data.stream import StreamConfig, data_config, train_dataset
    from kdscale.stages.inputs import find_source
    from kdscale.sweep.schedule import start_ray

    source = find_source(DataSpec(name="bench", urls=pattern), Storage(str(storage)))
    config = StreamConfig(
        source.manifest(),
        BATCH,
        (PX,),
        epochs=epochs,
        tokenizers={"t": _tokenizer},
        cpus_per_task=0.5,
    )
    start_ray()
    trainer = ray.train.torch.TorchTrainer(
        _consume,
        train_loop_config={"config": config, "out": str(storage / "measured.json")},
        scaling_config=ray.train.ScalingConfig(num_workers=1, resources_per_worker={"CPU": 0.5}),
        datasets={"train": partial(train_dataset, config)},
        dataset_config=data_config(num_cpus=(os.cpu_count() or 1) + 0.75),
        run_config=ray.train.RunConfig(storage_path=str(storage / "train")),
    )
    trainer.fit()
    return json.loads((storage / "measured.json").read_text())


def _tokenizer() -> Any:
    from kdscale.models.preprocess import TowerTokenizer

    return TowerTokenizer(kind="bpe", source=None, context_length=77).ids


def _consume(options: dict[str, Any]) -> None:
    import ray.train
    import torch

    from kdscale.data.stream import TrainStream

    found: list[dict[str, float]] = []
    touched = torch.empty(BATCH, PX, PX, 3, dtype=torch.uint8)
    shard = ray.train.get_dataset_shard("train")
    for _ in ("cold", "warm"):
        stream = TrainStream(shard, options["config"], 0)
        began = time.perf_counter()
        first, seen, steady, skip = 0.0, 0, 0.0, 12
        for batch in stream:
            touched.copy_(batch.images[PX])
            now = time.perf_counter()
            first = first or now - began
            if skip:
                skip, steady = skip - 1, now
                continue
            seen += len(batch.rows)
        found.append({"first_s": first, "rate": seen / (time.perf_counter() - steady)})
    Path(options["out"]).write_text(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="tars named 00000.tar and so on; drawn where absent")
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/kdscale-bench"))
    parser.add_argument("--samples", type=int, default=8192)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--only", choices=("bare", "open_clip", "kdscale"))
    options = parser.parse_args()
    cores = os.cpu_count() or 1
    pattern = options.data or make_shards(options.scratch, 8, options.samples // 8)
    rows: list[tuple[str, str, str, str]] = []
    rate, theirs = 0.0, 0.0
    if options.only in (None, "bare"):
        rate = max(bare(pattern, cores) for _ in range(3))
        rows.append((f"bare, {cores} processes", f"{rate:,.0f}", "", ""))
    if options.only in (None, "open_clip"):
        found = open_clip_loader(pattern, options.samples, options.epochs, options.scratch)
        theirs = found["rate"]
        rows.append(
            ("open_clip, 2 loader processes", f"{theirs:,.0f}", "", f"{found['first_s']:.1f}")
        )
    if options.only in (None, "kdscale"):
        for name, own in zip(
            ("cold", "warm"), kdscale_stream(pattern, options.epochs, options.scratch), strict=True
        ):
            ratios = f"{own['rate'] / theirs:.2f} x" if theirs else ""
            share = f"{own['rate'] / rate:.0%} of bare" if rate else ""
            rows.append(
                (
                    f"kdscale stream, {name}",
                    f"{own['rate']:,.0f}",
                    f"{ratios} {share}".strip(),
                    f"{own['first_s']:.1f}",
                )
            )
    print(table("Stream", ("loader", "samples/s", "ratio", "first batch, s"), rows))


if __name__ == "__main__":
    main()
