"""The language stage: a miniature language model that reads before it sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kdscale.core.catalog_mini import MINI_LANGUAGE_MODELS
from kdscale.core.config import Execution, MiniWorld
from kdscale.core.journal import read_steps
from kdscale.core.scale import MINI, TRUE_SIZE_CPU
from kdscale.core.storage import Storage
from kdscale.core.types import DataError
from kdscale.core.vlm_config import Language, LanguageModelSpec, VlmStage
from kdscale.mini.text import texts
from kdscale.models.language import load_language, load_tokenizer
from kdscale.stages.jobs import LanguageJob
from kdscale.stages.language import LanguageRun, packed
from kdscale.stages.loop import World
from kdscale.stages.vlm import trained_weights
from kdscale.sweep.grid import Sweep, choose
from kdscale.sweep.plan import make_plan

ROLE = "qwen2_0_5b"
SMALL = Language(
    llm=MINI_LANGUAGE_MODELS[ROLE].llm,
    data=(MiniWorld(content="instruct", num_samples=64), MiniWorld(num_samples=64)),
    num_steps=8,
    batch_size=4,
    block_tokens=32,
    warmup_steps=2,
    run=Execution(num_workers=0),
)


def trained(root: Path) -> LanguageJob:
    job = LanguageJob("0" * 16, str(root), SMALL, {"kind": "language"})
    LanguageRun(job, World(), lambda _: None).train()
    return job


def test_the_text_is_that_of_conversations_and_captions_without_images() -> None:
    for world in SMALL.data:
        found = list(texts(world))
        assert len(found) == world.num_samples
        assert all(text.strip() == text and text and "<image>" not in text for text in found)


def test_texts_are_put_end_to_end() -> None:
    tokenizer = load_tokenizer(SMALL.llm)
    blocks = packed(["a red cross"] * 40, tokenizer, 16)
    line = [*tokenizer("a red cross", add_special_tokens=False)["input_ids"], 0]
    whole = np.array(line * 40)
    assert np.array_equal(np.concatenate(blocks), whole[: len(blocks) * 16])
    assert len(whole) - len(blocks) * 16 < 16
    with pytest.raises(DataError, match="do not fill one block"):
        packed(["a"], tokenizer, 16)


def test_it_learns_the_same_when_it_begins_again(tmp_path: Path) -> None:
    """The model is what a VLM stage then starts from, whatever its seed."""
    first, second = trained(tmp_path / "a"), trained(tmp_path / "b")
    losses = [[line["total"] for line in read_steps(job.stage)] for job in (first, second)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == SMALL.num_steps
    assert losses[0][-1] < losses[0][0] - 0.5
    spec = SMALL.llm.replace(weights=f"stage:language/{first.key}", config=None)
    with trained_weights(spec, Storage(first.storage_root)) as found:
        model, tokenizer = load_language(found, seed=3)
    drawn = load_language(SMALL.llm, seed=SMALL.seed)[0]
    assert len(tokenizer) <= model.get_input_embeddings().weight.shape[0]
    assert model.num_parameters() == drawn.num_parameters()
    assert not model.get_input_embeddings().weight.equal(drawn.get_input_embeddings().weight)


def test_one_stage_serves_all_vlms_of_a_plan(tmp_path: Path) -> None:
    from kdscale import Vlm

    vlm = Vlm(vision="vit_t16", llm=ROLE, recipe=choose("tinyllava", "bunny"))
    sweep = Sweep(name="x", stages=[vlm])
    plan = make_plan([sweep], Storage(str(tmp_path)), MINI, {})
    kinds = [stage.kind for stage in plan.stages.values()]
    assert kinds.count("language") == 1
    assert plan.trials[0].path[0] == plan.trials[1].path[0]
    for stage in plan.stages.values():
        if isinstance(stage.recipe, VlmStage):
            assert isinstance(stage.recipe.llm, LanguageModelSpec)
            assert stage.recipe.llm.weights == f"stage:language/{plan.trials[0].path[0]}"
    at_random = make_plan([sweep], Storage(str(tmp_path)), TRUE_SIZE_CPU, {})
    assert not any(stage.kind == "language" for stage in at_random.stages.values())
