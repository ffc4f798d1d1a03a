"""The words of a miniature world without its images: what a language model reads first."""

from __future__ import annotations

from collections.abc import Iterator

from kdscale.core.config import MiniWorld
from kdscale.mini.captions import caption
from kdscale.mini.conversations import IMAGE, converse


def texts(world: MiniWorld) -> Iterator[str]:
    """Yields a text for each sample: its caption, or the turns of its conversation, a line each."""
    for index in range(world.num_samples):
        if world.content == "captions":
            yield caption(world, index)[0]
        else:
            turns = converse(world, index).turns
            yield "\n".join(turn["value"].replace(IMAGE, "").strip() for turn in turns)
