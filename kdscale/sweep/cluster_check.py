"""What is wrong with a `cluster.yaml`: Ray's own schema first, then what it would let pass."""

# pyright: basic
# (Ray carries too few types for strict checking)
from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from kdscale.core.types import ConfigError
from kdscale.sweep.cluster import CPU_LOCK, GPU_LOCK, STORAGE

MAX_IDLE_MINUTES = 60
PLACEHOLDER = re.compile(r"[a-z]+-0{17}|\w+://change-me[\w/.-]*")
TOKEN_FILE = ".ray/auth_token"
Config = dict[str, Any]


class ClusterProblems(ConfigError):
    """A cluster that would not start, or not be what it should."""


def read_config(path: Path) -> Config:
    """Reads a cluster's YAML.

    Raises:
        ConfigError: If it is none.
    """
    try:
        config = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds no cluster")
    return config


def check_config(config: Config, where: str) -> None:
    """Refuses a configuration of Ray's cluster launcher that has problems.

    Raises:
        ClusterProblems: Naming each.
    """
    found = list(problems(config))
    if found:
        raise ClusterProblems(f"{where}:\n" + "\n".join(f"  {problem}" for problem in found))


def problems(config: Config) -> Iterator[str]:
    """Yields what is wrong, each with what to do."""
    broken = schema_problem(config)
    if broken is not None:
        yield broken
        return
    for name in sorted(set(PLACEHOLDER.findall(yaml.safe_dump(config)))):
        yield f"{name} is a placeholder: give yours in the cluster's description"
    yield from _open_doors(config)
    if not 0 < config.get("idle_timeout_minutes", 0) <= MAX_IDLE_MINUTES:
        yield f"idle_timeout_minutes: set 1 to {MAX_IDLE_MINUTES}, or idle nodes cost for ever"
    storages: dict[str, str | None] = {}
    for name, node, commands in _nodes(config):
        setup = "\n".join(commands)
        variables = exported(setup)
        if variables.get("RAY_AUTH_MODE") != "token":
            yield f"{name}: its setup must export RAY_AUTH_MODE=token, as on every node"
        lock = GPU_LOCK if node.get("resources", {}).get("GPU") else CPU_LOCK
        if lock not in setup:
            yield f"{name}: its setup must install {lock}, or nodes will differ"
        storages[name] = variables.get(STORAGE)
        yield from _unreachable(name, node, variables.get(STORAGE), config, setup)
    if len(set(storages.values())) > 1:
        yield f"{STORAGE} must be the same on every node, found {storages}"


def schema_problem(config: Config) -> str | None:
    """Returns what Ray's own schema and rules say; defaults are filled in as `ray up` does."""
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    kind = config.get("provider", {}).get("type")
    if kind not in ("aws", "local"):
        return f"provider.type: {kind!r} is not checked here; aws or local is"
    try:
        validate_config(prepare_config(deepcopy(config)))
    except jsonschema.ValidationError as error:
        return f"Ray's schema: {'.'.join(map(str, error.absolute_path))}: {error.message}"
    except Exception as error:  # whatever Ray stumbles over
        return f"Ray: {error}"
    return None


def exported(setup: str) -> dict[str, str]:
    """Returns the variables that a node's setup exports, plain or as text for a file."""
    found: dict[str, str] = {}
    for word in _words(setup):
        match = re.fullmatch(r"export (\w+)=(.*)", word, re.DOTALL)
        if match:
            found[match[1]] = "".join(_words(match[2]))
    for match in re.finditer(r"^\s*export (\w+)=(\S+)", setup, re.MULTILINE):
        found.setdefault(match[1], match[2].strip("'\""))
    return found


def _words(text: str) -> list[str]:
    """Splits a shell's text; text that no shell would take is no words."""
    try:
        return shlex.split(text)
    except ValueError:
        return []


def _nodes(config: Config) -> Iterator[tuple[str, Config, list[str]]]:
    """Yields each kind of node: its name, its description, and the commands that set it up."""
    shared: list[str] = config.get("setup_commands", [])
    types: dict[str, Config] = config.get("available_node_types") or {"node": {}}
    for name, node in types.items():
        if name == config.get("head_node_type", "node"):
            yield name, node, shared + config.get("head_setup_commands", [])
        else:
            common = shared + config.get("worker_setup_commands", [])
            yield name, node, node.get("worker_setup_commands", common)


def _open_doors(config: Config) -> Iterator[str]:
    """Yields ways in for strangers."""
    provider = config["provider"]
    if not any(TOKEN_FILE in path for path in config.get("file_mounts", {})):
        yield f"file_mounts: send ~/{TOKEN_FILE} to every node (`ray get-auth-token --generate`)"
    starts = [*config.get("head_start_ray_commands", []), *config.get("setup_commands", [])]
    if re.search(r"dashboard-host[= ](0\.0\.0\.0|::)", " ".join(starts)):
        yield "head_start_ray_commands: --dashboard-host=127.0.0.1; see it by `ray dashboard`"
    if provider["type"] != "aws":
        return
    if not provider.get("use_internal_ips"):
        yield "provider.use_internal_ips: true, or every node gets a public address"
    for rule in provider.get("security_group", {}).get("IpPermissions", []):
        if "0.0.0.0/0" in str(rule) or "::/0" in str(rule):
            yield f"provider.security_group: open to the world: {rule}"
    for name, node in config.get("available_node_types", {}).items():
        asked = node["node_config"]
        if not asked.get("SecurityGroupIds"):
            yield f"{name}: give SecurityGroupIds; Ray's own group opens ssh to the world"
        if any(card.get("AssociatePublicIpAddress") for card in asked.get("NetworkInterfaces", [])):
            yield f"{name}: AssociatePublicIpAddress must be false"


def _unreachable(
    name: str, node: Config, storage: str | None, config: Config, setup: str
) -> Iterator[str]:
    """Yields why a node could not use the storage."""
    provider = config["provider"]
    if storage is None:
        yield f"{name}: its setup must export {STORAGE}, a place that all nodes share"
    elif "://" in storage and not storage.startswith("file://"):
        if provider["type"] == "aws" and "IamInstanceProfile" not in node["node_config"]:
            yield f"{name}: give an IamInstanceProfile that may use {storage}"
    elif provider["type"] == "aws" or provider.get("worker_ips"):
        places = [word for word in _words(setup) if len(word) > 1 and storage.startswith(word)]
        if "mount" not in setup or not places:
            yield f"{name}: {storage} is this node's own disk; mount a shared one in its setup"
