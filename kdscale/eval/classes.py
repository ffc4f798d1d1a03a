"""Class lists and prompt templates of zero-shot classification.

ImageNet's names and CLIP's templates come from open_clip, the WordNet ids from timm.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from kdscale.core.types import ConfigError, unknown_name
from kdscale.core.zero_shot_config import ClassSet

_SYNSETS = {
    "imagenet": "imagenet_synsets.txt",
    "imagenet_r": "imagenet_r_synsets.txt",
    "imagenet_a": "imagenet_a_synsets.txt",
}


def class_set(classes: str | tuple[str, ...]) -> ClassSet:
    """Returns a list of classes.

    Args:
        classes: `imagenet` (1,000), `imagenet_r` or `imagenet_a` (200 of them, in ImageNet's
            order), or names in label order.

    Raises:
        UnknownName: No such list.
        ConfigError: A list of names with fewer than two.

    Source:
        ImageNet-R: Hendrycks et al. 2021, arXiv 2006.16241; ImageNet-A: arXiv 1907.07174. Both
        let only their 200 classes compete.
    """
    if isinstance(classes, tuple):
        if len(classes) < 2:
            raise ConfigError(f"{len(classes)} class names leave nothing to choose; give two")
        return ClassSet("own", classes)
    if classes not in _SYNSETS:
        raise unknown_name("class list", classes, _SYNSETS)
    return _imagenet(classes)


@lru_cache(maxsize=len(_SYNSETS))
def _imagenet(name: str) -> ClassSet:
    """Reads ImageNet's classes or 200 of them."""
    from open_clip import IMAGENET_CLASSNAMES

    every = _synsets("imagenet")
    wnids = _synsets(name)
    place_of = {wnid: place for place, wnid in enumerate(every)}
    places = tuple(place_of[wnid] for wnid in wnids)
    if len(every) != len(IMAGENET_CLASSNAMES) or list(places) != sorted(set(places)):
        raise ConfigError(
            f"timm's ids ({len(every)}) and open_clip's names ({len(IMAGENET_CLASSNAMES)}) of "
            "ImageNet do not fit together; install the versions of the lock"
        )
    return ClassSet(name, tuple(IMAGENET_CLASSNAMES[p] for p in places), tuple(wnids), places)


def _synsets(name: str) -> list[str]:
    """Reads a list of WordNet ids from timm's data without importing timm."""
    package = find_spec("timm")
    assert package is not None
    assert package.submodule_search_locations is not None
    path = Path(package.submodule_search_locations[0], "data", "_info", _SYNSETS[name])
    if not path.is_file():
        raise ConfigError(f"the installed timm has no {path}; install the version of the lock")
    return path.read_text(encoding="utf-8").split()


def prompt_templates(templates: str | Sequence[str]) -> list[str]:
    """Returns prompt templates as format strings with one `{}`.

    Args:
        templates: `openai` (CLIP's 80), `simple` (1), or format strings.

    Raises:
        UnknownName: No such list.
        ConfigError: None at all, or one without a place for the name.
    """
    if not isinstance(templates, str):
        wrong = [text for text in templates if text.count("{}") != 1]
        if wrong or not templates:
            found = f"{wrong[0]!r} has not one {{}}" if wrong else "there are none"
            raise ConfigError(f"templates hold the class name at one {{}}: {found}")
        return list(templates)
    if templates == "simple":
        return ["a photo of a {}."]
    if templates != "openai":
        raise unknown_name("templates", templates, ("openai", "simple"))
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    return [make("{}") for make in OPENAI_IMAGENET_TEMPLATES]
