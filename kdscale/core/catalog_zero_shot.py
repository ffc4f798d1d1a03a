"""The zero-shot suite: its image sets, and what the teachers are known to reach on them."""

from __future__ import annotations

from kdscale.core.catalog import TEACHERS
from kdscale.core.config import TowerSpec
from kdscale.core.zero_shot_config import ZeroShotSet

SUITE: dict[str, ZeroShotSet] = {
    "imagenet": ZeroShotSet(name="ImageNet-1k validation", num_images=50_000),
    "imagenet_v2": ZeroShotSet(name="ImageNet-V2 matched frequency", num_images=10_000),
    "imagenet_r": ZeroShotSet(name="ImageNet-R", classes="imagenet_r", num_images=30_000),
    "imagenet_sketch": ZeroShotSet(name="ImageNet-Sketch", num_images=50_889),
    "imagenet_a": ZeroShotSet(name="ImageNet-A", classes="imagenet_a", num_images=7_500),
    "flickr30k": ZeroShotSet(name="Flickr30k, Karpathy test", task="retrieval", num_images=1_000),
    "coco": ZeroShotSet(name="COCO, Karpathy test", task="retrieval", num_images=5_000),
}

# Top-1 in percent, from open_clip's table of results.
PUBLISHED: dict[str, dict[str, float]] = {
    "clip_b16": {
        "imagenet": 68.34,
        "imagenet_v2": 61.88,
        "imagenet_r": 77.70,
        "imagenet_sketch": 48.24,
    },
    "clip_l14": {
        "imagenet": 75.54,
        "imagenet_v2": 69.83,
        "imagenet_r": 87.84,
        "imagenet_sketch": 59.59,
    },
    "siglip_so400m": {
        "imagenet": 83.08,
        "imagenet_v2": 77.17,
        "imagenet_r": 95.75,
        "imagenet_sketch": 74.54,
    },
    "dfn_b16": {
        "imagenet": 76.24,
        "imagenet_v2": 68.18,
        "imagenet_r": 83.10,
        "imagenet_sketch": 62.04,
    },
    "dfn_l14": {
        "imagenet": 81.41,
        "imagenet_v2": 74.61,
        "imagenet_r": 90.00,
        "imagenet_sketch": 68.32,
    },
}


def published_top1(tower: TowerSpec, benchmark: str) -> float | None:
    """Returns the top-1 that a teacher must reach, None where none is known.

    A tower counts as one of the five teachers where it has its name, wherever its weights lie,
    or its architecture and weights, whatever its name.

    Args:
        tower: The pair; random weights are nobody's.
        benchmark: A name of `SUITE`.
    """
    if tower.weights == "random":
        return None
    what = (tower.clip_config, tower.weights)
    for role, teacher in TEACHERS.items():
        if tower.name == teacher.name or what == (teacher.clip_config, teacher.weights):
            return PUBLISHED[role].get(benchmark)
    return None
