"""Tiny CLIP pairs and drawn image sets in every format, for the zero-shot suite."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from conftest import jpeg

from kdscale.core.config import TowerSpec
from kdscale.models.towers import build_clip
from kdscale.stages.evaluate import Tower

PX = 32


def tiny(**fields: Any) -> TowerSpec:
    """Returns a pair with CLIP's vocabulary that embeds in a millisecond."""
    config = {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": PX,
            "layers": 1,
            "width": 32,
            "head_width": 16,
            "patch_size": 8,
        },
        "text_cfg": {
            "context_length": 16,
            "vocab_size": 49408,
            "width": 16,
            "heads": 1,
            "layers": 1,
        },
    }
    defaults: dict[str, Any] = {
        "name": "tiny",
        "clip_config": config,
        "image_px": PX,
        "context_length": 16,
        "embed_dim": 16,
        "width": 32,
        "patch_px": 8,
    }
    return TowerSpec(**(defaults | fields))


def tower(spec: TowerSpec | None = None) -> Tower:
    """Builds a pair in evaluation mode."""
    spec = spec or tiny()
    return Tower(build_clip(spec, seed=3).eval(), spec)


def write_folders(root: Path, names: Sequence[str]) -> Path:
    """Writes one picture, numbered by place, into a folder of each name."""
    for place, name in enumerate(names):
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"picture{place}.JPEG").write_bytes(jpeg(place))
    return root


def write_parquet(path: Path, images: Sequence[bytes], **columns: Sequence[Any]) -> Path:
    """Writes images as hubs do: a struct of bytes and path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    structs = [{"bytes": image, "path": None} for image in images]
    pq.write_table(pa.table({"image": structs, **columns}), path)
    return path


def karpathy(rows: Sequence[tuple[str, Sequence[str]]], split: str = "test") -> str:
    """Writes captions as Karpathy's splits have them."""
    images = [
        {
            "filepath": "val2014",
            "filename": name,
            "split": split,
            "sentences": [{"raw": text} for text in texts],
        }
        for name, texts in rows
    ]
    return json.dumps({"dataset": "coco", "images": images})
