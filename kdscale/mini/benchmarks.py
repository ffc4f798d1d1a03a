"""Writes the 16 VLM benchmarks in miniature, in the files and columns of the originals.

Scenes are held-out compositions. Within a benchmark's kind of question the answers take turns, so
that who does not see the image is at chance; a quarter of ScienceQA has no image, as half of the
original, and can be answered from words.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from kdscale.core.config import MiniWorld
from kdscale.core.types import ConfigError
from kdscale.mini import benchmark_answers, benchmark_choices
from kdscale.mini.benchmark_scenes import Row, Studio
from kdscale.mini.benchmark_schemas import SCHEMAS
from kdscale.mini.benchmark_yes_no import mme

NUM_ITEMS = 96
FEWEST, STEP = 32, 8
TABLES: dict[str, tuple[str, Callable[[Studio, int], list[Row]]]] = {
    "mme_p": ("data/test", mme),
    "mmbench": ("data/dev", benchmark_choices.mmbench),
    "seedbench": ("data/test", benchmark_choices.seedbench),
    "scienceqa": ("data/test", benchmark_choices.scienceqa),
    "mmmu": ("data/validation", benchmark_answers.mmmu),
    "mathvista": ("data/testmini", benchmark_answers.mathvista),
    "ai2d": ("data/test", benchmark_choices.ai2d),
    "chartqa": ("data/test", benchmark_answers.chartqa),
    "ocrbench": ("data/test", benchmark_answers.ocrbench),
    "textvqa": ("data/validation", benchmark_answers.textvqa),
    "docvqa": ("DocVQA/validation", benchmark_answers.docvqa),
    "realworldqa": ("data/test", benchmark_answers.realworldqa),
    "cvbench_2d": ("test_2d", benchmark_choices.cvbench_2d),
    "cvbench_3d": ("test_3d", benchmark_choices.cvbench_3d),
}


def write_benchmarks(directory: str | Path, world: MiniWorld, n: int = NUM_ITEMS) -> None:
    """Writes all 16 benchmarks; the bytes depend on the world and `n` alone.

    Args:
        directory: Receives a folder for each benchmark, in the layout of its repository on the
            hub. Files of the same name are replaced.
        world: An `instruct` world of the `eval` split; its `num_samples` do not matter.
        n: Questions of each benchmark.

    Raises:
        ConfigError: The world is another one, or the benchmarks cannot have that many questions.
    """
    if (world.split, world.content) != ("eval", "instruct"):
        raise ConfigError(
            f"benchmarks are drawn from a world of split 'eval' and content 'instruct', not of "
            f"{world.split!r} and {world.content!r}"
        )
    if n < FEWEST or n % STEP:
        raise ConfigError(f"n is {n}; give a multiple of {STEP} from {FEWEST} on")
    root = Path(directory)
    for name, (stem, rows_of) in TABLES.items():
        schema = SCHEMAS["cvbench" if name.startswith("cvbench") else name]
        _write(root / name / _part(stem), rows_of(Studio(world, name), n), schema)
    rows, images = benchmark_answers.gqa(Studio(world, "gqa"), n)
    folder = root / "gqa"
    _write(folder / _part("testdev_balanced_instructions/testdev"), rows, SCHEMAS["gqa"])
    _write(folder / _part("testdev_balanced_images/testdev"), images, SCHEMAS["gqa_images"])
    _write_mmvp(root / "mmvp", benchmark_choices.mmvp(Studio(world, "mmvp"), n))


def _part(stem: str) -> str:
    """The name of the only file of a split; CV-Bench's files are not numbered."""
    return f"{stem}.parquet" if "/" not in stem else f"{stem}-00000-of-00001.parquet"


def _write(path: Path, rows: list[Row], schema: pa.Schema) -> None:
    """Writes a table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)


def _write_mmvp(folder: Path, lines: list[tuple[Row, bytes]]) -> None:
    """Writes a table of questions and a folder of images."""
    images = folder / "MMVP Images"
    images.mkdir(parents=True, exist_ok=True)
    with (folder / "Questions.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0][0]))
        writer.writeheader()
        for row, image in lines:
            writer.writerow(row)
            (images / f"{row['lndex']}.jpg").write_bytes(image)
