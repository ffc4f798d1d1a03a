"""What is wrong with a `cluster.yaml`: Ray's own schema first, then what it would let pass."""

# pyright: basic
# (Ray carries too few types for strict checking)
from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
from collections.abc import Iterator
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from kdscale.core.types import ConfigError
from kdscale.sweep.cluster import CPU_LOCK, GPU_LOCK, STORAGE

MAX_IDLE_MINUTES = 60
PLACEHOLDER = re.compile(r"[a-z]+-0{17}|\w+://change-me[\w/.-]*")
TOKEN_FILE = ".ray/auth_token"
OTHER_MODE = re.compile(r"(?<!\$)\bRAY_AUTH_MODE\b(?!=['\"\\]*token\b)")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Without these Ray would take its own: a dashboard that all hosts reach, nodes with open ssh.
NEEDED_ON_AWS = ("head_start_ray_commands", "available_node_types")
# What Ray's schema leaves open and is read here.
READ_HERE = {
    "file_mounts": {"additionalProperties": {"type": "string"}},
    "available_node_types": {
        "additionalProperties": {
            "properties": {
                "node_config": {
                    "properties": {
                        "NetworkInterfaces": {"type": "array", "items": {"type": "object"}}
                    }
                }
            }
        }
    },
}
NEXT_STEP = {"required": "give it", "additionalProperties": "leave it out"}

# Each command of Ray's launcher runs in a login shell of its own, with which its exports end.
LASTING = "a file that login shells read, such as ~/.bashrc"
ENDS_PROGRAM = ";&|()\n"
INTO_FILE = (">", ">>", "tee", "-a")
READ_AT_LOGIN = re.compile(
    r".*/\.(bashrc|bash_profile|profile)|/etc/(profile|bash\.bashrc|profile\.d/.+\.sh)"
)
SETUP_SCRIPT, READ_BY_SCRIPT = "setup_node.sh", "/.kdscale/env.sh"
INSTALL = re.compile(
    r"(?:(?:sudo|env|exec|time|then|do|(?:ba)?sh|-\S+|\w+=\S*) )*"
    r"(?:(?:\S*/)?setup_node\.sh|(?:\S*python[\d.]* -m )?(?:\S*/)?(?:pip[\d.]*|uv)(?: \S+)*? "
    r"(?:install|sync)) (.*)"
)
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
    except (OSError, ValueError, yaml.YAMLError) as error:
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
    broken = [*_unreadable(config)] or [*_mistyped(config)] or [*_of_ray(config)]
    if broken:
        yield from broken
        return
    for name in sorted(set(PLACEHOLDER.findall(yaml.safe_dump(config)))):
        yield f"{name} is a placeholder: give yours in the cluster's description"
    yield from _open_doors(config)
    if not 0 < config.get("idle_timeout_minutes", 0) <= MAX_IDLE_MINUTES:
        yield f"idle_timeout_minutes: set 1 to {MAX_IDLE_MINUTES}, or idle nodes cost for ever"
    storages: dict[str, str | None] = {}
    for name, node, commands in _nodes(config):
        variables = exported(commands)
        if variables.get("RAY_AUTH_MODE") != "token":
            yield f"{name}: its setup must write `export RAY_AUTH_MODE=token` to {LASTING}"
        lock = GPU_LOCK if node.get("resources", {}).get("GPU") else CPU_LOCK
        if not any(_installs(command, lock) for command in commands):
            yield f"{name}: its setup must install {lock}, or nodes will differ"
        storages[name] = variables.get(STORAGE)
        setup = "\n".join(commands)
        yield from _unreachable(name, node, variables.get(STORAGE), config, setup)
    if len(set(storages.values())) > 1:
        yield f"{STORAGE} must be the same on every node, found {storages}"


