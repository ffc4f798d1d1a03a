"""Files of others that would execute something: every reader refuses, nothing is executed."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vlm_parts import language
from worlds import small_job, vit

from kdscale.core.checkpoints import Checkpoints
from kdscale.core.types import CheckpointError, WeightsError
from kdscale.models.language import load_language
from kdscale.models.towers import build_clip, save_clip
from kdscale.models.vlm import load_vlm
from kdscale.stages import cka, gate_run
from kdscale.stages.distill import DistillTask
from kdscale.stages.loop import World


class Payload:
    """What a file must not be able to bring along: unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """Where a payload leaves its mark; that it can is seen first."""
    mark = tmp_path / "executed"
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.exists()
    mark.unlink()
    return mark


def poisoned(mark: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"state_dict": Payload(mark), "step": Payload(mark)}, buffer)
    return buffer.getvalue()


def arrays(mark: Path, name: str) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **{name: np.array([Payload(mark)], dtype=object)})
    return buffer.getvalue()


def read_file(mark: Path, folder: Path) -> None:
    (folder / "vit.pt").write_bytes(poisoned(mark))
    build_clip(vit().replace(weights=str(folder / "vit.pt")))


def read_hub_folder(mark: Path, folder: Path) -> None:
    save_clip(build_clip(vit()), vit(), folder / "hub")
    (folder / "hub" / "open_clip_model.safetensors").unlink()
    (folder / "hub" / "open_clip_pytorch_model.bin").write_bytes(poisoned(mark))
    build_clip(vit().replace(weights=str(folder / "hub")))


def read_language_model(mark: Path, folder: Path) -> None:
    spec = language("qwen2_0_5b", folder)
    model, _ = load_language(spec)
    model.save_pretrained(folder / "hub")
    (folder / "hub" / "model.safetensors").unlink()
    (folder / "hub" / "pytorch_model.bin").write_bytes(poisoned(mark))
    load_language(spec.replace(weights=str(folder / "hub"), config=None))


def read_vlm(mark: Path, folder: Path) -> None:
    body = dict.fromkeys(("hidden_size", "intermediate_size", "projection_dim"), 16)
    body |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"model_type": "llama", "vocab_size": 64, **body}
    vision = {"model_type": "clip_vision_model", "image_size": 32, "patch_size": 16, **body}
    config = {"model_type": "llava", "text_config": text, "vision_config": vision}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "pytorch_model.bin").write_bytes(poisoned(mark))
    load_vlm(folder)


def read_code_of_a_model(mark: Path, folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "a.B"}}')
    (folder / "a.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\nB = 1\n")
    load_vlm(folder)


def read_checkpoint(mark: Path, folder: Path) -> None:
    job = small_job(str(folder))
    checkpoints = Checkpoints(job.stage, 2)
    try:
        DistillTask(job, World()).load_state(poisoned(mark))
    except pickle.UnpicklingError as error:
        raise checkpoints.damaged(2, error) from error


READERS = [
    (read_file, WeightsError),
    (read_hub_folder, WeightsError),
    (read_language_model, WeightsError),
    (read_vlm, WeightsError),
    (read_code_of_a_model, WeightsError),
    (read_checkpoint, CheckpointError),
    (lambda mark, _: cka._unpacked(arrays(mark, "a/b")), ValueError),
    (lambda mark, _: gate_run.unpacked(arrays(mark, "keys")), ValueError),
]


@pytest.mark.parametrize(("read", "error"), READERS)
def test_a_malicious_pickle_is_refused_and_not_executed(
    read: Callable[[Path, Path], Any], error: type[Exception], mark: Path, tmp_path: Path
) -> None:
    with pytest.raises(error):
        read(mark, tmp_path)
    assert not mark.exists()
