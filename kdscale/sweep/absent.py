"""Inputs of a plan that are not at hand, in words: what each is called, and the option for it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from kdscale.core.config import DataSpec
from kdscale.core.scale import Scale, data_names
from kdscale.core.vlm_config import SuiteSpec
from kdscale.data.shards import Content


def no_path(spec: DataSpec, scale: Scale, content: Content = "captions") -> str:
    """Says that nobody has said where a data set is, and how to.

    Args:
        spec: The data set.
        scale: Knows its role.
        content: What is read: labelled images are a folder, everything else shards.
    """
    place = "DIR" if content == "labels" else "'DIR/*.tar'"
    return f"data set {_role(spec, scale)!r} has no path: say {data_option(spec, scale, place)}"


def data_option(spec: DataSpec | SuiteSpec, scale: Scale, place: str = "DIR") -> str:
    """Returns the option that says where a data set or a suite is."""
    return f"--data {shlex.quote(_role(spec, scale))}={place}"


def each_once(notes: Sequence[str]) -> list[str]:
    """Leaves out notes that say again, with more words, what another one says."""
    distinct = list(dict.fromkeys(notes))
    return [
        note
        for note in distinct
        if not any(note != other and note.startswith(other) for other in distinct)
    ]


def _role(spec: DataSpec | SuiteSpec, scale: Scale) -> str:
    """Returns the first role of a data set or a suite; its own name where it has none."""
    return data_names(spec, scale)[:2][-1]
