"""Fewer workers than asked for: which numbers may be, and that every step stays what it is."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from test_cluster import stage_of

from kdscale.core.config import Distill, Execution
from kdscale.core.scale import MINI, resolve, resolve_vlm
from kdscale.core.types import ConfigError, ImpossibleResources
from kdscale.core.vlm_config import Finetune
from kdscale.stages.shares import allowed_workers, rows_at_once, workers_note
from kdscale.sweep.amounts import beside_recipe
from kdscale.sweep.check import check_recipe
from kdscale.sweep.fitting import concurrent_trials, demand, room

ELASTIC = Execution(num_workers=6, min_workers=2)


def distill(run: Execution = ELASTIC, student: str = "vit_t16", **fields: Any) -> Distill:
    sizes = {"global_batch_size": 24} | fields
    return resolve(Distill(student=student, loss="clip"), MINI, sizes | {"run": run})


def test_only_numbers_that_share_a_batch_equally_are_used() -> None:
    assert allowed_workers(distill()) == (2, 3, 4, 6)
    assert allowed_workers(distill(ELASTIC.replace(min_workers=None))) == (6,)
    assert allowed_workers(distill(ELASTIC.replace(micro_batch_size=4))) == (2, 3, 6)
    assert workers_note(distill()) == "distill: 2, 3, 4, 6 workers"


def test_batchnorm_groups_are_never_cut() -> None:
    whole = distill(student="mobilevit_s", bn_group=6)
    assert allowed_workers(whole) == (2, 4)
    check_recipe(whole)


def test_fewer_workers_do_in_turns_what_more_do_together() -> None:
    recipe = distill()
    assert [rows_at_once(recipe, n) for n in (6, 4, 3, 2)] == [4, 2, 4, 4]
    assert rows_at_once(distill(Execution(num_workers=2)), 2) == 12


def test_a_range_without_any_usable_number_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"none of 4 to 5 can; these could: 1, 2, 3, 6, 9, 18"):
        check_recipe(distill(Execution(num_workers=5, min_workers=4), global_batch_size=18))
    with pytest.raises(ConfigError, match="min_workers is 3, num_workers only 2"):
        Execution(num_workers=2, min_workers=3)


def test_workers_stay_as_many_where_numbers_or_checkpoints_depend_on_them() -> None:
    paper = distill(teacher="clip_b16", loss="clip_kd", mode="paper")
    assert allowed_workers(paper) == (6,)
    assert beside_recipe(paper) == {"world_size": 6}
    assert workers_note(paper).startswith("distill: always 6 workers, for the released code")
    sizes = {"global_batch_size": 24, "micro_batch_size": 2, "run": ELASTIC}
    models = {"vision": "vit_t16", "llm": "qwen2_0_5b"}
    stage = resolve_vlm(Finetune(data="llava_mix_665k", **models), MINI, sizes)
    assert allowed_workers(stage) == (2, 3, 4, 6)
    assert allowed_workers(stage.replace(run=ELASTIC.replace(deepspeed=True))) == (6,)


def test_the_fewest_workers_are_what_must_fit() -> None:
    run = ELASTIC.replace(gpus_per_worker=1, data_cpus=2)
    stage = stage_of(distill(run))
    assert demand(stage) == {"CPU": 4.0, "GPU": 2.0}
    assert concurrent_trials([stage], {"CPU": 64, "GPU": 4}) == 2


def test_workers_are_counted_by_the_nodes_that_hold_them() -> None:
    stage = stage_of(distill(Execution(num_workers=4, gpus_per_worker=2, data_cpus=1)))
    odd = [{"CPU": 8.0, "GPU": 3.0}] * 4
    total = {"CPU": 32.0, "GPU": 12.0}
    assert room({"CPU": 1.0, "GPU": 2.0}, odd) == 4
    assert room({"CPU": 0.1}, [{"CPU": 1.0}]) == 10
    assert concurrent_trials([stage], total, odd) == 1
    with pytest.raises(ImpossibleResources, match="hold 3 such: room on single nodes lacks"):
        concurrent_trials([stage], total, odd[:3])
    apart = [{"CPU": 32.0}, {"CPU": 0.0, "GPU": 12.0}]
    with pytest.raises(ImpossibleResources, match=r"1 CPU and 2 GPU each on one node.* CPU lacks"):
        concurrent_trials([stage], total, apart)


def train(world: Any, root: str, steps_here: int) -> None:
    """Trains some steps more, as a worker of a group of its own size."""
    import torch
    from worlds import small_job, synthetic

    from kdscale.core.types import StageStopped
    from kdscale.stages.loop import World
    from kdscale.stages.run import Run

    torch.set_num_threads(1)
    left = [steps_here]

    def leaving() -> bool:
        left[0] -= 1
        return left[0] == 0

    here = World(rank=world.rank, size=world.size, noticed=leaving)
    run = Execution(num_workers=4, min_workers=1, checkpoint_every=100)
    job = small_job(root, total_steps=6, run=run, bn_group=2)
    with suppress(StageStopped):
        Run(job, here, lambda _: None).train(synthetic(job, here))


def test_a_stage_that_goes_on_with_other_workers_takes_the_same_steps(tmp_path: Path) -> None:
    from worlds import small_job, spawn

    from kdscale.core.journal import JournalReader

    spawn(train, 1, str(tmp_path / "whole"), 100)
    spawn(train, 1, str(tmp_path / "some"), 2)
    spawn(train, 2, str(tmp_path / "some"), 2)
    spawn(train, 1, str(tmp_path / "some"), 100)
    stages = [small_job(str(tmp_path / name)).stage for name in ("whole", "some")]
    whole, some = (JournalReader(stage).new_lines() for stage in stages)
    assert [line["step"] for line in some] == [1, 2, 3, 4, 5, 6]
    assert [line["ids"] for line in some] == [line["ids"] for line in whole]
    for name in ("total", "task", "fd", "icl", "ckd", "logit_scale"):
        expected = [line[name] for line in whole]
        assert [line[name] for line in some] == pytest.approx(expected, rel=1e-4)
