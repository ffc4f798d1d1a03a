"""A study whose stage store is written by hand."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg

from kdscale.core.config import DataSpec, Distill, TowerSpec, ZeroShotSpec
from kdscale.core.journal import JournalWriter
from kdscale.core.scale import Scale
from kdscale.core.storage import Storage
from kdscale.sweep.grid import Sweep, choose
from kdscale.sweep.plan import make_plan
from kdscale.sweep.report import build_report

CLASSES = ("red dot", "blue dot", "green & <b>dot</b>", "grey dot")
NUM_IMAGES = 40
LABELS = [index % len(CLASSES) for index in range(NUM_IMAGES)]
KEYS = [f"image{index:03d}" for index in range(NUM_IMAGES)]
STEPS = 4


def write_tar(path, rows):
    """Writes (key, suffix, bytes) rows."""
    with tarfile.open(path, "w") as tar:
        for key, suffix, data in rows:
            info = tarfile.TarInfo(f"{key}.{suffix}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def jpeg(seed):
    """Draws a small image."""
    pixels = np.random.default_rng(seed).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    return simplejpeg.encode_jpeg(pixels)


def make_scale(directory):
    """Writes tiny shards and returns a scale that reads them."""
    rows = [(f"pair{i}", s, d) for i in range(8) for s, d in (("jpg", jpeg(i)), ("txt", b"a dot"))]
    write_tar(directory / "train.tar", rows)
    labelled = [
        (key, suffix, data)
        for i, key in enumerate(KEYS)
        for suffix, data in (("jpg", jpeg(i)), ("json", json.dumps({"label": LABELS[i]}).encode()))
    ]
    write_tar(directory / "eval.tar", labelled)
    train = DataSpec(name="train", urls=str(directory / "train.tar"))
    images = DataSpec(name="eval", urls=str(directory / "eval.tar"))
    spec = ZeroShotSpec(name="dots", data=images, classnames=CLASSES, templates=("a {}.",))
    sizes = {"data": train, "zero_shot": spec, "epochs": 1, "global_batch_size": 2}
    base, siglip = tower("base", width=96), tower("siglip", width=160, tokenizer="mini_sp")
    return Scale(
        name="dots",
        precision="fp32",
        teachers={
            "clip_b16": Distill(student=base, loss="clip", **sizes),
            "siglip_so400m": Distill(student=siglip, loss={"sigmoid": 1.0}, **sizes),
        },
        students={"vit_t16": tower("student", width=64)},
        data={"cc12m": train},
        zero_shot={"imagenet": spec},
    )


def tower(name, **fields):
    """Returns a tower that is never built."""
    facts = {"image_px": 64, "patch_px": 16, "tokenizer": "mini_bpe"}
    return TowerSpec(name=name, clip_config="never built", **(facts | fields))


def recipe(**fields):
    """Returns a recipe of `STEPS` steps at the scale of `make_scale`."""
    return Distill(**({"student": "vit_t16", "epochs": 1, "global_batch_size": 2} | fields))


def make_sweep(name="little", **fields):
    """Two teachers, two losses, and a control without a teacher."""
    taught = recipe(teacher=choose("clip_b16", "siglip_so400m"), loss=choose("clip_kd", "mse"))
    settings = {"stages": [taught, recipe(loss="clip")], "baseline": {"teacher": None}}
    return Sweep(name=name, **(settings | fields))


def answers(num_right, start=0):
    """Answers of a model that is right on `num_right` images from `start` on."""
    right = {(start + i) % NUM_IMAGES for i in range(num_right)}
    return [label if i in right else (label + 1) % 4 for i, label in enumerate(LABELS)]


def write_journal(stage, storage, steps, cka=None):
    """Writes the lines of the first steps, with an evaluation at every second one."""
    journal = JournalWriter(stage.store(storage), flush_every=3)
    for step in range(1, steps + 1):
        line = {"step": step, "total": 5.0 / step, "lr": 1e-3}
        if step % 2 == 0:
            line |= {"zero_shot_top1": 10.0 * step}
            line |= {} if cka is None else {"cka_debiased": cka, "cka_biased": cka + 0.1}
        journal.append(line)
    journal.flush()


def write_scores(stage, storage, predicted, suffix="", cka=None, order=None):
    """Writes a student's answers and metrics."""
    parts = (*stage.store(storage).parts, "output")
    order = list(range(NUM_IMAGES)) if order is None else order
    columns = {"key": KEYS, "label": LABELS, "prediction": predicted}
    table = {name: [values[i] for i in order] for name, values in columns.items()}
    buffer = io.BytesIO()
    pq.write_table(pa.table(table), buffer)
    storage.write(buffer.getvalue(), *parts, f"zero_shot{suffix}.parquet")
    metrics = {"zero_shot_top1": 0.0}
    metrics |= {} if cka is None else {"cka_debiased": cka, "cka_biased": cka + 0.1}
    storage.write_json(metrics, *parts, f"metrics{suffix}.json")


def finish(stage, storage, predicted, cka=None, order=None):
    """Writes everything that a finished stage leaves behind."""
    write_journal(stage, storage, STEPS, cka)
    store = stage.store(storage)
    if predicted is not None:
        write_scores(stage, storage, predicted, cka=cka, order=order)
    store.finish({"kind": stage.kind, "total_steps": STEPS, "seconds": 75.0})


class Study:
    """A plan whose stages are found by what was chosen."""

    def __init__(self, directory, sweeps):
        self.storage = Storage(str(directory / "store"))
        self.sweeps, self.scale = sweeps, make_scale(directory)
        self.plan = self.planned()

    def planned(self):
        """Plans it anew, as another run does."""
        return make_plan(self.sweeps, self.storage, self.scale, {})

    def stage(self, teacher, loss, seed=0):
        """Returns a trial's stage."""
        wanted = {"teacher": teacher, "loss": loss}
        return next(
            self.plan.stages[planned.key]
            for planned in self.plan.trials
            if wanted.items() <= planned.trial.chosen.items() and planned.trial.recipe.seed == seed
        )

    def teacher(self, name):
        """Returns the stage that trains a teacher."""
        return next(s for s in self.plan.stages.values() if s.name == name)

    def report(self):
        """Reports what is there."""
        return build_report(self.plan, self.sweeps)

    def row(self, report, teacher, loss):
        """Returns a trial's row."""
        return next(row for row in report.trials if row.key == self.stage(teacher, loss).key)
