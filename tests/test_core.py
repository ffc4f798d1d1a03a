"""Recipes, scales, content keys, storage, journal."""

from __future__ import annotations

import errno
import io
import os
import re
from pathlib import Path

import pytest
from rich.console import Console

from kdscale.core.config import Choice, DataSpec, Distill, Execution, TowerSpec
from kdscale.core.journal import JournalReader, JournalWriter, read_steps
from kdscale.core.keys import content_key, describe_callable, local_files
from kdscale.core.scale import (
    MINI,
    PAPER,
    SCALES,
    default_bn_group,
    resolve,
    scale_named,
    teacher_of,
)
from kdscale.core.storage import StageStore, Storage
from kdscale.core.types import ConfigError, StorageError, UnknownField, UnknownName
from kdscale.data.raw import expand
from kdscale.sweep.grid import Sweep
from kdscale.sweep.plan import make_plan
from kdscale.sweep.progress import print_plan


def recipe(**fields: object) -> Distill:
    return Distill(**({"student": "vit_t16", "teacher": "clip_b16"} | fields))


def key(distill: Distill, **manifests: str) -> str:
    return content_key("distill", 1, resolve(distill, MINI), manifests)


def my_loss(student_image, student_text, *_rest):
    return (student_image * student_text).sum()


def test_defaults_are_the_papers() -> None:
    plain = resolve(recipe(), PAPER)
    assert (plain.epochs, plain.lr, plain.warmup_steps) == (32, 5e-4, 2000)
    assert (plain.global_batch_size, plain.precision) == (4096, "fp16")


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"los": "kl"}, UnknownField, r"no field .los.\. Did you mean loss\? Known: "),
        ({"lr": -1.0}, ConfigError, "lr"),
        ({"teacher": None, "loss": "clip_kd"}, ConfigError, "loss='clip'"),
        ({"loss": Choice(("kl", 7))}, ConfigError, "loss"),
        ({"run": Execution(num_workers=1), "bn_group": 0}, ConfigError, "bn_group"),
    ],
)
def test_bad_recipes_fail_at_construction(
    fields: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        recipe(**fields)


@pytest.mark.parametrize("field", ["student", "teacher", "data", "zero_shot"])
def test_unknown_roles_name_the_known_ones(field: str) -> None:
    unknown = recipe(**{field: "vit_t61"})
    with pytest.raises(UnknownName, match="Known: "):
        resolve(unknown, MINI) and teacher_of(unknown, MINI)


def test_the_default_bn_group_leaves_the_number_of_workers_free() -> None:
    assert resolve(recipe(), PAPER).bn_group == 256
    for batch in (16, 24, 64, 96, 128, 256, 1000, 4096):
        group = default_bn_group(batch)
        for workers in (1, 2, 4, 8):
            share, rest = divmod(batch, workers)
            assert rest or share % group == 0 or share % 2, (batch, workers)
    assert resolve(recipe(global_batch_size=64), PAPER).bn_group == 8
    assert resolve(recipe(bn_group=64), MINI).bn_group == 64
    assert [default_bn_group(batch) for batch in (1, 2, 6, 7)] == [2, 2, 2, 7]


def test_unknown_scale_is_named() -> None:
    with pytest.raises(UnknownName, match="mini"):
        scale_named("minni")
    assert set(SCALES) >= {"paper", "mini"}


def test_every_scale_knows_the_papers_roles() -> None:
    for role in ("clip_b16", "clip_l14", "siglip_so400m", "dfn_b16", "dfn_l14"):
        assert role in PAPER.teachers
        assert role in MINI.teachers
    for role in ("vit_t16", "mobilevit_s", "swin_t", "convnext_t"):
        assert role in PAPER.students
        assert role in MINI.students


def test_what_changes_numbers_changes_the_key() -> None:
    base = key(recipe())
    for fields in ({"lr": 1e-3}, {"seed": 1}, {"loss": "kl"}, {"mode": "paper"}, {"epochs": 64}):
        assert key(recipe(**fields)) != base, fields


def test_what_does_not_change_numbers_leaves_the_key() -> None:
    assert key(recipe(run=Execution(num_workers=4, log_every=1))) == key(recipe())
    spec = DataSpec(name="a", urls="/here/*.tar")
    moved = DataSpec(name="b", urls="/there/*.tar")
    keys = {
        content_key("distill", 1, resolve(recipe(data=data), MINI), {data.urls or "": "abc"})
        for data in (spec, moved)
    }
    assert len(keys) == 1


def test_the_manifest_enters_the_key() -> None:
    data = recipe(data=DataSpec(name="a", urls="/here/*.tar"))
    assert key(data, **{"/here/*.tar": "abc"}) != key(data, **{"/here/*.tar": "abd"})


def test_specs_may_stand_where_names_do() -> None:
    tower = MINI.students["vit_t16"]
    assert isinstance(tower, TowerSpec)
    assert key(recipe(student=tower.replace(name="mine"))) == key(recipe())


def test_files_of_a_directory_enter_the_key(tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    tower = TowerSpec(name="mine", clip_config="ViT-B-16", weights=str(weights), width=768)

    def planned() -> str:
        sweep = Sweep(name="x", stages=[recipe(teacher=tower)])
        (stage,) = make_plan([sweep], Storage(str(tmp_path)), PAPER, {}).stages
        return stage

    assert local_files(recipe(teacher=tower)) == {}
    weights.mkdir()
    (weights / "open_clip_model.safetensors").write_bytes(b"first")
    first = planned()
    assert planned() == first
    (weights / "open_clip_model.safetensors").write_bytes(b"other")
    assert planned() != first


def test_a_plan_counts_shards_and_says_when_a_cache_is_not_worth_it(tmp_path: Path) -> None:
    sweep = Sweep(name="x", stages=[recipe(teacher=None, loss="clip"), recipe()])
    online, cached = (
        make_plan([sweep], Storage(str(tmp_path)), MINI, {"views": 5, "teacher_outputs": outputs})
        for outputs in ("online", "cached")
    )
    assert online.trials[0].key == cached.trials[0].key  # the control has no teacher to cache
    assert online.trials[1].key != cached.trials[1].key
    text = io.StringIO()
    print_plan(cached, Console(file=text, width=300))
    assert re.search(r"embed mini CLIP B/16 x 5 .* 16 shards", text.getvalue())
    assert re.search(
        r"(?m)^teachers not worth a cache: \S+ instead of \S+ GPU-hours$", text.getvalue()
    )


def test_a_callable_enters_by_name_and_source() -> None:
    described = describe_callable(my_loss)
    assert described["callable"].endswith("test_core.my_loss")
    assert key(recipe(loss=my_loss)) != key(recipe())
    with pytest.raises(ConfigError, match="module level"):
        key(recipe(loss=lambda *features: 0))


def test_storage_writes_whole_files_or_none(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.write(b"one", "a", "b.txt")
    storage.write(b"two", "a", "b.txt")
    assert storage.read("a", "b.txt") == b"two"
    assert storage.names("a") == ["b.txt"]
    with pytest.raises(StorageError, match="does not exist"):
        storage.read("a", "c.txt")


def test_faults_of_the_disk_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    blocked = Storage(str(tmp_path / "file"))
    for act in (lambda: blocked.write(b"", "a"), lambda: blocked.create(b"", "a", "b")):
        with pytest.raises(StorageError, match=r"cannot write .*--storage"):
            act()
    with pytest.raises(StorageError, match="cannot read"):
        Storage(str(tmp_path)).read(".")


def test_a_disk_that_refuses_for_a_moment_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdscale.core.storage.LOOK_EVERY_S", 0.01)
    target, replace_file, codes = Storage(str(tmp_path)), os.replace, [errno.EROFS, errno.ENOSPC]

    def refuse(*paths: Path) -> None:
        if codes:
            raise OSError(codes.pop(), "not now")
        replace_file(*paths)

    monkeypatch.setattr(os, "replace", refuse)
    target.write(b"whole", "a")
    assert (target.read("a"), target.names()) == (b"whole", ["a"])
    codes.append(errno.EACCES)  # nobody will change that
    with pytest.raises(StorageError, match="cannot write"):
        target.write(b"", "b")
    monkeypatch.setattr("kdscale.core.storage.WAIT_S", 0.05)
    codes += [errno.EROFS] * 1000
    with pytest.raises(StorageError, match="not now"):
        target.write(b"", "c")


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Storage("~/runs").root == f"{tmp_path}/runs"
    (tmp_path / "a.tar").write_bytes(b"")
    assert expand("~/*.tar") == [f"{tmp_path}/a.tar"]


def test_storage_works_on_other_filesystems() -> None:
    storage = Storage("memory://runs")
    stage = StageStore(storage, "distill", "k" * 16)
    storage.write(b"1", *stage.parts, "checkpoints", "step.pt")
    stage.finish({"key": stage.key})
    assert stage.is_done()
    assert stage.record() == {"key": stage.key}
    assert storage.names(*stage.parts, "checkpoints") == []


def test_the_journal_keeps_the_last_attempt_of_a_step(tmp_path: Path) -> None:
    stage = StageStore(Storage(str(tmp_path)), "distill", "k" * 16)
    for attempt, steps in enumerate(((1, 2, 3), (3, 4))):
        writer = JournalWriter(stage, flush_every=2)
        for step in steps:
            writer.append({"step": step, "total": float(attempt)})
        writer.flush()
    assert len(JournalReader(stage).new_lines()) == 5
    assert [(line["step"], line["total"]) for line in read_steps(stage)] == [
        (1, 0.0),
        (2, 0.0),
        (3, 1.0),
        (4, 1.0),
    ]
    reader = JournalReader(stage)
    assert reader.new_lines()
    assert reader.new_lines() == []


def test_a_kill_while_finishing_keeps_what_resuming_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = StageStore(Storage(str(tmp_path)), "distill", "k")
    stage.storage.write(b"state", *stage.parts, "checkpoints", "step-000000008.pt")

    def killed(*_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stage.storage, "remove", killed)
    with pytest.raises(KeyboardInterrupt):
        stage.finish({})
    assert stage.is_done()
