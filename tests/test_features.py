"""Training from cached features equals training with the tower, and other features are refused."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from talks import manifest_of, parts_of, write_talks
from test_vlm_stage import attempt, changed, jobs
from vlm_parts import language, tower

import kdscale.stages.features as features_module
import kdscale.stages.vlm as vlm_module
from kdscale import Sweep
from kdscale.cli_request import parse_settings
from kdscale.core.config import DataSpec, Execution
from kdscale.core.journal import read_steps
from kdscale.core.scale import PAPER
from kdscale.core.storage import StageStore, Storage
from kdscale.core.types import CacheMismatch, CacheMissing, DataError, StageRefused
from kdscale.core.vlm_config import Features, Vlm, VlmStage
from kdscale.data.features import find_features, num_images, read_feature
from kdscale.data.shards import Manifest
from kdscale.stages.features import FeatureWriter, pending
from kdscale.stages.jobs import FeaturesJob, VlmJob, tower_of, vlm_features
from kdscale.stages.worker import embed
from kdscale.sweep.plan import Plan, make_plan
from kdscale.sweep.progress import print_plan

ALONE = Execution(num_workers=0)
STEPS = 4


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory, write_tar: Any) -> Manifest:
    return manifest_of(write_talks(tmp_path_factory.mktemp("talks"), write_tar))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory, write_tar: Any) -> Manifest:
    folder = tmp_path_factory.mktemp("texts")
    members = [part for n in range(8) for part in parts_of(f"{n:06d}", n, image=False)]
    write_tar(folder / "0.tar", members)
    return manifest_of(f"{folder}/*.tar")


def finetune(root: Path, recipe: str, name: str, data: Manifest) -> VlmJob:
    """Makes a short fine-tuning stage that begins with a random projector."""
    root.mkdir(exist_ok=True)
    job = jobs(root, recipe, (name, "qwen2_0_5b"), (data, data))[1]
    return replace(changed(job, projector=None), total_steps=min(STEPS, data.num_samples // 4))


def features_job(job: VlmJob, **fields: Any) -> FeaturesJob:
    """Makes the stage whose features another one reads."""
    recipe = vlm_features(job.recipe).replace(run=ALONE, **fields)
    return FeaturesJob("f" * 16, job.storage_root, recipe, job.data, {})


def reading(job: VlmJob) -> VlmJob:
    """Makes a stage read the features of `features_job`."""
    return changed(job, features=f"features:{'f' * 16}")


@pytest.fixture
def no_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a tower that runs during training fail."""
    real = vlm_module.vision_model

    def refused(*_: Any) -> None:
        raise AssertionError("the tower was run")

    def build(*args: Any) -> Any:
        model = real(*args)
        model.register_forward_pre_hook(refused)
        return model

    monkeypatch.setattr(vlm_module, "vision_model", build)


@pytest.mark.parametrize(
    ("recipe", "name", "rates"),
    [
        ("bunny", "clip_b16", {"lr": 1e-2, "projector_lr": 1e-2}),  # pads
        ("tinyllava", "siglip_so400m", {"lr": 3e-2}),  # drops a patch
        ("tinyllava_modern", "mobilevit_s", {"lr": 3e-2, "grad_clip": None}),
    ],
)
def test_cached_training_equals_online(
    recipe: str,
    name: str,
    rates: dict[str, Any],
    tmp_path: Path,
    talks: Manifest,
    request: pytest.FixtureRequest,
) -> None:
    """Learning is so fast here that other features would show, as those of other pixels do."""
    rates |= {"length_grouping": False}
    online, cached, other = (
        changed(finetune(tmp_path / where, recipe, name, talks), **rates)
        for where in ("online", "cached", "other")
    )
    expected = attempt(online)
    made = features_job(cached)
    embed(made)
    assert made.stage.is_done()
    assert [line["shards"] for line in read_steps(made.stage)] == [3, 3, 3]
    other = attempt(changed(other, vision=tower(name, mean=(0.9, 0.2, 0.5))))
    request.getfixturevalue("no_tower")
    found = attempt(reading(cached))
    assert len(found) == STEPS
    assert found == pytest.approx(expected, rel=1e-4)
    assert other != pytest.approx(expected, rel=5e-4)


def test_pretraining_reads_features_too(tmp_path: Path, write_tar: Any, no_tower: None) -> None:
    members = [part for n in range(0, 24, 3) for part in parts_of(f"{n:06d}", n)]
    data = manifest_of(write_tar(tmp_path / "0.tar", members))
    job = jobs(tmp_path, "bunny", ("vit_t16", "smollm_360m"), (data, data))[0]
    embed(features_job(job))
    assert len(attempt(reading(job))) == job.total_steps


