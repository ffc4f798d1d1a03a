"""What a cluster may grow to.

Ray tells its programs what nodes there are, not what its autoscaler may bring. So whoever describes
a cluster says it in the environment of its nodes, and the processes of a sweep read it here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field

from kdscale.core.spec import Spec
from kdscale.core.types import ConfigError

GROWS_TO = "KDSCALE_GROWS_TO"
GpuRole = Literal["inference", "training"]


class NodeType(Spec):
    """Nodes of one kind.

    Attributes:
        resources: What one node offers, in Ray's terms; `inference` or `training` beside `GPU`
            where the cluster has GPUs of both kinds.
        count: How many of them there may be.
    """

    resources: dict[str, float]
    count: int = Field(ge=0)


def growth() -> tuple[NodeType, ...]:
    """Returns the kinds of nodes that may come; none where nobody says so.

    Raises:
        ConfigError: If the environment holds something else.
    """
    text = os.environ.get(GROWS_TO, "[]")
    try:
        return tuple(NodeType(**fields) for fields in json.loads(text))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{GROWS_TO} is no list of node types: {text!r}") from error


def announced(types: Sequence[NodeType]) -> str:
    """Returns the value of the variable that `growth` reads."""
    return json.dumps([kind.model_dump() for kind in types if kind.count], separators=(",", ":"))


def with_growth(
    there: Mapping[str, float], types: Sequence[NodeType]
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Returns the resources of a cluster that has grown, and those of each node of such kinds.

    Args:
        there: Resources of the cluster as it is.
        types: The kinds of nodes that may come.
    """
    total = dict(there)
    for name in {name for kind in types for name in kind.resources}:
        grown = sum(kind.count * kind.resources.get(name, 0.0) for kind in types)
        total[name] = max(total.get(name, 0.0), grown)
    return total, [dict(kind.resources) for kind in types for _ in range(kind.count)]


def on_gpus_for(role: GpuRole, gpus: float) -> dict[str, float]:
    """Returns what to ask for beside GPUs, so that they are those of a role.

    A sweep's trainings would otherwise spread over single small GPUs, and its embeddings occupy
    large ones. Clusters that do not tell their GPUs apart are asked for nothing.
    """
    offered = gpus > 0 and any(role in kind.resources for kind in growth())
    return {role: gpus} if offered else {}
