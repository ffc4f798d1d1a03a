"""Students trained elsewhere: what their files hold, and how a sweep takes them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from worlds import timm_tower, vit

from kdscale import Distill, Pretrained, Sweep, TowerSpec, Vlm
from kdscale.core.scale import PAPER, TRUE_SIZE_CPU
from kdscale.core.storage import Storage
from kdscale.core.types import ConfigError, UnknownName, WeightsError
from kdscale.models.towers import build_clip, save_clip
from kdscale.sweep.plan import Plan, make_plan

UNGATED = PAPER.replace(gates=False)


def released(model: torch.nn.Module, path: Path, **changes: Any) -> Path:
    """Writes a checkpoint as open_clip's trainer does, from under DDP."""
    state = {f"module.{name}": value for name, value in (model.state_dict() | changes).items()}
    more = {"epoch": 32, "name": "run", "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]}}
    torch.save(more | {"state_dict": state}, path)
    return path


def as_before_timm_09(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Names a Swin's tensors as timm did: a stage ends with its downsampling."""
    state: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        found = re.fullmatch(r"(visual\.trunk\.layers\.)(\d)(\.downsample.*)", name)
        state[f"{found[1]}{int(found[2]) - 1}{found[3]}" if found else name] = value
    block = "visual.trunk.layers.0.blocks.1."
    return state | {
        f"{block}attn.relative_position_index": torch.zeros(49, 49, dtype=torch.long),
        f"{block}attn_mask": torch.zeros(4, 49, 49),
    }


def assert_loads(spec: TowerSpec, path: Path, model: torch.nn.Module) -> None:
    loaded = build_clip(spec.replace(weights=str(path)), seed=9).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded[name], value), name


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return build_clip(vit(), seed=1)


def test_files_of_open_clip_are_read(model: torch.nn.Module, tmp_path: Path) -> None:
    assert_loads(vit(), released(model, tmp_path / "epoch_32.pt"), model)
    torch.save(model.state_dict(), tmp_path / "bare.bin")
    assert_loads(vit(), tmp_path / "bare.bin", model)
    save_file(model.state_dict(), tmp_path / "bare.safetensors")
    assert_loads(vit(), tmp_path / "bare.safetensors", model)
    save_clip(model, vit(), tmp_path / "hub")
    assert_loads(vit(), tmp_path / "hub", model)


def test_a_swin_of_an_older_timm_is_read_as_today_s(tmp_path: Path) -> None:
    spec = timm_tower("swin_tiny_patch4_window7_224", 768)
    swin = build_clip(spec, seed=1)
    old = {f"module.{name}": value for name, value in as_before_timm_09(swin).items()}
    assert "module.visual.trunk.layers.0.downsample.reduction.weight" in old
    torch.save({"state_dict": old}, tmp_path / "swin.pt")
    assert_loads(spec, tmp_path / "swin.pt", swin)


class Payload:
    """What a checkpoint must not be able to bring along."""


def test_what_does_not_fit_is_named(model: torch.nn.Module, tmp_path: Path) -> None:
    def error(path: Path, spec: TowerSpec | None = None) -> str:
        with pytest.raises(WeightsError) as caught:
            build_clip((spec or vit()).replace(weights=str(path)))
        return str(caught.value)

    file = released(model, tmp_path / "vit.pt", surplus=torch.zeros(1))
    assert "1 unexpected (surplus)" in error(file)
    wide = error(released(model, tmp_path / "vit.pt"), vit(24))
    assert "wrong shapes (" in wide
    assert "expected (32, 24)" in wide
    other = error(tmp_path / "vit.pt", timm_tower("mobilevit_xxs", 320))
    assert re.search(r"\d+ missing \(visual\.head.*, \.\.\.\)", other)
    assert re.search(r"\d+ unexpected \(visual\.class_embedding.*, \.\.\.\)", other)
    torch.save({"model": Payload()}, tmp_path / "code.pt")
    assert "cannot be read: UnpicklingError" in error(tmp_path / "code.pt")
    torch.save({"epoch": 3, "weights": [1.0]}, tmp_path / "note.pt")
    assert "2 entries (epoch, weights) are no tensors" in error(tmp_path / "note.pt")
    (tmp_path / "cut.pt").write_bytes(file.read_bytes()[:1000])
    assert "cannot be read" in error(tmp_path / "cut.pt")


def plan_of(root: Path, stage: Distill | Vlm, scale: Any = UNGATED) -> Plan:
    return make_plan([Sweep(name="x", stages=[stage])], Storage(str(root)), scale, {})


def test_a_file_s_contents_are_in_the_key_and_its_place_is_not(
    model: torch.nn.Module, tmp_path: Path
) -> None:
    def keys(path: Path) -> list[str]:
        student = Pretrained(str(path), student=vit())
        more = Distill(student=student, teacher="clip_b16")
        return [*plan_of(tmp_path, more).stages, *plan_of(tmp_path, Vlm(vision=student)).stages]

    file = released(model, tmp_path / "a.pt")
    first = keys(file)
    assert len(set(first)) == 3  # distill, pretrain, finetune
    assert keys(file.rename(tmp_path / "b.pt")) == first
    released(build_clip(vit(), seed=2), tmp_path / "b.pt")
    assert not set(keys(tmp_path / "b.pt")) & set(first)


def test_roles_paths_and_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "swin.pt").write_bytes(b"0")
    monkeypatch.chdir(tmp_path)
    student = Pretrained("swin.pt", student="swin_t")
    plan = plan_of(tmp_path, Vlm(vision=student))
    stage: Any = next(iter(plan.stages.values()))
    assert stage.recipe.vision == PAPER.students["swin_t"].replace(
        weights=str(tmp_path / "swin.pt"), name=stage.recipe.vision.name
    )
    assert "swin_t of swin.pt" in plan.trials[0].trial.name
    absent = Distill(student=Pretrained("gone.pt", student="swin_t"), loss="clip")
    with pytest.raises(WeightsError, match=r"gone\.pt does not exist; Pretrained takes"):
        plan_of(tmp_path, absent)
    (walk,) = plan_of(tmp_path, absent, TRUE_SIZE_CPU).stages.values()
    assert walk.training.student.weights == "random"  # pyright: ignore
    with pytest.raises(UnknownName, match="swin_t"):
        plan_of(tmp_path, Vlm(vision=Pretrained("swin.pt", student="swin_x")))
    with pytest.raises(ConfigError, match="student"):
        Pretrained("swin.pt")
