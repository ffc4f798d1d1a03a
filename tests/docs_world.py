"""A directory in which the commands of the documentation can be run: small files of every kind.

Its names are those of the documentation: `shards/`, `pairs.csv`, `cc12m/`, `DIR`, `SWEEP.py`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from conftest import Part, jpeg, pair
from talks import about_image, talk
from vlm_parts import language
from zero_shot_world import karpathy, tiny, tower, write_folders

from kdscale import (
    DataSpec,
    Distill,
    Execution,
    MiniWorld,
    Sweep,
    TowerSpec,
    Vlm,
    ZeroShotSpec,
)
from kdscale.core.scale import PAPER
from kdscale.core.storage import Storage
from kdscale.data.instruct_stream import InstructStream
from kdscale.data.prepare import Preparation, prepare
from kdscale.data.stream import TrainStream
from kdscale.mini.benchmarks import write_benchmarks
from kdscale.models.towers import save_clip
from kdscale.stages.loop import World
from kdscale.stages.run import Run
from kdscale.stages.streams import instruct_config, stream_config
from kdscale.stages.vlm_run import VlmRun
from kdscale.sweep.orders import group_job
from kdscale.sweep.plan import make_plan

WriteTar = Callable[[Path, list[Part]], Path]

NUM_PHOTOS, NUM_PAIRS = 24, 4400  # of the paper's global batch, 4096, at least one
CLASSES = 4
FEW: Any = {"workers": 1}
HERE = Execution(num_workers=0, checkpoint_every=8, log_every=1)


def make(root: Path, write_tar: WriteTar) -> dict[str, str]:
    """Fills the current directory and trains what `SWEEP.py` asks for.

    Args:
        root: The current directory, empty.
        write_tar: Writes tars.

    Returns:
        The keys of the finished stages by kind.
    """
    photos = [jpeg(number) for number in range(NUM_PHOTOS)]
    _write_captions(root, photos)
    _write_conversations(root, photos)
    _write_tars(root, photos, write_tar)
    _write_eval_sets(root)
    prepare(Preparation(source="pairs.csv", images="photos/", out="shards/", **FEW))
    source = "blip_laion_cc_sbu_558k.json"
    talks = {"images": "llava_pretrain/", "out": "llava558k/", "format": "conversations"}
    prepare(Preparation(source=source, **talks, **FEW))
    spec = small_pair()
    save_clip(tower(spec).model, spec, root / "clip")
    (root / "SWEEP.py").write_text('"""A tiny sweep."""\nfrom docs_world import sweep_of\n\n'
                                   "sweep = sweep_of()\n")  # fmt: skip
    shutil.copy(root / "SWEEP.py", root / "FILE")
    keys = _finish(root)
    (root / "MODEL").symlink_to(f"runs/stages/finetune/{keys['finetune']}/output/model")
    return keys


def small_pair() -> TowerSpec:
    """A pair whose image tower has two blocks, of which a VLM reads the first."""
    spec = tiny()
    config: Any = spec.clip_config
    return spec.replace(clip_config=config | {"vision_cfg": config["vision_cfg"] | {"layers": 2}})


def sweep_of() -> Sweep:
    """A student and a VLM that train in this process, by the names of the paper's data sets."""
    images = DataSpec(name="imagenet_val", urls="data/imagenet/val")
    classes = tuple(f"thing {number}" for number in range(CLASSES))
    student = Distill(
        student=small_pair(),
        teacher=None,
        loss="clip",
        data=DataSpec(name="CC12M", urls="shards/*.tar"),
        zero_shot=ZeroShotSpec(name="things", data=images, classnames=classes, templates="simple"),
        global_batch_size=8,
        epochs=1,
        warmup_steps=1,
        precision="fp32",
        run=HERE,
    )
    talks = DataSpec(name="talks", urls="llava558k/*.tar")
    stage: dict[str, Any] = {"data": talks, "global_batch_size": 4, "micro_batch_size": 2}
    stage |= {"group_size": 4, "precision": "fp32", "max_length": 512, "run": HERE}
    vlm = Vlm(
        vision=student.output,
        llm=language("qwen2_0_5b", Path("language")),
        recipe="tinyllava",
        suite="paper16",
        pretrain=stage,
        finetune=stage,
    )
    return Sweep(name="tiny", stages=[vlm], seeds=(0,))


