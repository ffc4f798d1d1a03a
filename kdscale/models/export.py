"""Models as directories that other programs open, each proven by opening it.

A vision-language model goes out in transformers' layout and is read back by a process of its own
that knows transformers alone; a CLIP pair goes out in open_clip's layout and is read back by
open_clip. Both must give the original's logits.

Shape suffixes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from kdscale.core.config import TowerSpec
from kdscale.core.storage import Storage
from kdscale.core.types import ExportMismatch, FolderTaken
from kdscale.models.preprocess import eval_crop, normalise, tokenizer
from kdscale.models.token_timm import TokenTimmConfig
from kdscale.models.towers import load_tower, save_clip
from kdscale.models.vlm import load_vlm, save_vlm

TOLERANCE = 1e-4
NEW_TOKENS = 8
QUESTIONS = ("What is in the picture?", "What is in the picture? Answer with a single word.")
EXTRA_IMPORT = "kdscale.models.token_timm"
PROBE_TEXTS = ("a red circle left of a blue square", "two dogs", "")

# Runs where kdscale cannot be imported, unless its one module is what the directory needs.
READER = """
import importlib, sys
directory, image, extra, new_tokens, out, threads, *questions = sys.argv[1:]
if extra:
    importlib.import_module(extra)
else:
    sys.modules["kdscale"] = None
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor
torch.set_num_threads(int(threads))
model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()
processor = AutoProcessor.from_pretrained(directory, backend="pil")
def prompt(question):
    parts = [{"type": "image"}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": parts}]
    return processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(images=Image.open(image), text=prompt(questions[0]), return_tensors="pt")
images, prompts = [Image.open(image) for _ in questions], [prompt(q) for q in questions]
both = processor(images=images, text=prompts, padding=True, return_tensors="pt")
first = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}
with torch.no_grad():
    found = {
        "logits": model(**inputs).logits,
        "answer": model.generate(**inputs, max_new_tokens=int(new_tokens), do_sample=False),
        "next": model.generate(**both, do_sample=False, **first).logits[0],
    }
save_file({name: value.contiguous() for name, value in found.items()}, out)
"""

CARD = """---
library_name: {library}
---

{text}
"""


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What was written and how it compared.

    Attributes:
        directory: Where the model is.
        library: `transformers` or `open_clip`.
        extra_import: Module that must be imported before the directory is opened, None for none.
        own_tokenizer: Whether texts must be tokenised by kdscale, for want of a public format.
        max_difference: Largest absolute difference of the logits.
        tolerance: Largest that would have been let pass.
        code: How Python opens the directory.
    """

    directory: str
    library: str
    extra_import: str | None = None
    own_tokenizer: bool = False
    max_difference: float
    tolerance: float
    code: str


def export_hf(source_dir: str | Path, target_dir: str | Path) -> ExportReport:
    """Writes a vision-language model for plain transformers and compares answers.

    Args:
        source_dir: A directory that `kdscale.models.vlm.save_vlm` wrote.
        target_dir: Created; must be empty. Nothing stays in it where the comparison fails.

    Returns:
        What was compared. The stored precision is kept; both sides computed in fp32.

    Raises:
        ExportMismatch: Another process cannot open it, or computes something else.
        FolderTaken: The target holds something.
        WeightsError: The source is no such model.
    """
    with _new(target_dir) as target, tempfile.TemporaryDirectory() as scratch:
        model, processor = load_vlm(source_dir, dtype="auto")
        # On the right, padding would part a batch's shorter prompts from their answers. The side
        # is saved only where the tokenizer was made with it.
        processor.tokenizer = AutoTokenizer.from_pretrained(
            source_dir, padding_side="left", trust_remote_code=False
        )
        stock = not isinstance(model.config.vision_config, TokenTimmConfig)
        extra = None if stock else EXTRA_IMPORT
        save_vlm(model, processor, target)
        _write_card(target, "transformers", _hf_card(extra))
        image = Path(scratch) / "probe.png"
        Image.fromarray(_probe_image()).save(image)
        theirs = _read_elsewhere(target, image, extra, Path(scratch) / "read.safetensors")
        difference, tolerance = _compare(target, _answer(model.float(), processor, image), theirs)
    return ExportReport(
        directory=str(target),
        library="transformers",
        extra_import=extra,
        max_difference=difference,
        tolerance=tolerance,
        code=hf_code(extra, str(target)),
    )


