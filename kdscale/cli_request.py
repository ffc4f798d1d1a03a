"""What the commands on sweeps are asked: sweep files, a scale, fields to set."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kdscale.core.config import Execution
from kdscale.core.scale import Scale, scale_named
from kdscale.core.storage import Storage
from kdscale.core.types import ConfigError
from kdscale.core.vlm_config import VLM_STAGES
from kdscale.sweep.grid import Sweep
from kdscale.sweep.plan import Plan, make_plan


@dataclass(frozen=True, kw_only=True)
class Request:
    """What run, plan, report and status were asked for."""

    sweeps: list[Sweep]
    storage: Storage
    scale: Scale
    overrides: dict[str, Any]
    tracking_uri: str | None
    as_json: bool
    command: str
    resume_stopped: bool = False

    def plan(self) -> Plan:
        """Plans the sweeps as one union of stages."""
        return make_plan(self.sweeps, self.storage, self.scale, self.overrides)


def common_scale(sweeps: Sequence[Sweep]) -> str | Scale:
    """Returns the scale that all the sweeps ask for."""
    if len({str(scale_named(sweep.scale).name) for sweep in sweeps}) > 1:
        raise ConfigError("these sweeps have different default scales; choose one with --scale")
    return sweeps[0].scale


def parse_data(patterns: Sequence[str]) -> dict[str, str]:
    """Turns `--data` options into {data set: pattern}; the empty name stands for all others.

    An `=` behind a `/` or `:` belongs to the pattern (`s3://bucket/date=2024/*.tar`).
    """
    paths: dict[str, str] = {}
    for item in patterns:
        name, found, pattern = item.partition("=")
        is_named = found and not {"/", ":"} & set(name)
        paths |= {name: pattern} if is_named else {"": item}
    return paths


def parse_settings(settings: Sequence[str], scale: Scale) -> dict[str, Any]:
    """Turns `--set` options into recipe fields; `distill.` in front of a field is allowed.

    Returns:
        {field: value}; `run` holds only the fields of the execution that are to change,
        `pretrain` and `finetune` those of one stage of a VLM.

    Raises:
        ConfigError: If an option is not of the form `a.b=value`.
        UnknownField: If `run` has no such field.
    """
    fields: dict[str, Any] = {}
    run: dict[str, Any] = {}
    for setting in settings:
        path, found, text = setting.partition("=")
        if not found:
            raise ConfigError(f"--set takes FIELD=VALUE, got {setting!r}")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        name = path.removeprefix("distill.")
        stage, _, field = name.partition(".")
        if name.startswith("run."):
            run[field] = value
        elif stage in VLM_STAGES:
            if not field:
                raise ConfigError(f"--set {setting}: say which field, e.g. {stage}.lr=1e-4")
            fields.setdefault(stage, {})[field] = value
        else:
            fields[name] = value
    if run:
        Execution(**(scale.run.model_dump() | run))
        fields["run"] = run
    return fields


def parse_seeds(text: str) -> tuple[int, ...]:
    """Turns `0,1,2` into seeds.

    Raises:
        ConfigError: If it is no list of different whole numbers.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts) or len(set(map(int, parts))) < len(parts):
        raise ConfigError(f"--seeds takes different whole numbers, as 0,1,2; got {text!r}")
    return tuple(map(int, parts))


def load_sweep(path: Path) -> Sweep:
    """Imports a sweep file and returns its `sweep`.

    Raises:
        ConfigError: If the file defines none.
    """
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # so that workers can import a loss defined there by name
    spec.loader.exec_module(module)
    found = getattr(module, "sweep", None)
    if not isinstance(found, Sweep):
        raise ConfigError(f"{path} defines no `sweep = Sweep(...)`")
    return replace(found, question=found.question or (module.__doc__ or "").strip())


def narrowed(sweep: Sweep, only: str) -> Sweep:
    """Returns a sweep with the recipes of one kind alone.

    Raises:
        ConfigError: It has none.
    """
    kept = [recipe for recipe in sweep.stages if recipe.kind == only]
    if not kept:
        kinds = " and ".join(dict.fromkeys(recipe.kind for recipe in sweep.stages))
        raise ConfigError(f"--only {only}: the trials of {sweep.name} end in {kinds}")
    return replace(sweep, stages=kept)
