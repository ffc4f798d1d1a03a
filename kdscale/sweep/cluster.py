"""What a cluster is: nodes, network, storage. One description, of which all manifests are made."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from kdscale.core.nodes import GROWS_TO, NodeType, announced
from kdscale.core.spec import Spec
from kdscale.core.types import ConfigError

Role = Literal["decode", "inference", "training"]
STORAGE = "KDSCALE_STORAGE"
TRACKING_URI = "MLFLOW_TRACKING_URI"
CPU_LOCK, GPU_LOCK = "requirements.lock", "requirements-gpu.lock"


class Node(Spec):
    """A machine.

    Attributes:
        cpus: CPUs that it offers; fewer than it has, since Ray and the system take some.
        memory_gib: Likewise of its memory.
        disk_gib: Disk for images, environment and objects that do not fit the memory.
    """

    instance_type: str
    cpus: int = Field(gt=0)
    memory_gib: int = Field(gt=0)
    disk_gib: int = Field(default=200, gt=0)


class Group(Node):
    """Machines of one kind that come when they are asked for and go when they are idle.

    Attributes:
        spot: Rent them at the price of spare capacity, which may be taken away at any moment;
            finished stages stay, interrupted ones go on from their last checkpoint.
    """

    gpus: int = Field(default=0, ge=0)
    min_nodes: int = Field(default=0, ge=0)
    max_nodes: int = Field(gt=0)
    spot: bool = False

    @model_validator(mode="after")
    def _min_at_most_max(self) -> Self:
        if self.min_nodes > self.max_nodes:
            raise ValueError(f"min_nodes={self.min_nodes} is above max_nodes={self.max_nodes}")
        return self


class Aws(Spec):
    """Where nodes are rented: the account's names, of which none is public."""

    region: str
    image: str
    subnets: tuple[str, ...] = Field(min_length=1)
    security_groups: tuple[str, ...] = Field(min_length=1)
    key_name: str
    head_profile: str
    worker_profile: str
    ssh_user: str = "ubuntu"


class Kubernetes(Spec):
    """Where pods run.

    Attributes:
        image: Holds kdscale in `/kdscale`, and its environment first in `PATH`.
        gpu_image: Likewise, from the lock for GPUs.
    """

    image: str
    gpu_image: str
    namespace: str = "default"
    service_account: str = "default"


class Local(Spec):
    """One machine that is reached by ssh; MLflow is a file in its storage."""

    ssh_user: str
    storage: str = Field(min_length=1)
    head_ip: str = "127.0.0.1"


class Cluster(Spec):
    """A cluster.

    Attributes:
        storage: Where stages live, reachable from every node.
        tracking_uri: MLflow, likewise.
        groups: By what they are for.
    """

    name: str = Field(pattern=r"^[a-z][a-z0-9-]*$")
    storage: str = Field(min_length=1)
    tracking_uri: str = Field(min_length=1)
    idle_timeout_minutes: float = Field(default=5, gt=0)
    head: Node
    groups: dict[Role, Group] = Field(min_length=1)
    aws: Aws
    kubernetes: Kubernetes
    local: Local

    @model_validator(mode="after")
    def _gpus_where_they_belong(self) -> Self:
        for role, group in self.groups.items():
            if (role == "decode") != (group.gpus == 0):
                raise ValueError(f"groups.{role} has {group.gpus} GPUs; decode alone has none")
        return self

    def node_types(self) -> list[NodeType]:
        """Returns what each group offers, and how many nodes it may have."""
        return [
            NodeType(resources=dict(resources_of(role, group)), count=group.max_nodes)
            for role, group in self.groups.items()
        ]

    def environment(self) -> dict[str, str]:
        """Returns the variables that every process of the cluster must see."""
        return {
            STORAGE: self.storage,
            TRACKING_URI: self.tracking_uri,
            GROWS_TO: announced(self.node_types()),
        }


def resources_of(role: Role, group: Group) -> dict[str, int]:
    """Returns what a node of a group offers in Ray's terms.

    GPUs carry their role beside them; stages ask for that of their kind.
    """
    return {"CPU": group.cpus} | ({"GPU": group.gpus, role: group.gpus} if group.gpus else {})


def load_cluster(path: Path) -> Cluster:
    """Reads a cluster's description.

    Raises:
        ConfigError: If there is none, or it is not one.
    """
    try:
        fields = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; give --source FILE") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no TOML: {error}") from error
    return Cluster(**fields)
