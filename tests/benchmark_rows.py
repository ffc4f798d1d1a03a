"""A row of each benchmark as its original has it, what it asks, and files of such rows."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from kdscale.eval.benchmarks import BENCHMARKS
from kdscale.eval.prompts import LETTER, NUMBER, ONLY_LETTER, REASONING, SHORT, WORD
from kdscale.mini.benchmark_schemas import SCHEMAS


def encoded(colour: str | tuple[int, ...] = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(buffer, "PNG")
    return buffer.getvalue()


RED = encoded()
PICTURE = {"bytes": RED, "path": "a.png"}
# A row as the original has it, and what is to be asked: prompt, gold, options.
WORKED: dict[str, tuple[dict[str, Any], str, Any, tuple[str, ...]]] = {
    "mme_p": (
        {
            "question_id": "color/1.png",
            "image": PICTURE,
            "question": "Is there a red coat? Please answer yes or no.",
            "answer": "Yes",
            "category": "color",
        },
        f"Is there a red coat? Please answer yes or no.\n{WORD}",
        "Yes",
        (),
    ),
    "mmbench": (
        {
            "index": 2_000_241,
            "question": "Which is warm?",
            "hint": "Think.",
            "answer": "B",
            "A": "ice",
            "B": "tea",
            "C": "nan",
            "D": "nan",
            "image": PICTURE,
            "source": "web",
            "category": "sense",
        },
        f"Think.\nWhich is warm? Options:\nA. ice\nB. tea\n{LETTER}",
        "B",
        ("ice", "tea"),
    ),
    "seedbench": (
        {
            "answer": "D",
            "choice_a": "one",
            "choice_b": "two",
            "choice_c": "three",
            "choice_d": "four",
            "question": "How many?",
            "question_type_id": 5,
            "image": [PICTURE],
        },
        f"How many? Options:\nA. one\nB. two\nC. three\nD. four\n{LETTER}",
        "D",
        ("one", "two", "three", "four"),
    ),
    "gqa": (
        {"id": "1", "imageId": "n1", "question": "Is it red?", "answer": "yes"},
        f"Is it red?\n{WORD}",
        "yes",
        (),
    ),
    "scienceqa": (
        {
            "image": None,
            "question": "Which is older?",
            "choices": ["coal", "wood", "tin"],
            "answer": 2,
            "hint": "Look.",
            "grade": "grade3",
        },
        f"Look. Which is older?\nA. coal\nB. wood\nC. tin\n{ONLY_LETTER}",
        "C",
        ("coal", "wood", "tin"),
    ),
    "mmmu": (
        {
            "id": "validation_Art_Theory_12",
            "question": "<image 1> Who painted it?",
            "options": "['Goya', \"O'Keeffe\", '<image 2>']",
            "image_1": PICTURE,
            "image_2": PICTURE,
            "answer": "A",
            "question_type": "multiple-choice",
        },
        f" Who painted it? Options:\nA. Goya\nB. O'Keeffe\nC. \n{LETTER}",
        "A",
        ("Goya", "O'Keeffe", "<image 2>"),
    ),
    "mathvista": (
        {
            "query": "Hint: Choose.\nQuestion: Which?\nChoices:\n(A) 3\n(B) 4",
            "decoded_image": PICTURE,
            "choices": ["3", "4"],
            "answer": "4",
            "question_type": "multi_choice",
            "metadata": {"category": "general-vqa"},
        },
        f"Hint: Choose.\nQuestion: Which?\nChoices:\n(A) 3\n(B) 4\n{REASONING}",
        "4",
        ("3", "4"),
    ),
    "ai2d": (
        {"question": "What eats X?", "options": ["fox", "owl"], "answer": "1", "image": PICTURE},
        f"What eats X?\nA. fox\nB. owl\n{LETTER}",
        "B",
        ("fox", "owl"),
    ),
    "chartqa": (
        {"type": "human_test", "question": "Sum?", "answer": "12.5", "image": PICTURE},
        f"Sum?\n{NUMBER}",
        "12.5",
        (),
    ),
    "ocrbench": (
        {
            "dataset": "IIIT5K",
            "question": "what is written in the image?",
            "question_type": "Regular Text Recognition",
            "answer": ["CENTRE", "CENTER"],
            "image": PICTURE,
        },
        f"what is written in the image?\n{SHORT}",
        ("CENTRE", "CENTER"),
        (),
    ),
    "textvqa": (
        {
            "question": "what brand?",
            "image": PICTURE,
            "answers": ["nokia"] * 9 + ["Nokia"],
            "ocr_tokens": ["NOKIA", "3310"],
        },
        f"what brand?\nReference OCR tokens: NOKIA, 3310\n{WORD}",
        ("nokia",) * 9 + ("Nokia",),
        (),
    ),
    "docvqa": (
        {
            "questionId": "7",
            "question": "What is the date?",
            "question_types": ["form", "layout"],
            "image": PICTURE,
            "answers": ["1/8/93", "Jan 8"],
        },
        f"What is the date?\n{SHORT}",
        ("1/8/93", "Jan 8"),
        (),
    ),
    "mmvp": (
        {
            "lndex": 99,
            "Question": "Are the tusks long?",
            "Options": "(a) Long tusks (b) Short tusks",
            "Correct Answer": "(a)",
        },
        f"Are the tusks long? Options:\nA. Long tusks\nB. Short tusks\n{LETTER}",
        "A",
        ("Long tusks", "Short tusks"),
    ),
    "realworldqa": (
        {
            "image": PICTURE,
            "question": "Which way?\n\nA. Left\nB. Right\nAnswer with the letter.",
            "answer": "B",
        },
        "Which way?\n\nA. Left\nB. Right\nAnswer with the letter.",
        "B",
        ("Left", "Right"),
    ),
    "cvbench_2d": (
        {
            "prompt": "How many? Select from the following choices.\n(A) 0\n(B) 1",
            "choices": ["0", "1"],
            "answer": "(B)",
            "image": PICTURE,
            "source": "COCO",
            "task": "Count",
        },
        f"How many? Select from the following choices.\n(A) 0\n(B) 1\n{LETTER}",
        "B",
        ("0", "1"),
    ),
}
WORKED["cvbench_3d"] = WORKED["cvbench_2d"]


def write(root: Path, name: str, changes: dict[str, Any] | None = None, copies: int = 1) -> Path:
    """Writes the worked row, changed, as the file of a benchmark."""
    folder, row = root / name, WORKED[name][0] | (changes or {})
    size = BENCHMARKS[name].group_size or 1
    file = folder / BENCHMARKS[name].files.replace("*", "00000-of-00001")
    file.parent.mkdir(parents=True, exist_ok=True)
    if name == "mmvp":
        rows = [row | {"lndex": row["lndex"] + i} for i in range(size * copies)]
        (folder / "MMVP Images").mkdir()
        for each in rows:
            (folder / "MMVP Images" / f"{each['lndex']}.jpg").write_bytes(RED)
        with file.open("w", newline="") as lines:
            writer = csv.DictWriter(lines, list(row))
            writer.writeheader()
            writer.writerows(rows)
        return root
    schema = SCHEMAS["cvbench" if "cvbench" in name else name]
    pq.write_table(pa.Table.from_pylist([row] * size * copies, schema=schema), file)
    if name == "gqa":
        images = folder / "testdev_balanced_images" / "testdev-00000-of-00001.parquet"
        images.parent.mkdir()
        table = pa.Table.from_pylist([{"id": "n1", "image": PICTURE}], SCHEMAS["gqa_images"])
        pq.write_table(table, images)
    return root
