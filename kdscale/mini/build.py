"""Writes miniature worlds in the formats of the real data sets.

Image-text pairs become WebDataset tars in img2dataset's layout, as CC12M is distributed:
`00000.tar`, `00001.tar`, ... with the members `{shard:05d}{row:04d}.jpg`, `.txt` and `.json`.
Conversations are part of the `.json`, or are written as LLaVA's one json and a folder of images.
Held-out questions become Parquet. The bytes of a shard depend on the world alone, not on when,
where or by how many processes it is written.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kdscale.core.config import MiniWorld
from kdscale.core.types import ConfigError
from kdscale.mini.captions import caption
from kdscale.mini.conversations import Conversation, converse, llava_record
from kdscale.mini.paint import encode_jpeg
from kdscale.mini.questions import eval_items
from kdscale.mini.scenes import CLASSNAMES, Scene, draw

MAX_SAMPLES_PER_SHARD = 10_000
QUESTIONS = pa.schema(
    {
        "item_id": pa.string(),
        "family": pa.string(),
        "question": pa.string(),
        "options": pa.list_(pa.string()),
        "prompt": pa.string(),
        "gold": pa.string(),
        "chance": pa.float64(),
        "group": pa.string(),
        "image": pa.binary(),
    }
)


def write_world(
    world: MiniWorld,
    directory: str,
    *,
    processes: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Writes a world's samples as WebDataset tars.

    Args:
        world: What to draw.
        directory: Where to; created if absent. Shards of the same name are replaced, each
            atomically.
        processes: Processes that draw; 1 draws in this one.
        progress: Called with (shards written, shards in all) after each shard.

    Returns:
        The shards' paths, in order.

    Raises:
        ConfigError: More samples per shard than a key has digits for; or the drawing processes
            have died, as where a script has no guard around what it runs.
    """
    if world.samples_per_shard > MAX_SAMPLES_PER_SHARD:
        raise ConfigError(
            f"samples_per_shard is {world.samples_per_shard}; keys have four digits, "
            f"so at most {MAX_SAMPLES_PER_SHARD}"
        )
    os.makedirs(directory, exist_ok=True)
    num_shards = -(-world.num_samples // world.samples_per_shard)
    paths = [os.path.join(directory, f"{shard:05d}.tar") for shard in range(num_shards)]
    for done, _ in enumerate(_written(world, paths, min(processes, num_shards)), start=1):
        if progress is not None:
            progress(done, num_shards)
    return paths


def _written(world: MiniWorld, paths: list[str], processes: int) -> Iterator[int]:
    """Yields the number of each shard as soon as it is written."""
    if processes <= 1:
        for shard, path in enumerate(paths):
            yield write_shard(world, shard, path)
        return
    # Forked children would inherit the locks of OpenCV's and torch's threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        jobs = [pool.submit(write_shard, world, shard, path) for shard, path in enumerate(paths)]
        try:
            for job in as_completed(jobs):
                yield job.result()
        except BrokenProcessPool as error:
            raise ConfigError(
                "the processes that draw a miniature world have died. They read the script that "
                "was started anew, so it has to run its study below: if __name__ == '__main__':"
            ) from error


def write_shard(world: MiniWorld, shard: int, path: str) -> int:
    """Writes one tar under a temporary name and renames it.

    Args:
        world: What to draw.
        shard: Its number; it holds the indices from `shard * samples_per_shard` on.
        path: Where to.

    Returns:
        The shard's number.
    """
    first = shard * world.samples_per_shard
    last = min(first + world.samples_per_shard, world.num_samples)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            for index in range(first, last):
                key = sample_key(world, index)
                for extension, data in encode_sample(world, index, key).items():
                    _add(tar, f"{key}.{extension}", data)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return shard


def encode_sample(world: MiniWorld, index: int, key: str) -> dict[str, bytes]:
    """Draws one sample and encodes its files.

    Args:
        world: What to draw.
        index: The sample's place in the world.
        key: Name of the sample's files.

    Returns:
        Bytes of `jpg`, `txt` and `json`; an `instruct` world has no captions, and some of its
        samples have no image.
    """
    if world.content == "instruct":
        talk = converse(world, index)
        image = {} if talk.scene is None else {"jpg": encode_jpeg(talk.scene, world.image_px)}
        return image | {"json": _json(_conversation(world, talk, key))}
    scene = draw(world, index)
    text, other = caption(world, index)
    record = {
        "key": key,
        "caption": text,
        "url": f"mini://{world.seed}/{world.split}/{index}",
        "status": "success",
        "width": world.image_px,
        "height": world.image_px,
        "caption_of": index if other is None else other,
        **_label(scene),
        "facts": scene.facts(),
    }
    if world.content == "pretrain":
        record |= _conversation(world, converse(world, index), key)
    return {
        "jpg": encode_jpeg(scene, world.image_px),
        "txt": text.encode(),
        "json": _json(record),
    }


def _conversation(world: MiniWorld, talk: Conversation, key: str) -> dict[str, Any]:
    """What the shards of a conversation data set say of a sample."""
    more = {"source": f"mini-{world.content}", "n_words": talk.num_words}
    return llava_record(talk, key) | more | {"modality": talk.modality}


def write_instruct_json(world: MiniWorld, directory: str) -> str:
    """Writes a world's conversations as LLaVA and Bunny are distributed.

    Args:
        world: Of content `pretrain` or `instruct`.
        directory: Receives `<content>.json`, one list of all conversations, and the folder
            `images` that their `image` is relative to.

    Returns:
        The json's path.

    Raises:
        ConfigError: The world has captions instead of conversations.
    """
    if world.content == "captions":
        raise ConfigError("a world of content 'captions' has no conversations to write")
    records: list[dict[str, Any]] = []
    for index in range(world.num_samples):
        talk = converse(world, index)
        record = llava_record(talk, sample_key(world, index))
        if talk.scene is not None:
            image = Path(directory, "images", record["image"])
            image.parent.mkdir(parents=True, exist_ok=True)
            image.write_bytes(encode_jpeg(talk.scene, world.image_px))
        records.append(record)
    path = Path(directory, f"{world.content}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records), encoding="utf-8")
    return str(path)


def write_questions(world: MiniWorld, path: str) -> str:
    """Writes a world's benchmark as Parquet, one row an item; see `eval_items` for the columns.

    Args:
        world: An `instruct` world of the `eval` split.
        path: The file; replaced if it exists.

    Returns:
        The path.

    Raises:
        ConfigError: The world is another one.
    """
    table = pa.Table.from_pylist(list(eval_items(world)), schema=QUESTIONS)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        pq.write_table(table, temporary)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


def sample_key(world: MiniWorld, index: int) -> str:
    """Names a sample by its shard and its place there."""
    shard, place = divmod(index, world.samples_per_shard)
    return f"{shard:05d}{place:04d}"


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _label(scene: Scene) -> dict[str, Any]:
    """The class of a scene that has one."""
    if scene.label is None:
        return {}
    return {"label": scene.label, "class": CLASSNAMES[scene.label]}


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Adds a file whose metadata do not depend on time or user."""
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode, entry.mtime = len(data), 0o644, 0
    tar.addfile(entry, io.BytesIO(data))