def _fields(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yields all that a configuration holds, each with its place."""
    yield place, value
    below = value.items() if isinstance(value, dict) else ()
    for name, inner in enumerate(value) if isinstance(value, list) else below:
        yield from _fields(inner, f"{place}.{name}" if place else str(name))


def _unreadable(config: Config) -> Iterator[str]:
    """Yields nulls, and names that YAML does not read as text."""
    for place, value in _fields(config):
        if value is None:
            yield f"{place}: is null; give a value, or leave the field out"
        for name in value if isinstance(value, dict) else ():
            if not isinstance(name, str):
                yield f"{place or 'the file'}: the name {name!r} is no text; put it in quotes"


def _mistyped(config: Config) -> Iterator[str]:
    """Yields what Ray's own schema says, before defaults are filled in, and ours."""
    import ray.autoscaler
    from jsonschema import Draft7Validator

    of_ray = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    for schema in (of_ray, {"properties": READ_HERE}):
        for error in Draft7Validator(schema).iter_errors(config):
            place = ".".join(map(str, error.absolute_path)) or "the file"
            step = NEXT_STEP.get(str(error.validator), "change it, or leave it out")
            yield f"{place}: {error.message}; {step}"


def _of_ray(config: Config) -> Iterator[str]:
    """Yields what Ray's own rules say; defaults are filled in as `ray up` does."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    kind = config["provider"]["type"]
    if kind not in ("aws", "local"):
        yield f"provider.type: {kind!r} is not checked here; aws or local is"
        return
    remarks = io.StringIO()  # Ray prints them, and its errors once more
    try:
        with contextlib.redirect_stdout(remarks), contextlib.redirect_stderr(remarks):
            validate_config(prepare_config(deepcopy(config)))
    except Exception as error:  # whatever Ray stumbles over
        yield f"Ray: {error or type(error).__name__}"


def exported(commands: list[str]) -> dict[str, str]:
    """Returns the variables that a node's setup exports in files that login shells read."""
    found: dict[str, str] = {}
    by_script = any(SETUP_SCRIPT in command for command in commands)
    for command in commands:
        words = _words(command)
        if not any(
            before in INTO_FILE
            and (READ_AT_LOGIN.fullmatch(word) or (by_script and word.endswith(READ_BY_SCRIPT)))
            for before, word in pairwise(words)
        ):
            continue
        texts = [*words, *(" ".join(rest) for tool, *rest in _programs(command) if tool == "echo")]
        texts += [command] if "<<" in command else []
        for line in re.split(r"\n|\\n", "\n".join(texts)):
            match = re.fullmatch(r"\s*export (\w+)=(.*)", line)
            if match:
                found[match[1]] = next(iter(_words(match[2])), "")
    return found


def _installs(command: str, lock: str) -> bool:
    """Returns whether a command gives a lock to the setup's script, pip or uv."""
    calls = [INSTALL.fullmatch(" ".join(program)) for program in _programs(command)]
    files = [word for call in calls if call for word in call[1].split()]
    return any(re.split("[/=]", file)[-1] == lock for file in files)


def _dashboard_hosts(text: str) -> Iterator[str]:
    """Yields where a shell's text would have the dashboard listen."""
    for before, word in pairwise(["", *_words(text)]):
        if before == "--dashboard-host":
            yield word
        elif word.startswith("--dashboard-host="):
            yield word.partition("=")[2]
        elif " " in word:
            yield from _dashboard_hosts(word)


def _programs(text: str) -> Iterator[list[str]]:
    """Yields the words of each program that a shell's text runs, those of `sh -c` among them."""
    words: list[str] = []
    for before, word in pairwise(["", *_words(text), "\n"]):
        if re.fullmatch(r"-\w*c", before):
            yield from _programs(word)
        if word.strip(ENDS_PROGRAM) or not word:
            words.append(word)
        elif words:
            yield words
            words = []


def _words(text: str) -> list[str]:
    """Splits a shell's text into words and what is between them, ends of lines included."""
    text = text.replace("\\\n", " ")
    lexer = shlex.shlex(text, posix=True, punctuation_chars=ENDS_PROGRAM + "<>")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t\r", True, ""
    try:
        return list(lexer)
    except ValueError:  # a here-document with an apostrophe, for one
        return text.split()


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
    for place, text in _fields(config):
        if isinstance(text, str):
            if OTHER_MODE.search(text):
                yield f"{place}: set RAY_AUTH_MODE=token, as on every node, or leave it alone"
            for host in set(_dashboard_hosts(text)).difference(LOOPBACK):
                yield f"{place}: --dashboard-host={host}; give 127.0.0.1, and use `ray dashboard`"
    if provider["type"] != "aws":
        return
    for name in NEEDED_ON_AWS:
        if name not in config:
            yield f"{name}: give yours; Ray's own are open to strangers"
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
        yield f"{name}: its setup must write `export {STORAGE}=`, a place of all, to {LASTING}"
    elif "://" in storage and not storage.startswith("file://"):
        if provider["type"] == "aws" and "IamInstanceProfile" not in node.get("node_config", {}):
            yield f"{name}: give an IamInstanceProfile that may use {storage}"
    elif provider["type"] == "aws" or provider.get("worker_ips"):
        places = [word for word in _words(setup) if len(word) > 1 and storage.startswith(word)]
        if "mount" not in setup or not places:
            yield f"{name}: {storage} is this node's own disk; mount a shared one in its setup"