def export_open_clip(spec: TowerSpec, storage: Storage, target_dir: str | Path) -> ExportReport:
    """Writes a CLIP pair for open_clip and compares logits of images and texts.

    Args:
        spec: The pair; its weights may be a stage's.
        storage: Where stages keep their outputs.
        target_dir: Created; must be empty. Nothing stays in it where the comparison fails.

    Raises:
        ExportMismatch: open_clip cannot open it (it builds a Swin at the trunk's own image size
            only), or prepares or computes something else.
        FolderTaken: The target holds something.
    """
    clip: Any = load_tower(spec, storage).eval()
    public = _has_public_tokenizer(spec)
    with _new(target_dir) as target:
        save_clip(clip, spec, target)
        _write_card(target, "open_clip", _open_clip_card(public))
        theirs, pixels_BCHW = _open_pair(target)
        token_ids = tokenizer(spec)(PROBE_TEXTS)
        if public:
            _compare_tokens(target, token_ids)
        crop = torch.from_numpy(eval_crop(_probe_image(), spec).copy())[None]
        with torch.no_grad():
            ours = _clip_logits(clip, normalise(crop, spec), token_ids)
            other = _clip_logits(theirs, pixels_BCHW, token_ids)
        difference, tolerance = _difference(target, ours, other)
    return ExportReport(
        directory=str(target),
        library="open_clip",
        own_tokenizer=not public,
        max_difference=difference,
        tolerance=tolerance,
        code=open_clip_code(public, str(target)),
    )


@contextmanager
def _new(directory: str | Path) -> Iterator[Path]:
    """Creates a directory, which must hold nothing, and takes it away again after an error."""
    target = Path(directory).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FolderTaken(f"{target} holds something already; export into a new directory")
    target.mkdir(parents=True, exist_ok=True)
    try:
        yield target
    except BaseException:
        shutil.rmtree(target)
        raise


def _open_pair(target: Path) -> tuple[Any, Tensor]:
    """A pair as open_clip reads it, and the probe as its own transform prepares it."""
    try:
        opened: Any = open_clip.create_model_from_pretrained(f"local-dir:{target}")
    except RuntimeError as error:
        raise ExportMismatch(f"open_clip cannot open {target}: {error}") from error
    model, prepare = opened
    return model.eval(), prepare(Image.fromarray(_probe_image()))[None]


def _compare_tokens(target: Path, token_ids: Tensor) -> None:
    """Compares the ids that open_clip's tokenizer gives."""
    theirs: Any = open_clip.get_tokenizer(f"local-dir:{target}")
    if not torch.equal(theirs(list(PROBE_TEXTS)), token_ids):
        raise ExportMismatch(f"{target}: open_clip's tokenizer gives other ids than the spec's")


def _probe_image() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A smooth picture, (H, W, C), wider than high by an even number of pixels."""
    y, x = np.mgrid[0:240, 0:320] / 31.0
    waves = np.stack([np.sin(x), np.cos(x + y), np.sin(x * y / 4)], axis=-1)
    return (waves * 100 + 128).astype(np.uint8)


def _answer(model: Any, processor: Any, image: Path) -> dict[str, Tensor]:
    """Our own logits and greedy answer to the first probe, and what follows each one alone."""
    asked: list[Any] = []
    for question in QUESTIONS:
        parts = [{"type": "image"}, {"type": "text", "text": question}]
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": parts}], add_generation_prompt=True
        )
        asked.append(processor(images=Image.open(image), text=prompt, return_tensors="pt"))
    with torch.no_grad():
        answer = model.generate(**asked[0], max_new_tokens=NEW_TOKENS, do_sample=False)
        logits = [model(**inputs).logits for inputs in asked]
    following = torch.cat([alone[:, -1] for alone in logits])
    return {"logits": logits[0], "answer": answer, "next": following}


def _read_elsewhere(target: Path, image: Path, extra: str | None, out: Path) -> dict[str, Tensor]:
    """Logits and answer of a fresh process, and what follows each probe in a batch of both."""
    arguments = [target, image, extra or "", NEW_TOKENS, out, torch.get_num_threads(), *QUESTIONS]
    paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", READER, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ExportMismatch(f"transformers cannot open {target}: {done.stderr.strip()[-800:]}")
    return load_file(out)


def _clip_logits(model: Any, pixels_BCHW: Tensor, token_ids: Tensor) -> Tensor:
    """Scaled similarities of images and texts."""
    image = model.encode_image(pixels_BCHW, normalize=True)
    text = model.encode_text(token_ids, normalize=True)
    logits = model.logit_scale.exp() * image @ text.T
    bias = getattr(model, "logit_bias", None)
    return logits if bias is None else logits + bias


def _has_public_tokenizer(spec: TowerSpec) -> bool:
    """Whether open_clip finds the tokenizer by itself: OpenAI's, or one in the directory."""
    found = tokenizer(spec)
    return found.kind == "hf" or (found.kind == "bpe" and found.source is None)


