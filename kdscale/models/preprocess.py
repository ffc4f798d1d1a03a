"""What each tower reads: pixels at its own size and normalisation, tokens of its own vocabulary.

open_clip's models are not imported here, so data tasks stay cheap.

Shape suffixes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from kdscale.core.config import TowerSpec
from kdscale.core.keys import weights_file
from kdscale.core.types import ConfigError, WeightsError
from kdscale.models.bpe import build_bpe, openai_merges

if TYPE_CHECKING:
    from torch import Tensor

TOKENIZER_DIR = Path(__file__).resolve().parents[1] / "mini" / "tokenizers"
MINI_BPE = TOKENIZER_DIR / "bpe_mini.txt.gz"
MINI_SP = TOKENIZER_DIR / "sp_mini"
SIGLIP_VOCAB = 32_000
SIGLIP_HUB_ID = "timm/ViT-B-16-SigLIP"
MAX_ASPECT = 50
HF_TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "sentencepiece.model")

logger = logging.getLogger(__name__)


def eval_crop(rgb: np.ndarray, spec: TowerSpec, *, floor: bool = False) -> np.ndarray:
    """Renders an image as the tower sees it at evaluation, before normalisation.

    Pillow resizes: its filters widen when shrinking, as the towers' authors had it;
    OpenCV's does not, and its area filter blurs differently.

    Of an image more than `MAX_ASPECT` times as long as it is wide, only the central strip is
    resized: the whole would take the memory of thousands of images for pixels that are cropped
    away. The pixels are the same but for rounding, and for overshoot that Pillow cuts off between
    its two passes, whose order it chooses by size.

    Args:
        rgb: (H, W, 3) uint8.
        spec: `resize="shortest"` scales the shorter side to `image_px` and crops the centre;
            `"squash"` scales both sides.
        floor: Round an odd surplus down, as transformers' image processors do; torchvision
            rounds to even.

    Returns:
        (image_px, image_px, 3) uint8, up to `MAX_ASPECT` bit-equal to torchvision's `Resize` and
        `CenterCrop` on a Pillow image.
    """
    image = Image.fromarray(rgb)
    px = spec.image_px
    resample = Image.Resampling[spec.interpolation.upper()]
    if spec.resize == "squash":
        return np.asarray(image.resize((px, px), resample))
    width, height = image.size
    short = min(width, height)
    size = (int(px * width / short), int(px * height / short))
    left, top = ((side - px) // 2 if floor else round((side - px) / 2) for side in size)
    if max(size) > MAX_ASPECT * px:
        across, down = width / size[0], height / size[1]
        strip = (left * across, top * down, (left + px) * across, (top + px) * down)
        return np.asarray(image.resize((px, px), resample, box=strip))
    if size != image.size:
        image = image.resize(size, resample)
    return np.asarray(image)[top : top + px, left : left + px]


def normalise(pixels: Tensor, spec: TowerSpec) -> Tensor:
    """Turns uint8 pixels into a tower's input, on the device that they are on.

    Args:
        pixels: (B, H, W, 3) or (B, 3, H, W) uint8, H = W = `image_px`.
        spec: Gives mean and standard deviation per channel.

    Returns:
        (B, 3, H, W) fp32: pixels / 255, minus the mean, over the standard deviation.

    Raises:
        ConfigError: Not such a batch.
    """
    import torch

    if pixels.dtype != torch.uint8 or pixels.ndim != 4:
        raise ConfigError(f"expected a uint8 batch of images, got {pixels.dtype} {pixels.shape}")
    px = spec.image_px
    if tuple(pixels.shape[1:]) == (px, px, 3):
        pixels = pixels.permute(0, 3, 1, 2)
    elif tuple(pixels.shape[1:]) != (3, px, px):
        raise ConfigError(f"{spec.name!r} reads {px}x{px} RGB, got {tuple(pixels.shape)}")
    mean = torch.tensor(spec.mean, device=pixels.device).mul(255.0).view(3, 1, 1)
    scale = torch.tensor(spec.std, device=pixels.device).mul(255.0).reciprocal().view(3, 1, 1)
    values = pixels.to(torch.float32, memory_format=torch.contiguous_format)
    return values.sub_(mean).mul_(scale)


@dataclass(frozen=True, kw_only=True)
class TowerTokenizer:
    """A tower's tokenizer as a small value: it pickles in bytes and is built on first use.

    Calls may come from several threads; one lock per built tokenizer keeps them apart, because
    the fast tokenizers of transformers change their own padding state during a call.

    Attributes:
        kind: `bpe` (OpenAI's scheme), `hf` (a Hugging Face tokenizer) or `folded`.
        source: The merges file, directory or hub id; None for OpenAI's merges.
        context_length: Tokens per text.
        local: Whether the source must not be looked up on a network.
    """

    kind: str
    source: str | None
    context_length: int
    local: bool = True

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Returns (B, context_length) int64, padded and cut."""
        import torch

        return torch.from_numpy(self.ids(texts))

    def ids(self, texts: Sequence[str]) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Returns the same as an array; `bpe` needs no torch for it."""
        encode, lock = _built(self)
        with lock:
            return np.asarray(encode(list(texts)), np.int64)


def tokenizer(spec: TowerSpec) -> TowerTokenizer:
    """Returns the tokenizer of a tower.

    Args:
        spec: `tokenizer` is one of:
            `clip_bpe`: OpenAI's byte-pair encoding, 49,408 ids.
            `siglip`: SentencePiece, 32,000 ids, from the weights' hub repository or directory,
                over text in lower case without punctuation. With random weights and no such files
                in the cache, CLIP's ids folded into that range stand in: such a tower means
                nothing by its ids, only their number and range matter.
            `mini_bpe`, `mini_sp`: the miniature world's.
            a directory: a Hugging Face tokenizer over canonicalised text.

    Raises:
        ConfigError: No such tokenizer.
        WeightsError: Its files are absent.
    """
    builders: dict[str, Callable[[TowerSpec], TowerTokenizer]] = {
        "clip_bpe": lambda s: TowerTokenizer(
            kind="bpe", source=None, context_length=s.context_length
        ),
        "siglip": _siglip,
        "mini_bpe": lambda s: _local("bpe", MINI_BPE, s),
        "mini_sp": lambda s: _local("hf", MINI_SP, s),
    }
    if spec.tokenizer in builders:
        return builders[spec.tokenizer](spec)
    directory = Path(spec.tokenizer).expanduser()
    if directory.is_dir():
        return _local("hf", directory, spec)
    raise ConfigError(
        f"unknown tokenizer {spec.tokenizer!r}: neither a directory nor one of "
        f"{', '.join(sorted(builders))}"
    )


def _local(kind: str, path: Path, spec: TowerSpec) -> TowerTokenizer:
    """A tokenizer of local files, which must exist."""
    found = sorted(item.name for item in path.iterdir()) if path.is_dir() else []
    if kind == "hf" and not set(found) & set(HF_TOKENIZER_FILES):
        raise WeightsError(
            f"no tokenizer in {path}: found {found or 'nothing'}, expected one of "
            f"{', '.join(HF_TOKENIZER_FILES)}"
        )
    if kind == "bpe" and not path.is_file():
        raise WeightsError(f"no merges file {path} for tokenizer {spec.tokenizer!r}")
    return TowerTokenizer(kind=kind, source=str(path), context_length=spec.context_length)


def _siglip(spec: TowerSpec) -> TowerTokenizer:
    """SigLIP's tokenizer from where its weights are, or the stand-in for random weights."""
    from kdscale.models.weights import hub_id, is_directory_name

    if spec.weights == "random":
        cached = TowerTokenizer(kind="hf", source=SIGLIP_HUB_ID, context_length=spec.context_length)
        if _in_cache(SIGLIP_HUB_ID):
            return cached
        _warn_folded()
        return TowerTokenizer(kind="folded", source=None, context_length=spec.context_length)
    if is_directory_name(spec.weights) and weights_file(spec.weights) is None:
        return _local("hf", Path(spec.weights).expanduser(), spec)
    return TowerTokenizer(
        kind="hf",
        source=hub_id(spec) or SIGLIP_HUB_ID,
        context_length=spec.context_length,
        local=False,
    )


def _in_cache(repository: str) -> bool:
    """Tells whether a repository's tokenizer lies in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repository, "tokenizer.json"), str)


@lru_cache(maxsize=1)
def _warn_folded() -> None:
    """Says once per process that ids are not SentencePiece's."""
    logger.warning(
        "SigLIP's SentencePiece files are not in the cache: with random weights, CLIP ids folded "
        "into 0..%d stand in for them",
        SIGLIP_VOCAB - 1,
    )


@lru_cache(maxsize=1)
def _tokenizer_module() -> Any:
    """Loads `open_clip.tokenizer` without its package, whose import pulls in every model library.

    Data tasks tokenise and nothing else; this saves each of their processes some ten seconds.
    """
    package = find_spec("open_clip")
    assert package is not None
    assert package.submodule_search_locations is not None
    path = Path(package.submodule_search_locations[0]) / "tokenizer.py"
    spec = spec_from_file_location("open_clip_tokenizer", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@lru_cache(maxsize=16)
def _built(wanted: TowerTokenizer) -> tuple[Callable[[list[str]], Any], threading.Lock]:
    """Builds a tokenizer once per process."""
    length = wanted.context_length
    if wanted.kind == "bpe":
        return build_bpe(wanted.source or openai_merges(), length), threading.Lock()
    module = _tokenizer_module()
    HFTokenizer, SimpleTokenizer = module.HFTokenizer, module.SimpleTokenizer
    if wanted.kind == "hf":
        assert wanted.source is not None
        try:
            encode = HFTokenizer(
                wanted.source,
                context_length=length,
                clean="canonicalize",
                local_files_only=wanted.local,
            )
        except Exception as error:
            raise WeightsError(f"tokenizer {wanted.source} cannot be loaded: {error}") from error
        return encode, threading.Lock()
    simple = SimpleTokenizer(context_length=length, clean="canonicalize")
    return lambda texts: simple(texts) % SIGLIP_VOCAB, threading.Lock()


def copy_tokenizer(spec: TowerSpec, directory: Path) -> bool:
    """Saves a Hugging Face tokenizer beside weights; other kinds have no files to save.

    Args:
        spec: The tower.
        directory: Where its weights are.

    Returns:
        Whether files were written.
    """
    found = tokenizer(spec)
    if found.kind != "hf":
        return False
    encode, lock = _built(found)
    with lock:
        encode.save_pretrained(directory)  # type: ignore[attr-defined]
    return True
