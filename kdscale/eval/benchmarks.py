"""The 16 VLM benchmarks as one table: where the data are, and how they are asked.

Settings are those of Cambrian-1's evaluation scripts (`eval/` at 539ffc3), with three departures:
DocVQA is asked on its validation split, as answers to its test split are not published; CV-Bench on
its public set; ScienceQA with its text-only questions, as the study's percentages are of all 4,241.
The data sets of `lmms-lab` moved to `lmms-lab-encoder` in July 2026; the old ids redirect.
"""

from __future__ import annotations

from dataclasses import dataclass

from kdscale.core.types import unknown_name
from kdscale.eval import prompts, rows
from kdscale.eval.rows import Reader


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Where a benchmark's data are, and how they are asked.

    Attributes:
        name: In results and folders.
        title: In tables.
        hub_id: Data set on the Hugging Face hub.
        revision: Commit, tag or branch there.
        config: As the hub names it, None for the only one.
        split: As the hub names it.
        files: Glob of the rows' files within the repository.
        num_rows: Rows of the original.
        num_asked: How many of them are asked.
        columns: Fields that a row must have.
        labels: Fields that only tell rows apart, and may be absent.
        read: Takes a row apart, and builds the prompt's body.
        suffix: Last line of the prompt; None where the question says how to answer.
        open_suffix: The same for questions without options, where a benchmark has both kinds.
        max_new_tokens: Longest answer.
        group_size: Rows that are scored together, where all groups are equally large.
        has_rotations: Rows are scored together in groups that differ in size.
        images: Glob of the images' files where the rows only name them.
        image_column: Where the rows or those files hold the image.
    """

    name: str
    title: str
    hub_id: str
    revision: str = "main"
    config: str | None = None
    split: str
    files: str
    num_rows: int
    num_asked: int
    columns: tuple[str, ...]
    labels: tuple[str, ...] = ()
    read: Reader
    suffix: str | None
    open_suffix: str | None = None
    max_new_tokens: int = 512
    group_size: int | None = None
    has_rotations: bool = False
    images: str | None = None
    image_column: str = "image"


_ALL = (
    Benchmark(
        name="mme_p",
        title="MME-P",
        hub_id="lmms-lab/MME",
        split="test",
        files="data/test-*.parquet",
        num_rows=2374,
        num_asked=2374,
        columns=("question_id", "image", "question", "answer", "category"),
        read=rows.mme,
        suffix=prompts.WORD,
        max_new_tokens=32,
        group_size=2,
    ),
    Benchmark(
        name="mmbench",
        title="MMBench",
        hub_id="lmms-lab/MMBench_EN",
        split="dev",
        files="data/dev-*.parquet",
        num_rows=4377,
        num_asked=4377,
        columns=("index", "question", "hint", "answer", "A", "B", "C", "D", "image"),
        labels=("category",),
        read=rows.mmbench,
        suffix=prompts.LETTER,
        has_rotations=True,
    ),
    Benchmark(
        name="seedbench",
        title="SEEDBench",
        hub_id="lmms-lab/SEED-Bench",
        split="test",
        files="data/test-*.parquet",
        num_rows=17990,
        num_asked=14233,
        columns=("question", "choice_a", "choice_b", "choice_c", "choice_d", "answer", "image"),
        labels=("question_type_id",),
        read=rows.seedbench,
        suffix=prompts.LETTER,
    ),
    Benchmark(
        name="gqa",
        title="GQA",
        hub_id="lmms-lab/GQA",
        config="testdev_balanced_instructions",
        split="testdev",
        files="testdev_balanced_instructions/testdev-*.parquet",
        images="testdev_balanced_images/testdev-*.parquet",
        num_rows=12578,
        num_asked=12578,
        columns=("imageId", "question", "answer"),
        labels=("types",),
        read=rows.gqa,
        suffix=prompts.WORD,
        max_new_tokens=128,
    ),
    Benchmark(
        name="scienceqa",
        title="ScienceQA",
        hub_id="derek-thomas/ScienceQA",
        split="test",
        files="data/test-*.parquet",
        num_rows=4241,
        num_asked=4241,
        columns=("image", "question", "choices", "answer", "hint"),
        labels=("grade",),
        read=rows.scienceqa,
        suffix=prompts.ONLY_LETTER,
    ),
    Benchmark(
        name="mmmu",
        title="MMMU",
        hub_id="lmms-lab/MMMU",
        split="validation",
        files="data/validation-*.parquet",
        num_rows=900,
        num_asked=900,
        columns=("question", "options", "image_1", "answer", "question_type"),
        image_column="image_1",
        labels=("id",),
        read=rows.mmmu,
        suffix=prompts.LETTER,
        open_suffix=prompts.WORD,
    ),
    Benchmark(
        name="mathvista",
        title="MathVista",
        hub_id="AI4Math/MathVista",
        split="testmini",
        files="data/testmini-*.parquet",
        num_rows=1000,
        num_asked=1000,
        columns=("query", "decoded_image", "choices", "answer", "question_type"),
        image_column="decoded_image",
        labels=("metadata",),
        read=rows.mathvista,
        suffix=prompts.REASONING,
        open_suffix=prompts.WORD,
    ),
    Benchmark(
        name="ai2d",
        title="AI2D",
        hub_id="lmms-lab/ai2d",
        split="test",
        files="data/test-*.parquet",
        num_rows=3088,
        num_asked=3088,
        columns=("question", "options", "answer", "image"),
        read=rows.ai2d,
        suffix=prompts.LETTER,
    ),
    Benchmark(
        name="chartqa",
        title="ChartQA",
        hub_id="lmms-lab/ChartQA",
        split="test",
        files="data/test-*.parquet",
        num_rows=2500,
        num_asked=2500,
        columns=("question", "answer", "image"),
        labels=("type",),
        read=rows.chartqa,
        suffix=prompts.NUMBER,
        max_new_tokens=128,
    ),
    Benchmark(
        name="ocrbench",
        title="OCRBench",
        hub_id="echo840/OCRBench",
        split="test",
        files="data/test-*.parquet",
        num_rows=1000,
        num_asked=1000,
        columns=("question", "answer", "image", "question_type"),
        labels=("dataset",),
        read=rows.ocrbench,
        suffix=prompts.SHORT,
    ),
    Benchmark(
        name="textvqa",
        title="TextVQA",
        hub_id="lmms-lab/textvqa",
        split="validation",
        files="data/validation-*.parquet",
        num_rows=5000,
        num_asked=5000,
        columns=("question", "image", "answers", "ocr_tokens"),
        read=rows.textvqa,
        suffix=prompts.WORD,
    ),
    Benchmark(
        name="docvqa",
        title="DocVQA",
        hub_id="lmms-lab/DocVQA",
        config="DocVQA",
        split="validation",
        files="DocVQA/validation-*.parquet",
        num_rows=5349,
        num_asked=5349,
        columns=("question", "image", "answers"),
        labels=("question_types",),
        read=rows.docvqa,
        suffix=prompts.SHORT,
        max_new_tokens=128,
    ),
    Benchmark(
        name="mmvp",
        title="MMVP",
        hub_id="MMVP/MMVP",
        split="test",
        files="Questions.csv",
        images="MMVP Images/*.jpg",
        num_rows=300,
        num_asked=300,
        columns=("index", "question", "options", "correct answer"),
        read=rows.mmvp,
        suffix=prompts.LETTER,
        group_size=2,
    ),
    Benchmark(
        name="realworldqa",
        title="RealWorldQA",
        hub_id="lmms-lab/RealWorldQA",
        split="test",
        files="data/test-*.parquet",
        num_rows=765,
        num_asked=765,
        columns=("image", "question", "answer"),
        read=rows.realworldqa,
        suffix=None,
    ),
    Benchmark(
        name="cvbench_2d",
        title="CV-Bench 2D",
        hub_id="nyu-visionx/CV-Bench",
        config="2D",
        split="test",
        files="test_2d*.parquet",
        num_rows=1438,
        num_asked=1438,
        columns=("prompt", "choices", "answer", "image", "source"),
        labels=("task",),
        read=rows.cvbench,
        suffix=prompts.LETTER,
    ),
    Benchmark(
        name="cvbench_3d",
        title="CV-Bench 3D",
        hub_id="nyu-visionx/CV-Bench",
        config="3D",
        split="test",
        files="test_3d*.parquet",
        num_rows=1200,
        num_asked=1200,
        columns=("prompt", "choices", "answer", "image", "source"),
        labels=("task",),
        read=rows.cvbench,
        suffix=prompts.LETTER,
    ),
)
BENCHMARKS = {benchmark.name: benchmark for benchmark in _ALL}


def find_benchmark(name: str) -> Benchmark:
    """Returns a benchmark.

    Args:
        name: A key of `BENCHMARKS`.

    Raises:
        UnknownName: There is none of that name.
    """
    if name not in BENCHMARKS:
        raise unknown_name("benchmark", name, BENCHMARKS)
    return BENCHMARKS[name]
