"""Exports: other programs open them and get the original's numbers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from vlm_parts import CHAT, language, tower

from kdscale.core.catalog_mini import MINI_STUDENTS
from kdscale.core.config import TowerSpec
from kdscale.core.storage import Storage
from kdscale.core.types import ExportMismatch, FolderTaken, WeightsError
from kdscale.core.vlm_config import Finetune
from kdscale.models import export, vlm
from kdscale.models.export import export_hf, export_open_clip
from kdscale.models.hf_towers import vision_model
from kdscale.models.language import load_language
from kdscale.models.towers import build_clip, save_clip

transformers.utils.logging.disable_progress_bar()


def save_model(spec: TowerSpec, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Writes a small random model as a stage would."""
    llm = language("smollm_360m", folder)
    recipe = Finetune(vision=spec, llm=llm, data="llava_mix_665k")
    body, tokenizer = load_language(llm, dtype=dtype)
    vision = vision_model(build_clip(spec), spec)
    model, processor = vlm.build_vlm(vision, body, tokenizer, recipe, spec, chat_template=CHAT)
    vlm.save_vlm(model, processor, folder / "model")
    return folder / "model"


@pytest.mark.slow
def test_stock_model_opens_without_kdscale(tmp_path: Path) -> None:
    source = save_model(tower("vit_t16"), tmp_path, torch.bfloat16)
    report = export_hf(source, tmp_path / "out")
    assert report.library == "transformers"
    assert report.extra_import is None
    assert report.max_difference <= 1e-6
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}
    assert "kdscale.models" not in (tmp_path / "out" / "README.md").read_text()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").padding_side == "left"
    with pytest.raises(FolderTaken):
        export_hf(source, tmp_path / "out")


@pytest.mark.slow
def test_an_export_that_answers_batches_otherwise_is_an_error(tmp_path: Path) -> None:
    source, image = save_model(tower("vit_t16"), tmp_path), tmp_path / "probe.png"
    Image.fromarray(export._probe_image()).save(image)
    ours = export._answer(*vlm.load_vlm(source), image)
    for side in ("left", "right"):
        AutoTokenizer.from_pretrained(source, padding_side=side).save_pretrained(source)
        theirs = export._read_elsewhere(source, image, None, tmp_path / "read")
        if side == "left":
            export._compare(source, ours, theirs)
            continue
        with pytest.raises(ExportMismatch, match="asked in one batch"):
            export._compare(source, ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilevit_s", "convnext_t"])
def test_hierarchical_model_opens_with_one_import(name: str, tmp_path: Path) -> None:
    source = save_model(MINI_STUDENTS[name], tmp_path)
    report = export_hf(source, tmp_path / "out")
    assert report.extra_import == "kdscale.models.token_timm"
    assert report.max_difference <= 1e-6
    assert report.extra_import in (tmp_path / "out" / "README.md").read_text()
    code = (
        "from transformers import AutoConfig; AutoConfig.from_pretrained(__import__('sys').argv[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True
    )
    assert "token_timm" in done.stderr  # without the import


def test_changed_answers_are_an_error() -> None:
    right = {
        "logits": torch.randn(1, 5, 7),
        "answer": torch.arange(4)[None],
        "next": torch.randn(2, 7),
    }
    target = Path("somewhere")
    assert export._compare(target, right, dict(right))[0] == 0
    for wrong in (
        {"logits": right["logits"] + 0.01},
        {"logits": right["logits"][:, 1:]},
        {"logits": right["logits"] * float("nan")},
        {"answer": right["answer"] + 1},
        {"next": right["next"].flip(0)},
    ):
        with pytest.raises(ExportMismatch):
            export._compare(target, right, right | wrong)


def test_unreadable_export_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    """open_clip builds a Swin for 224 px alone."""
    spec = mini_text(tower("swin_t"))
    with pytest.raises(ExportMismatch, match="relative_position_bias_table"):
        export_open_clip(spec, Storage(str(tmp_path / "store")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_sources_are_refused(tmp_path: Path) -> None:
    source = save_model(tower("vit_t16"), tmp_path)
    state = load_file(source / "model.safetensors")
    state.pop("model.multi_modal_projector.linear_1.bias", None)
    state.pop("multi_modal_projector.linear_1.bias", None)
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match="linear_1"):
        export_hf(source, tmp_path / "out")
    with pytest.raises(WeightsError, match="no vision-language model"):
        export_hf(tmp_path, tmp_path / "other")


def mini_text(spec: TowerSpec) -> TowerSpec:
    """Gives a pair the miniature vocabulary."""
    config: Any = dict(spec.clip_config)  # type: ignore[arg-type]
    config["text_cfg"] = config["text_cfg"] | {"context_length": 24, "vocab_size": 730}
    return spec.replace(clip_config=config, tokenizer="mini_bpe", context_length=24)


@pytest.mark.parametrize("name", ["vit_t16", "convnext_t", "siglip_so400m"])
def test_pair_opens_in_open_clip(name: str, tmp_path: Path) -> None:
    spec = mini_text(tower(name))
    storage = Storage(str(tmp_path / "store"))
    report = export_open_clip(spec, storage, tmp_path / "out")
    assert report.max_difference <= 1e-5
    assert report.own_tokenizer
    with pytest.raises(FolderTaken):
        export_open_clip(spec, storage, tmp_path / "out")


def test_pair_keeps_a_public_tokenizer(tmp_path: Path) -> None:
    spec = mini_text(tower("vit_t16"))
    config: Any = dict(spec.clip_config)  # type: ignore[arg-type]
    config["text_cfg"] = config["text_cfg"] | {"context_length": 77, "vocab_size": 49408}
    spec = spec.replace(clip_config=config, tokenizer="clip_bpe", context_length=77)
    save_clip(build_clip(spec, seed=4), spec, tmp_path / "weights")
    trained = spec.replace(weights=str(tmp_path / "weights"))
    report = export_open_clip(trained, Storage(str(tmp_path / "store")), tmp_path / "out")
    assert not report.own_tokenizer
    assert report.max_difference <= 1e-5
    assert "get_tokenizer" in (tmp_path / "out" / "README.md").read_text()
