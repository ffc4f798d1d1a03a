"""The tables that arXiv 2511.17886 prints, typed, with their layout.

Figure 2 is derived from tables 1 and 2 as the paper does. Of figure 3, only the numbers that
table 2 prints for 32 epochs exist. A table of this project's own sets the two readings of the
labels CLIP-ViT-B and CLIP-ViT-L beside each other.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.resources import files
from itertools import product

from kdscale.eval.benchmarks import BENCHMARKS
from kdscale.sweep.places import AVERAGE, CKA, IMAGENET, Place, Terms, encoder, student

TITLES = {AVERAGE: "Average", IMAGENET: "ImageNet"} | {
    name: found.title for name, found in BENCHMARKS.items()
}
TASKS = {
    "CV-Bench_2D": "cvbench_2d",
    "GQA": "gqa",
    "ScienceQA": "scienceqa",
    "MMVP": "mmvp",
    "ImageNet": IMAGENET,
}
LOSSES = ("CLIP-KD", "MSE", "ICL", "KL")
EPOCHS = (32, 64, 96)
COMPLETE, ON_THE_WAY = "run to the end", f"read on the way of {EPOCHS[-1]}"
PROTOCOLS = (COMPLETE, ON_THE_WAY)
LONG_TEACHERS = ("CLIP-ViT-L", "DFN-ViT-L")


@dataclass(frozen=True, kw_only=True)
class EncoderRow:
    """A row of table 1: a VLM on a given encoder."""

    framework: str
    llm: str
    encoder: str
    mparams: float
    average: float
    scores: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class StudentRow:
    """A row of table 2: a student's accuracy, and a VLM on it."""

    framework: str
    llm: str
    student: str
    teacher: str
    imagenet: float
    average: float
    scores: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class CkaRow:
    """A row of table 3: score and CKA of ViT-T students of CLIP-ViT-B and CLIP-ViT-L."""

    task: str
    base: tuple[float, float]
    large: tuple[float, float]
    delta: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class AblationRow:
    """A row of table 4 or 5: a ViT-T student by teacher and loss or data."""

    teacher: str
    choice: str
    multimodal: float
    imagenet: float


@dataclass(frozen=True, kw_only=True)
class PaperCell:
    """One number of a table, as printed and as what it is of.

    Attributes:
        printed: None where the paper prints none.
        terms: What it is: one place, or a difference.
    """

    printed: float | None
    terms: Terms


@dataclass(frozen=True, kw_only=True)
class PaperRow:
    """A row with the names in front of it."""

    labels: tuple[str, ...]
    cells: tuple[PaperCell, ...]


@dataclass(frozen=True, kw_only=True)
class PaperTable:
    """A table as the paper prints it.

    Attributes:
        name: Of its files.
        label_names: Heads of the columns of names.
        columns: Heads of the columns of numbers.
        short: How many columns of numbers are shown where space is scarce.
    """

    name: str
    title: str
    label_names: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[PaperRow, ...]
    short: int