def test_samples_without_images_need_no_features(tmp_path: Path, texts: Manifest) -> None:
    expected = attempt(finetune(tmp_path / "online", "tinyllava", "vit_t16", texts))
    job = finetune(tmp_path / "cached", "tinyllava", "vit_t16", texts)
    embed(features_job(job))
    assert attempt(reading(job)) == pytest.approx(expected, rel=1e-6)


def test_only_missing_shards_are_computed_again(tmp_path: Path, talks: Manifest) -> None:
    job = finetune(tmp_path, "bunny", "vit_t16", talks)
    made = features_job(job)
    embed(made)
    assert pending(made) == []
    files = sorted(Path(made.stage.url("output")).glob("*.safetensors"))
    assert len(files) == len(talks.shards)
    before = {file: file.stat().st_mtime_ns for file in files}
    ref = find_features(made.stage.url("output"), tower_of(made.recipe))
    gone = Path(ref.path(talks.shards[1]))
    gone.unlink()
    left_over = gone.parent / ".killed"
    left_over.mkdir()
    assert pending(made) == [1]
    embed(made)
    assert {f.name for f in files if f.stat().st_mtime_ns != before[f]} == {gone.name}
    assert not left_over.exists()
    double = replace(made, data=Manifest(talks.shards * 2, content="conversations"))
    assert pending(double) == []


