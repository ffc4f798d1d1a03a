"""What makes a raw sample unusable: cheap checks first, then the image itself.

What a sample must hold depends on the content that its shards are to be read for. Captions and
conversations may lie in the same shards: a verification looks at one of them.
"""

from __future__ import annotations

from typing import Any, Literal

from kdscale.core.types import DataError
from kdscale.data.raw import RawSample
from kdscale.data.samples import BadImage, decode
from kdscale.data.templates import IMAGE, rounds

Content = Literal["captions", "labels", "conversations"]

CUT = "truncated_tar"


def find_fault(sample: RawSample, content: Content = "captions") -> str | None:
    """Names what makes a sample unusable; None where nothing does."""
    if sample.cut:
        return CUT
    if content == "conversations":
        return _conversation_sample_fault(sample)
    if not sample.jpg:
        return "missing_image"
    return (_label_fault if content == "labels" else _caption_fault)(sample) or _image_fault(sample)


def _caption_fault(sample: RawSample) -> str | None:
    """Judges a caption, and the metadata beside it."""
    if sample.txt is None:
        return "missing_caption"
    try:
        if not sample.caption:
            return "empty_caption"
    except UnicodeDecodeError:
        return "non_utf8_caption"
    return None if _meta(sample) is not None else "bad_json"


def _label_fault(sample: RawSample) -> str | None:
    """Judges a label."""
    meta = _meta(sample)
    if meta is None:
        return "bad_json"
    label = meta.get("label")
    return "missing_label" if not isinstance(label, int) or isinstance(label, bool) else None


def _conversation_sample_fault(sample: RawSample) -> str | None:
    """Judges a conversation, and its image where it has or needs one."""
    meta = _meta(sample)
    if meta is None:
        return "bad_json"
    cause = conversation_fault(meta.get("conversations"))
    if cause is not None:
        return cause
    if sample.jpg:
        return _image_fault(sample)
    named = bool(meta.get("image")) or meta.get("modality") == "image"
    wants = named or mentions_image(meta["conversations"])
    return "missing_image" if wants else None


def _meta(sample: RawSample) -> dict[str, Any] | None:
    """Reads the metadata, None where they cannot be read."""
    try:
        return sample.meta
    except ValueError:
        return None


def _image_fault(sample: RawSample) -> str | None:
    """Decodes the image."""
    try:
        decode(sample.jpg or b"")
    except BadImage as error:
        return error.cause
    return None


def conversation_fault(turns: Any) -> str | None:
    """Names what makes a conversation unusable; None where nothing does.

    Args:
        turns: What a record holds under `conversations`: a list of {from, value}.
    """
    if not turns:
        return "missing_conversation"
    try:
        found = rounds(turns)
    except DataError:
        return "bad_conversation"
    if not any(answer.strip() for _, answer in found):
        return "empty_conversation"
    try:
        "".join(turn["value"] for turn in turns).encode()
    except UnicodeEncodeError:
        return "non_utf8_conversation"
    return None


def mentions_image(turns: list[dict[str, str]]) -> bool:
    """Says whether a turn refers to an image."""
    return any(IMAGE in turn["value"] for turn in turns)


def num_words(turns: list[dict[str, str]]) -> int:
    """Counts the words between blanks of all turns, `<image>` among them, as LLaVA does."""
    return sum(len(turn["value"].split()) for turn in turns)


def length_of(sample: RawSample) -> int:
    """Returns the words of a usable conversation, negative where it has no image."""
    words = num_words(sample.meta["conversations"])
    return words if sample.jpg else -words