def _lines(name: str) -> list[dict[str, str]]:
    """Reads a packaged table."""
    text = files("kdscale.sweep").joinpath("paper", f"{name}.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def _scores(line: Mapping[str, str]) -> dict[str, float]:
    """Reads the 16 columns."""
    return {name: float(line[name]) for name in BENCHMARKS}


def encoder_rows() -> list[EncoderRow]:
    """Reads table 1."""
    return [
        EncoderRow(
            framework=line["framework"],
            llm=line["llm"],
            encoder=line["encoder"],
            mparams=float(line["vit_params_m"]),
            average=float(line["average"]),
            scores=_scores(line),
        )
        for line in _lines("table1")
    ]


def student_rows() -> list[StudentRow]:
    """Reads table 2."""
    return [
        StudentRow(
            **{name: line[name] for name in ("framework", "llm", "student", "teacher")},
            imagenet=float(line["imagenet"]),
            average=float(line["average"]),
            scores=_scores(line),
        )
        for line in _lines("table2")
    ]


def cka_rows() -> list[CkaRow]:
    """Reads table 3."""
    return [
        CkaRow(
            task=line["task"],
            base=(float(line["clip_vit_b_perf"]), float(line["clip_vit_b_cka"])),
            large=(float(line["clip_vit_l_perf"]), float(line["clip_vit_l_cka"])),
            delta=(float(line["delta_perf"]), float(line["delta_cka"])),
        )
        for line in _lines("table3")
    ]


def ablation_rows(name: str, choice: str) -> list[AblationRow]:
    """Reads table 4 (`loss`) or 5 (`dataset`)."""
    return [
        AblationRow(
            teacher=line["teacher"],
            choice=line[choice],
            multimodal=float(line["multimodal"]),
            imagenet=float(line["imagenet"]),
        )
        for line in _lines(name)
    ]


def _one(printed: float | None, place: Place) -> PaperCell:
    """Returns a cell of one number."""
    return PaperCell(printed=printed, terms=((1.0, place),))


def _minus(printed: float | None, first: Place, second: Place) -> PaperCell:
    """Returns a cell of a difference."""
    return PaperCell(printed=printed, terms=((1.0, first), (-1.0, second)))


def _table1() -> PaperTable:
    """Lays out table 1."""
    metrics = (AVERAGE, *BENCHMARKS)
    rows = [
        PaperRow(
            labels=(row.framework, row.llm, row.encoder),
            cells=tuple(
                _one(value, encoder(metric, row.framework, row.llm, row.encoder))
                for metric, value in {AVERAGE: row.average, **row.scores}.items()
            ),
        )
        for row in encoder_rows()
    ]
    return PaperTable(
        name="table1",
        title="Table 1: VLMs on given encoders",
        label_names=("framework", "language model", "encoder"),
        columns=tuple(TITLES[metric] for metric in metrics),
        rows=tuple(rows),
        short=1,
    )


def _table2() -> PaperTable:
    """Lays out table 2."""
    rows = [
        PaperRow(
            labels=(row.framework, row.llm, row.student, row.teacher),
            cells=tuple(
                _one(value, student(metric, row.teacher, model=row.student, llm=row.llm))
                for metric, value in {
                    IMAGENET: row.imagenet,
                    AVERAGE: row.average,
                    **row.scores,
                }.items()
            ),
        )
        for row in student_rows()
    ]
    return PaperTable(
        name="table2",
        title="Table 2: VLMs on distilled students",
        label_names=("framework", "language model", "student", "teacher"),
        columns=tuple(TITLES[metric] for metric in (IMAGENET, AVERAGE, *BENCHMARKS)),
        rows=tuple(rows),
        short=2,
    )


def _table3() -> PaperTable:
    """Lays out table 3."""
    rows: list[PaperRow] = []
    for row in cka_rows():
        metrics = (TASKS[row.task], CKA + TASKS[row.task])
        base, large = (
            [student(metric, teacher) for metric in metrics]
            for teacher in ("CLIP-ViT-B", "CLIP-ViT-L")
        )
        cells = [
            *map(_one, row.base, base),
            *map(_one, row.large, large),
            *map(_minus, row.delta, large, base),
        ]
        rows.append(PaperRow(labels=(row.task.replace("_", " "),), cells=tuple(cells)))
    sides = ("CLIP-ViT-B", "CLIP-ViT-L", "difference")
    return PaperTable(
        name="table3",
        title="Table 3: score and CKA of ViT-T with its teacher, CLIP-ViT-B and CLIP-ViT-L",
        label_names=("task",),
        columns=tuple(f"{side} {what}" for side in sides for what in ("score", "CKA")),
        rows=tuple(rows),
        short=6,
    )


def _ablation(name: str, title: str, choice: str) -> PaperTable:
    """Lays out table 4 or 5."""
    rows: list[PaperRow] = []
    for row in ablation_rows(name, choice):
        loss = row.choice if choice == "loss" else "CLIP-KD"
        how = ("CC12M" if choice == "loss" else row.choice, 32)
        cells = tuple(
            _one(value, student(metric, row.teacher, loss=loss, how=how))
            for metric, value in ((AVERAGE, row.multimodal), (IMAGENET, row.imagenet))
        )
        rows.append(PaperRow(labels=(row.teacher, row.choice), cells=cells))
    return PaperTable(
        name=name,
        title=title,
        label_names=("teacher", choice),
        columns=("Multimodal", "ImageNet"),
        rows=tuple(rows),
        short=2,
    )


def _figure2() -> PaperTable:
    """Derives figure 2: teacher's and student's average, and the gap, weakest teacher first."""
    wanted = ("TinyLLaVA", "Qwen2-0.5B")
    students = {r.teacher: r.average for r in student_rows()
                if (r.framework, r.llm) == wanted and r.student == "ViT-T"}  # fmt: skip
    teachers = {r.encoder: r.average for r in encoder_rows()
                if (r.framework, r.llm) == wanted and r.encoder in students}  # fmt: skip
    rows: list[PaperRow] = []
    for name in sorted(teachers, key=teachers.__getitem__):
        first, second = encoder(AVERAGE, *wanted, name), student(AVERAGE, name)
        gap = round(teachers[name] - students[name], 2)
        cells = (
            _one(teachers[name], first),
            _one(students[name], second),
            _minus(gap, first, second),
        )
        rows.append(PaperRow(labels=(name,), cells=cells))
    return PaperTable(
        name="figure2",
        title="Figure 2: the gap between teacher and ViT-T student, multimodal average",
        label_names=("teacher",),
        columns=("Teacher", "Student", "Gap"),
        rows=tuple(rows),
        short=3,
    )


def long_place(metric: str, teacher: str, protocol: str, epochs: int) -> Place:
    """Returns the place of a student of figure 3; both protocols share the longest run's end."""
    place = student(metric, teacher, how=("CC12M", epochs))
    is_early = protocol == ON_THE_WAY and epochs < EPOCHS[-1]
    return replace(place, schedule=EPOCHS[-1]) if is_early else place


def _figure3(known: Mapping[Place, float]) -> PaperTable:
    """Lays out figure 3 for both protocols; table 2 prints the first point of complete runs."""
    metrics = (IMAGENET, AVERAGE, "mmvp")
    rows: list[PaperRow] = []
    for teacher, protocol, epochs in product(LONG_TEACHERS, PROTOCOLS, EPOCHS):
        places = [long_place(metric, teacher, protocol, epochs) for metric in metrics]
        cells = tuple(_one(known.get(place), place) for place in places)
        rows.append(PaperRow(labels=(teacher, protocol, str(epochs)), cells=cells))
    return PaperTable(
        name="figure3",
        title="Figure 3: longer distillation of ViT-T (printed: table 2, 32 epochs)",
        label_names=("teacher", "protocol", "epochs"),
        columns=tuple(TITLES[metric] for metric in metrics),
        rows=tuple(rows),
        short=3,
    )


def _clip_labels(known: Mapping[Place, float]) -> PaperTable:
    """Lays out CLIP-ViT-B minus CLIP-ViT-L by loss, as labelled and with both labels swapped."""
    base, large = "CLIP-ViT-B", "CLIP-ViT-L"
    pairs = {
        (TITLES[metric], loss): [student(metric, teacher, loss=loss) for teacher in (base, large)]
        for metric in (IMAGENET, AVERAGE)
        for loss in LOSSES
    }
    own = [encoder(AVERAGE, "TinyLLaVA", "Qwen2-0.5B", teacher) for teacher in (base, large)]
    pairs[TITLES[AVERAGE], "none: the teachers"] = own
    rows: list[PaperRow] = []
    for labels, (first, second) in pairs.items():
        printed = round(known[first] - known[second], 2)
        cells = (_minus(printed, first, second), _minus(-printed, first, second))
        rows.append(PaperRow(labels=labels, cells=cells))
    return PaperTable(
        name="clip_labels",
        title="CLIP labels: B minus L as printed and, were the two labels swapped, as meant",
        label_names=("metric", "loss"),
        columns=("as printed", "swapped"),
        rows=tuple(rows),
        short=2,
    )


@lru_cache(maxsize=1)
def paper_tables() -> tuple[PaperTable, ...]:
    """Returns all tables, then the two figures and the labels of CLIP."""
    losses = "Table 4: losses, ViT-T"
    found = [_table1(), _table2(), _table3(), _ablation("table4", losses, "loss")]
    found.append(_ablation("table5", "Table 5: more data, ViT-T", "dataset"))
    known = single_numbers(found)
    return (*found, _figure2(), _figure3(known), _clip_labels(known))


def single_numbers(tables: Iterable[PaperTable]) -> dict[Place, float]:
    """Returns the printed numbers that are of one place; the first table that has one counts."""
    found: dict[Place, float] = {}
    for cell in (cell for table in tables for row in table.rows for cell in row.cells):
        if len(cell.terms) == 1 and cell.printed is not None:
            found.setdefault(cell.terms[0][1], cell.printed)
    return found