def test_a_shard_is_written_whole_or_not_at_all(
    tmp_path: Path, talks: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = features_job(finetune(tmp_path, "bunny", "vit_t16", talks))
    monkeypatch.setattr(features_module, "BATCH_SIZE", 8)
    real, calls = features_module.tower_features, iter(range(9))

    def large(*args: Any) -> torch.Tensor:
        return real(*args) + (1e6 if next(calls) else 0.0)

    monkeypatch.setattr(features_module, "tower_features", large)
    with pytest.raises(StageRefused, match=r"do not fit into fp16.*feature_cache=False"):
        embed(made)
    assert made.stage.storage.names(*made.stage.parts, "output") == []
    with pytest.raises(DataError, match=r"'00\d+' in .*\.tar do not fit"):
        FeatureWriter(made, device="cpu")(0)


def test_features_on_an_object_store(talks: Manifest, tmp_path: Path) -> None:
    job = finetune(tmp_path, "tinyllava_modern", "vit_t16", talks)
    for root in (job.storage_root, "memory://features"):
        embed(replace(features_job(job), storage_root=root))
    here, there = (
        find_features(StageStore(Storage(root), "features", "f" * 16).url("output"), name)
        for name in [tower_of(vlm_features(job.recipe))]
        for root in (job.storage_root, "memory://features")
    )
    entry = talks.shards[2]
    assert num_images(entry) < entry.num_samples
    for place in (0, 5, entry.num_samples - 3):
        assert read_feature(there, entry, place) == read_feature(here, entry, place)
    assert np.frombuffer(read_feature(here, entry, 0), np.float16).any()


def test_features_of_others_are_refused_by_name(tmp_path: Path, talks: Manifest) -> None:
    job = finetune(tmp_path, "bunny", "vit_t16", talks)
    with pytest.raises(CacheMissing, match=r"no finished features.*DONE"):
        attempt(reading(job))
    embed(features_job(job))
    assert reading(job).features is not None
    for fields in (
        {"vision": tower("clip_b16")},
        {"vision": tower("vit_t16", mean=(0.5, 0.5, 0.5))},
        {"image_mode": "square"},
        {"siglip_tokens": "drop_first"},
        {"hierarchical_tokens": "stage3"},
        {"precision": "bf16"},
        {"seed": 1},  # the tower's weights are drawn
    ):
        with pytest.raises(CacheMismatch, match=r"features of 'vit_t16' .*, wanted are those of"):
            attempt(reading(changed(job, **fields)))


# -- plans -----------------------------------------------------------------------------------

CACHED = {"feature_cache": True}


def plan_of(root: Path, *seeds: int, **fields: Any) -> Plan:
    vlm = Vlm(**{"vision": "siglip_so400m", "recipe": "tinyllava", **fields})
    return make_plan(
        [Sweep(name="x", stages=[vlm], seeds=seeds or (0,))], Storage(str(root)), PAPER, {}
    )


def kinds(plan: Plan) -> list[str]:
    return [stage.kind for stage in plan.stages.values()]


def test_a_plan_adds_the_features_before_both_stages(tmp_path: Path) -> None:
    online, cached = plan_of(tmp_path), plan_of(tmp_path, pretrain=CACHED, finetune=CACHED)
    assert kinds(online) == ["pretrain", "finetune"]
    assert kinds(cached) == ["features", "features", "pretrain", "finetune"]
    assert set(online.stages) < set(cached.stages)  # features change no key
    for kind, data in (("pretrain", "llava_pretrain_558k"), ("finetune", "llava_mix_665k")):
        (stage,) = (s for s in cached.stages.values() if s.kind == kind)
        recipe = stage.recipe
        assert isinstance(recipe, VlmStage)
        features = cached.stages[str(recipe.features).removeprefix("features:")]
        assert features.key in stage.inputs
        assert isinstance(features.recipe, Features)
        assert features.recipe.data == PAPER.data[data]
        assert features.recipe.siglip_tokens == "drop_first"
    seeds = plan_of(tmp_path, 0, 1, finetune=CACHED)
    assert kinds(seeds) == ["features", "pretrain", "finetune", "pretrain", "finetune"]


def test_a_finished_stage_needs_no_features(tmp_path: Path) -> None:
    (key,) = (k for k, stage in plan_of(tmp_path).stages.items() if stage.kind == "pretrain")
    StageStore(Storage(str(tmp_path)), "pretrain", key).finish({})
    plan = plan_of(tmp_path, pretrain=CACHED, finetune=CACHED)
    assert kinds(plan) == ["features", "pretrain", "finetune"]


def test_a_planned_stage_is_run_and_read(tmp_path: Path, write_tar: Any) -> None:
    from kdscale.sweep.orders import group_job
    from kdscale.sweep.schedule import run_stages

    write_talks(tmp_path, write_tar)
    data = DataSpec(name="t", urls=f"{tmp_path}/*.tar")
    fields = {"data": data, "precision": "fp32", "run": ALONE, "global_batch_size": 16}
    fields |= {"max_length": 512}
    vision, llm = tower("swin_t"), language("qwen2_0_5b", tmp_path)
    both = {"pretrain": fields, "finetune": fields | CACHED}
    plan = plan_of(tmp_path / "store", vision=vision, llm=llm, **both)
    assert kinds(plan) == ["features", "pretrain", "finetune"]
    features, _, reader = plan.stages.values()
    assert features.total_steps == 3
    assert plan.document()["feature_cache"] is None  # nothing is known of this tower's work
    run_stages([features], plan.storage)
    assert features.store(plan.storage).record()["cache"]["shape"] == [4, 128]
    job = group_job(reader, "", plan.storage)
    assert isinstance(job, VlmJob)
    assert job.features is not None
    assert job.features.shape == (4, 128)
    assert job.record["features"] == f"features:{features.key}"
    assert plan_of(tmp_path / "store", vision=vision, llm=llm, **both).stages[features.key].reused


@pytest.mark.parametrize(
    ("name", "pretrain", "finetune", "gigabytes"),
    [
        ("siglip_so400m", 0.22, 0.14, 937),
        ("clip_l14", 0.16, 0.07, 293),
        ("clip_b16", 0.05, 0.02, 168),
        ("vit_t16", 0.01, 0.01, 42),
        ("swin_t", 0.04, 0.01, 42),
        ("mobilevit_s", 0.01, 0.01, 35),
    ],
)
def test_a_plan_says_what_a_cache_would_save(
    name: str, pretrain: float, finetune: float, gigabytes: float, tmp_path: Path
) -> None:
    plan = plan_of(tmp_path, vision=name, pretrain=CACHED)
    found = plan.document()["feature_cache"]
    assert found["share_saved"] == {
        "pretrain": pytest.approx(pretrain, abs=0.01),
        "finetune": pytest.approx(finetune, abs=0.01),
    }
    assert found["estimated"] is True
    (stage,) = (s for s in plan.stages.values() if s.kind == "features")
    assert stage.bytes_out == pytest.approx(gigabytes * 1e9, rel=0.02)
    online = plan_of(tmp_path, vision=name)
    assert online.document()["feature_cache"] == found  # whether it is on or off
    # One epoch of one trial runs the tower once anyhow, and what does not fill a batch with it.
    assert found["cached_gpu_hours"] == pytest.approx(found["online_gpu_hours"], rel=1e-3)
    twice = plan_of(tmp_path, 0, 1, vision=name).document()["feature_cache"]
    assert twice["online_gpu_hours"] == pytest.approx(2 * found["online_gpu_hours"])
    is_drawn = PAPER.students.get(name) is not None  # by the seed, so nothing can be shared
    assert twice["bytes_stored"] == (2 if is_drawn else 1) * found["bytes_stored"]
    assert is_drawn or twice["cached_gpu_hours"] < twice["online_gpu_hours"]


def test_the_saving_is_printed(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    print_plan(plan_of(tmp_path, 0, 1), console)
    said = console.file.getvalue()  # pyright: ignore
    assert "VLM towers online " in said
    assert "less work in pretrain 23%, finetune 14%" in said
    assert "(feature_cache=True)" in said


def test_one_stage_can_be_set_from_the_command_line() -> None:
    found = parse_settings(["pretrain.feature_cache=true", "finetune.lr=1e-4"], PAPER)
    assert found == {"pretrain": {"feature_cache": True}, "finetune": {"lr": 1e-4}}