def _finish(root: Path) -> dict[str, str]:
    """Runs the training stages of the sweep as its workers would, without Ray."""
    storage, keys = Storage(str(root / "runs")), {}
    for stage in make_plan([sweep_of()], storage, PAPER, {}).stages.values():
        if stage.kind == "answers":
            continue
        job: Any = group_job(stage, "", storage)
        job = replace(job, lease=None)
        if stage.kind == "distill":
            whole: Any = replace(stream_config(job), own_steps=job.total_steps)
            stream: Any = TrainStream(None, whole, 0)
            Run(job, World(), lambda _: None).train(lambda _, s=stream: iter(s))
        else:
            whole = replace(instruct_config(job), own_steps=job.total_steps)
            stream = InstructStream(None, whole, 0)
            VlmRun(job, World(), lambda _: None).train(lambda _, s=stream: iter(s))
        keys[stage.kind] = stage.key
    return keys


def _write_captions(root: Path, photos: list[bytes]) -> None:
    """Photographs with a table of captions, in the two forms that the documentation shows."""
    rows, links = ["image,caption"], []
    for folder in ("photos", "DIR"):
        (root / folder).mkdir()
        for number, data in enumerate(photos):
            (root / folder / f"{number:09d}.jpg").write_bytes(data)
    for number in range(len(photos)):
        rows.append(f"{number:09d}.jpg,photograph number {number}")
        links.append(f"http://example.org/{number:09d}.jpg\tphotograph number {number}")
    (root / "pairs.csv").write_text("\n".join(rows))
    (root / "cc12m.tsv").write_text("\n".join(links) + "\n")


def _write_conversations(root: Path, photos: list[bytes]) -> None:
    """LLaVA's and Bunny's lists with their folders of images."""
    for name, folder in (
        ("blip_laion_cc_sbu_558k", "llava_pretrain"),
        ("llava_v1_5_mix665k", "mix665k"),
        ("bunny_695k", "bunny"),
    ):
        (root / folder).mkdir()
        rows: list[dict[str, Any]] = []
        for number, data in enumerate(photos):
            (root / folder / f"{number}.jpg").write_bytes(data)
            turns = talk("<image>\nwhat is this?", f"a thing of kind {number}")
            turns = turns if "558k" in name else about_image(number)
            rows.append({"id": str(number), "image": f"{number}.jpg", "conversations": turns})
        (root / f"{name}.json").write_text(json.dumps(rows))


def _write_tars(root: Path, photos: list[bytes], write_tar: WriteTar) -> None:
    """Shards of pairs; of those that stand for CC12M as many as a global batch of the paper."""
    small, members = jpeg(1, 16, 16), []
    for number in range(NUM_PAIRS):
        key = f"{number:06d}"
        members += [(f"{key}.jpg", small), (f"{key}.txt", f"picture {number}".encode())]
    half = len(members) // 2
    write_tar(root / "cc12m" / "00000.tar", members[:half])
    write_tar(root / "cc12m" / "00001.tar", members[half:])
    write_tar(root / "bunny" / "00000.tar", members[:half])
    numbers = range(len(photos))
    for shard in range(8):
        parts = [p for n in range(10) for p in pair(f"{shard}{n:03d}", n)]
        write_tar(root / "DIR" / f"{shard:05d}.tar", parts)
    write_tar(root / "data" / "val" / "0.tar", [(f"{n}.jpg", photos[n]) for n in numbers])
    for folder in ("a", "b"):
        write_tar(root / folder / "0.tar", [p for n in numbers for p in pair(f"{n:04d}", n)])


def _write_eval_sets(root: Path) -> None:
    """The 16 benchmarks in miniature, and images of a few classes."""
    write_benchmarks(root / "DIR", MiniWorld(split="eval", content="instruct"), n=32)
    (root / "data").mkdir(exist_ok=True)
    (root / "data" / "bench").symlink_to(root / "DIR")
    classes = [str(number) for number in range(CLASSES)]
    for folder in ("data/imagenet/val", "DIR/imagenet", "DIR/imagenet_v2"):
        write_folders(root / folder, classes)
    images = write_folders(root / "DIR" / "coco", ["val2014"])
    captions = karpathy([("picture0.JPEG", [f"picture, caption {n}" for n in range(5)])])
    (images / "dataset_coco.json").write_text(captions)
    write_folders(root / "data" / "MMVP", classes)
