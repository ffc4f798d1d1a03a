"""Columns of the benchmarks' original files, as Parquet types them."""

from __future__ import annotations

import pyarrow as pa

TEXT, WHOLE, TEXTS = pa.string(), pa.int64(), pa.list_(pa.string())
IMAGE = pa.struct({"bytes": pa.binary(), "path": TEXT})

SCHEMAS: dict[str, pa.Schema] = {
    "mme_p": pa.schema(
        {
            "question_id": TEXT,
            "image": IMAGE,
            "question": TEXT,
            "answer": TEXT,
            "category": TEXT,
        }
    ),
    "mmbench": pa.schema(
        {
            "index": WHOLE,
            "question": TEXT,
            "hint": TEXT,
            "answer": TEXT,
            "A": TEXT,
            "B": TEXT,
            "C": TEXT,
            "D": TEXT,
            "category": TEXT,
            "image": IMAGE,
            "source": TEXT,
            "l2-category": TEXT,
            "comment": TEXT,
            "split": TEXT,
        }
    ),
    "seedbench": pa.schema(
        {
            "answer": TEXT,
            "choice_a": TEXT,
            "choice_b": TEXT,
            "choice_c": TEXT,
            "choice_d": TEXT,
            "data_id": TEXT,
            "data_type": TEXT,
            "question": TEXT,
            "question_id": TEXT,
            "question_type_id": pa.int16(),
            "image": pa.list_(IMAGE),
            "segment": pa.list_(WHOLE),
        }
    ),
    "gqa": pa.schema(
        {
            "id": TEXT,
            "imageId": TEXT,
            "question": TEXT,
            "answer": TEXT,
            "fullAnswer": TEXT,
            "isBalanced": pa.bool_(),
            "types": pa.struct({"structural": TEXT, "semantic": TEXT, "detailed": TEXT}),
        }
    ),
    "gqa_images": pa.schema({"id": TEXT, "image": IMAGE}),
    "scienceqa": pa.schema(
        {
            "image": IMAGE,
            "question": TEXT,
            "choices": TEXTS,
            "answer": pa.int8(),
            "hint": TEXT,
            "task": TEXT,
            "grade": TEXT,
            "subject": TEXT,
            "topic": TEXT,
            "category": TEXT,
            "skill": TEXT,
            "lecture": TEXT,
            "solution": TEXT,
        }
    ),
    "mmmu": pa.schema(
        {
            "id": TEXT,
            "question": TEXT,
            "options": TEXT,
            "explanation": TEXT,
            **{f"image_{number}": IMAGE for number in range(1, 8)},
            "img_type": TEXT,
            "answer": TEXT,
            "topic_difficulty": TEXT,
            "question_type": TEXT,
            "subfield": TEXT,
        }
    ),
    "mathvista": pa.schema(
        {
            "pid": TEXT,
            "question": TEXT,
            "image": TEXT,
            "decoded_image": IMAGE,
            "choices": TEXTS,
            "unit": TEXT,
            "precision": pa.float64(),
            "answer": TEXT,
            "question_type": TEXT,
            "answer_type": TEXT,
            "metadata": pa.struct({"category": TEXT, "context": TEXT, "task": TEXT}),
            "query": TEXT,
        }
    ),
    "ai2d": pa.schema({"question": TEXT, "options": TEXTS, "answer": TEXT, "image": IMAGE}),
    "chartqa": pa.schema({"type": TEXT, "question": TEXT, "answer": TEXT, "image": IMAGE}),
    "ocrbench": pa.schema(
        {
            "dataset": TEXT,
            "question": TEXT,
            "question_type": TEXT,
            "answer": TEXTS,
            "image": IMAGE,
        }
    ),
    "textvqa": pa.schema(
        {
            "image_id": TEXT,
            "question_id": pa.int32(),
            "question": TEXT,
            "question_tokens": TEXTS,
            "image": IMAGE,
            "image_width": pa.int32(),
            "image_height": pa.int32(),
            "answers": TEXTS,
            "image_classes": TEXTS,
            "set_name": TEXT,
            "ocr_tokens": TEXTS,
        }
    ),
    "docvqa": pa.schema(
        {
            "questionId": TEXT,
            "question": TEXT,
            "question_types": TEXTS,
            "image": IMAGE,
            "docId": WHOLE,
            "ucsf_document_id": TEXT,
            "ucsf_document_page_no": TEXT,
            "answers": TEXTS,
            "data_split": TEXT,
        }
    ),
    "realworldqa": pa.schema(
        {
            "image": IMAGE,
            "image_path": TEXT,
            "question": TEXT,
            "answer": TEXT,
        }
    ),
    "cvbench": pa.schema(
        {
            "idx": WHOLE,
            "type": TEXT,
            "task": TEXT,
            "image": IMAGE,
            "question": TEXT,
            "choices": TEXTS,
            "answer": TEXT,
            "prompt": TEXT,
            "filename": TEXT,
            "source": TEXT,
            "source_dataset": TEXT,
            "source_filename": TEXT,
            "target_class": TEXT,
            "target_size": TEXT,
            "bbox": pa.list_(pa.list_(pa.float64())),
        }
    ),
}
