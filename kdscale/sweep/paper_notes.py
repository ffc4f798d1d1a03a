"""What is known to be wrong or odd in the numbers that the paper prints, each with its source.

A note is attached to a table, to rows, to a column or to single cells: whatever its fields name.
Sections and appendices are those of arXiv 2511.17886.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kdscale.sweep.paper_tables import PaperCell, PaperRow, PaperTable


@dataclass(frozen=True, kw_only=True)
class Note:
    """A remark on printed numbers.

    Attributes:
        tables: Which it is about.
        source: Where it can be checked.
        rows: Labels that a row must all have; none where it is about every row.
        columns: Heads of its columns; none where it is about no single number.
        value: The printed number, where it is about that alone.
    """

    tables: tuple[str, ...]
    text: str
    source: str
    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    value: float | None = None

    def is_on(self, row: PaperRow, column: str, cell: PaperCell) -> bool:
        """Tells whether it marks a cell."""
        here = column in self.columns and set(self.rows) <= set(row.labels)
        return here and self.value in (None, cell.printed)


VLM_TABLES = ("table1", "table2")
NOTES: tuple[Note, ...] = (
    Note(
        tables=("table3",),
        rows=("ImageNet",),
        columns=("CLIP-ViT-B score", "CLIP-ViT-L score", "difference score"),
        text="Not ImageNet: 30.95 and 30.29 are the multimodal averages. ImageNet is 36.56 and "
        "34.55, difference -2.01",
        source="table 2, CLIP-ViT-B and CLIP-ViT-L",
    ),
    Note(
        tables=("table3",),
        rows=("MMVP",),
        columns=("CLIP-ViT-B score", "CLIP-ViT-L score", "difference score"),
        text="5 and 3 right pairs of 150: the difference is two pairs",
        source="table 2; MMVP has 150 pairs",
    ),
    Note(
        tables=("table3",),
        text="The benchmarks are selected: from CLIP-ViT-B to CLIP-ViT-L 11 of 16 fall, and AI2D, "
        "ChartQA, TextVQA, RealWorldQA and CV-Bench 3D rise",
        source="table 2",
    ),
    Note(
        tables=("table3",),
        text="Kernel, estimator, pooling and number of images are not stated. The biased estimate "
        "of independent features of these widths is about 0.5 on 300 images",
        source="table 3; docs/cka.md",
    ),
    Note(
        tables=("figure2",),
        rows=("CLIP-ViT-L",),
        columns=("Gap",),
        text="The text says 6.64; the tables give 36.94 - 30.29 = 6.65",
        source="text on figure 2, tables 1 and 2",
    ),
    Note(
        tables=("figure2",),
        columns=("Student",),
        text="The student's score hardly changes: the widening gap is the teacher's score minus "
        "a near-constant",
        source="tables 1 and 2",
    ),
    Note(
        tables=("figure3",),
        rows=("32",),
        columns=("ImageNet",),
        text="The text reads 26 to 30 % at 32 epochs and more than 40 % at 96, against 34.55 and "
        "37.55 in table 2: probably one schedule of 96 epochs, read on its way",
        source="section 6.1, table 2",
    ),
    Note(
        tables=("figure3",),
        columns=("MMVP",),
        text="Relative MMVP is plotted from 0.36 to 1.12, but the teachers have 8 and 5 right "
        "pairs, so that values are eighths or fifths: one step is one pair",
        source="figure 3d, table 1",
    ),
    Note(
        tables=("table5",),
        rows=("DFN-ViT-B", "CC12M + TinyLLaVA Pretrain"),
        columns=("Multimodal",),
        text="The text says 31.01",
        source="section 6.3",
    ),
    Note(
        tables=("table5",),
        columns=("ImageNet",),
        value=35.72,
        text="35.72 stands twice: one is likely a copy",
        source="table 5",
    ),
    Note(
        tables=("table4",),
        rows=("DFN-ViT-L", "MSE"),
        columns=("Multimodal",),
        text="Equal to table 5's CC12M + TinyLLaVA Pretrain of the same teacher: likely a copy",
        source="tables 4 and 5",
    ),
    Note(
        tables=("table4",),
        rows=("DFN-ViT-B", "MSE"),
        columns=("Multimodal",),
        text="Equal to table 5's CC12M + TinyLLaVA Pretrain of the same teacher: likely a copy",
        source="tables 4 and 5",
    ),
    Note(
        tables=("table5",),
        rows=("CC12M + TinyLLaVA Pretrain",),
        columns=("Multimodal",),
        text="Equal to table 4's MSE on CC12M of the same teacher: likely a copy",
        source="tables 4 and 5",
    ),
    Note(
        tables=("table4",),
        rows=("SigLIP-so400m", "CLIP-KD"),
        columns=("Multimodal", "ImageNet"),
        text="Said to be the best loss everywhere: MSE is higher in the first column, ICL in the "
        "second, KL in both",
        source="section 6.2, table 4",
    ),
    Note(
        tables=("table4",),
        rows=("DFN-ViT-B", "CLIP-KD"),
        columns=("Multimodal",),
        text="Said to be the best loss everywhere: MSE, ICL and KL are higher",
        source="section 6.2, table 4",
    ),
    Note(
        tables=("table4",),
        rows=("KL",),
        columns=("Multimodal", "ImageNet"),
        text="KL is not defined and has no weight in table 6. Read as CLIP-KD's CKD: KL at "
        "temperature 1 between rows of similarities in the batch",
        source="section 6.2, table 6",
    ),
    Note(
        tables=("table2", "table4", "table5"),
        text="'The same hyperparameters as CLIP-KD' contradicts table 6: learning rate 5e-4, batch "
        "256, 2,000 warm-up steps against 1e-3, 8 x 128, 10,000. 256 may be per GPU",
        source="section 5.1, table 6",
    ),
    Note(
        tables=(*VLM_TABLES, "table3", "table4", "figure2", "clip_labels"),
        text="The list of models swaps ids: CLIP-ViT-L is given as clip-vit-base-patch16 and "
        "CLIP-ViT-B as clip-vit-large-patch14. If the code did so, too, both labels change places",
        source="appendix 8.1",
    ),
    Note(
        tables=("table1",),
        rows=("CLIP-KD-ViT-T",),
        columns=("Average",),
        text="Said to be the released ViT-T from CLIP-ViT-B on CC12M: the released ones are of "
        "CC3M + CC12M, from teachers trained on that or on LAION-400M",
        source="table 1's caption; CLIP-KD's README",
    ),
    Note(
        tables=("table1",),
        rows=("Bunny",),
        columns=("MMBench",),
        text="Almost certainly MME's accuracy: all 12 values are shares of MME's 2,374 questions, "
        "only 7 of MMBench's 4,377 rows, and they follow MME-P (correlation 0.993)",
        source="the digits of table 1",
    ),
    Note(
        tables=("table1",),
        rows=("Bunny",),
        columns=("Average",),
        text="Holds the column MMBench that is not MMBench: never compare it with TinyLLaVA's",
        source="the digits of table 1",
    ),
    Note(
        tables=("table1",),
        text="Bunny's template is Plain in both stages; its released code fine-tunes with its own, "
        "which would explain OCRBench below 5 and AI2D below chance",
        source="tables 9 and 10; Bunny's repository",
    ),
    Note(
        tables=("table1",),
        rows=("TinyLLaVA", "SmolLM-360M", "SigLIP-so400m"),
        columns=("Average",),
        text="Said to fall with the encoder's size as expected: the largest encoder is the second "
        "lowest of six",
        source="section 4, table 1",
    ),
    Note(
        tables=("table1",),
        text="303.5 M is the size of ViT-L/14 at 336 pixels; at 224 it is 303.2 M",
        source="parameters of the published weights",
    ),
    Note(
        tables=("table2",),
        rows=("TinyLLaVA", "Qwen2-0.5B", "ViT-T"),
        columns=("Average",),
        text="'Fails to improve in four of five cases' cannot be derived: by the teacher's own "
        "average the student rises 30.45, 30.95, 31.34 and then falls to 30.29 and 30.41",
        source="section 5.1, tables 1 and 2",
    ),
    Note(
        tables=VLM_TABLES,
        rows=("TinyLLaVA",),
        columns=("MMBench",),
        text="Accuracy per row (4,377), not of whole rotations",
        source="the digits of tables 1 and 2",
    ),
    Note(
        tables=VLM_TABLES,
        columns=("CV-Bench 3D",),
        value=50.25,
        text="603 of 1,200, printed in 15 of 46 rows: the level of one and the same answer to all "
        "questions",
        source="tables 1 and 2",
    ),
    Note(
        tables=VLM_TABLES,
        text="ScienceQA is of all 4,241 questions, with and without image; CV-Bench is pooled over "
        "its sources; one step of MMVP is one pair of 150, 0.67 points",
        source="the digits of tables 1 and 2",
    ),
    Note(
        tables=("table2", "table4", "table5"),
        text="One training seed. The error of an average over the choice of questions is 0.3, that "
        "of a difference 0.4: many differences between teachers are smaller",
        source="binomial errors at the benchmarks' sizes",
    ),
    Note(
        tables=("clip_labels",),
        text="Ours go by architecture, and speak of the printed labels only where the teachers are "
        "OpenAI's own: at small scales other models bear these names",
        source="docs/claims.md",
    ),
)


@dataclass(frozen=True)
class Marks:
    """The notes of a table, numbered as they are printed below it."""

    notes: tuple[Note, ...]

    @classmethod
    def of(cls, table: PaperTable, columns: Sequence[str], own: Sequence[Note] = ()) -> Marks:
        """Returns the notes of a table of which some columns are shown; those on cells first.

        Args:
            table: The table.
            columns: Those shown.
            own: Notes on our numbers.
        """
        found = [note for note in (*NOTES, *own) if table.name in note.tables]
        shown = [note for note in found if not note.columns or set(note.columns) & set(columns)]
        return cls(tuple(sorted(shown, key=lambda note: not note.columns)))

    def on(self, row: PaperRow, column: str, cell: PaperCell) -> list[int]:
        """Returns the numbers of a cell's notes."""
        return [i for i, note in enumerate(self.notes, 1) if note.is_on(row, column, cell)]

    def lines(self) -> list[str]:
        """Returns the notes as they are printed."""
        return [
            f"({i}) {note.text} ({note.source})." if note.columns
            else f"{note.text} ({note.source})."
            for i, note in enumerate(self.notes, 1)
        ]  # fmt: skip
