"""Small conversation shards that several tests read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from conftest import jpeg

from kdscale.core.config import DataSpec
from kdscale.data.shards import Manifest, build_manifest

Turn = dict[str, str]


def talk(*texts: str) -> list[Turn]:
    """Makes turns that begin with a question."""
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def about_image(number: int) -> list[Turn]:
    """One to three rounds about an image."""
    more = [text for i in range(number % 3) for text in (f"and {i} of {number}?", f"it is {i}")]
    return talk(f"<image>\nwhat is {number}?", "a " + "very " * (number % 7) + "thing", *more)


def parts_of(key: str, number: int, *, image: bool = True) -> list[tuple[str, bytes]]:
    """Makes the members of one sample."""
    turns = about_image(number) if image else talk("say " * (number % 5 + 1), f"word {number}")
    record = {"id": key, "conversations": turns, "modality": "image" if image else "text"}
    members = [(f"{key}.json", json.dumps(record).encode())]
    return [(f"{key}.jpg", jpeg(number)), *members] if image else members


def len_of(number: int) -> int:
    """Counts the words of `about_image`."""
    return sum(len(turn["value"].split()) for turn in about_image(number))


def write_talks(folder: Path, write_tar: Callable[..., Path]) -> str:
    """Writes three shards, every fourth sample without an image, and gives their pattern."""
    for shard, size in enumerate((23, 16, 30)):
        numbers = [100 * shard + i for i in range(size)]
        members = [m for n in numbers for m in parts_of(f"{n:06d}", n, image=n % 4 != 3)]
        write_tar(folder / f"{shard:05d}.tar", members)
    return f"{folder}/*.tar"


def manifest_of(urls: object) -> Manifest:
    """Verifies shards as conversations, whatever share of them is bad."""
    spec = DataSpec(name="t", urls=str(urls), max_bad_fraction=1.0)
    return build_manifest(spec, content="conversations", num_threads=1)