def _compare(
    target: Path, ours: dict[str, Tensor], theirs: dict[str, Tensor]
) -> tuple[float, float]:
    """The difference of the logits and its tolerance; answers must be equal, also in a batch."""
    difference = _difference(target, ours["logits"], theirs["logits"])
    if not torch.equal(ours["answer"], theirs["answer"]):
        raise ExportMismatch(f"{target}: equal logits and another answer than the original's")
    try:
        _difference(target, ours["next"], theirs["next"])
    except ExportMismatch as error:
        raise ExportMismatch(
            f"{error} where prompts of unequal length are asked in one batch: is its tokenizer's "
            "padding_side 'left'?"
        ) from error
    return difference


def _difference(target: Path, ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """The largest difference, which must be rounding at most, and what counts as rounding."""
    if ours.shape != theirs.shape:
        raise ExportMismatch(
            f"{target}: logits of shape {tuple(theirs.shape)}, the original's are "
            f"{tuple(ours.shape)}"
        )
    difference = float((ours.float() - theirs.float()).abs().max())
    tolerance = TOLERANCE * max(1.0, float(ours.abs().max()))
    if not difference <= tolerance:
        raise ExportMismatch(f"{target}: logits differ from the original's by {difference:.3g}")
    return difference, tolerance


def _write_card(target: Path, library: str, text: str) -> None:
    """Says how to open the directory."""
    (target / "README.md").write_text(CARD.format(library=library, text=text), encoding="utf-8")


def hf_code(extra: str | None, path: str) -> str:
    """How transformers opens an export.

    Args:
        extra: Module to import first, None for none.
        path: The directory.
    """
    first = f"import {extra}  # registers the tower's class\n" if extra else ""
    return (
        f"{first}from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline\n\n"
        f"path = {path!r}\n"
        "model = AutoModelForImageTextToText.from_pretrained(path)\n"
        # Torchvision resizes a little differently; training and parity use Pillow.
        'processor = AutoProcessor.from_pretrained(path, backend="pil")\n'
        'ask = pipeline("image-text-to-text", model=model, processor=processor)'
    )


def open_clip_code(public: bool, path: str) -> str:
    """How open_clip opens an export.

    Args:
        public: Whether its tokenizer is one that open_clip has.
        path: The directory.
    """
    texts = (
        'tokenizer = open_clip.get_tokenizer(f"local-dir:{path}")'
        if public
        else "from kdscale.models.towers import read_spec, tokenizer\n\n"
        "tokenizer = tokenizer(read_spec(path))"
    )
    return (
        f"import open_clip\n\npath = {path!r}\n"
        'model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{path}")\n'
        f"{texts}"
    )


def _hf_card(extra: str | None) -> str:
    """What a vision-language model's directory says of itself."""
    return (
        "A vision-language model distilled and trained with kdscale.\n\n"
        f"```python\n{hf_code(extra, '.')}\n```\n\n"
        "The processor's chat template is the one that the model was trained with."
    )


def _open_clip_card(public: bool) -> str:
    """What a pair's directory says of itself."""
    return f"A CLIP pair trained with kdscale.\n\n```python\n{open_clip_code(public, '.')}\n```"
