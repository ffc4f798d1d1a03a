"""The streams of stages: what each kind wants of its data, as picklable configurations."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from kdscale.core.config import TowerSpec
from kdscale.core.vlm_config import ImageMode, LanguageModelSpec, VlmStage
from kdscale.data.instruct import check_template
from kdscale.data.instruct_stream import InstructConfig
from kdscale.data.samples import Crop
from kdscale.data.stream import StreamConfig
from kdscale.models.preprocess import eval_crop, tokenizer
from kdscale.stages.jobs import DistillJob, VlmInputs, VlmJob


def stream_config(job: DistillJob, num_workers: int = 1) -> StreamConfig:
    """Returns the stream of a job from its first step: pixels and tokens for each tower.

    Args:
        job: What is trained.
        num_workers: How many share it at this time.
    """
    recipe = job.recipe
    assert recipe.run is not None
    running = (recipe.student, recipe.teacher if job.cache is None else None)
    towers = [tower for tower in running if isinstance(tower, TowerSpec)]
    return StreamConfig(
        manifest=job.data,
        global_batch_size=recipe.global_batch_size,
        sizes=tuple(sorted({tower.image_px for tower in towers})),
        epochs=recipe.epochs,
        total_steps=job.total_steps,
        seed=recipe.seed,
        num_workers=num_workers,
        crop=Crop(seed=recipe.crop_seed, scale=recipe.crop_scale),
        views=recipe.views,
        captions=recipe.captions,
        cache=job.cache,
        tokenizers={tower.tokens_name: partial(_tokeniser, tower) for tower in towers},
        cpus_per_task=recipe.run.cpus_per_data_task,
        readers=max(1, round(recipe.run.data_cpus / 8)),  # reading is a tenth of decoding
    )


def _tokeniser(tower: TowerSpec) -> Callable[[list[str]], Any]:
    """Returns a tower's tokenizer as data tasks want it, without torch where it can be."""
    return tokenizer(tower).ids


def vlm_inputs(recipe: VlmStage) -> VlmInputs:
    """Returns what data tasks need of a VLM's models, made once where the models' code is loaded.

    Data tasks then start without torch, which would cost each of them many seconds.

    Raises:
        ConfigError: Conversations of `max_length` are longer than the language model was trained
            for, or leave no room beside an image; or the template teaches nothing with its
            tokenizer.
    """
    from kdscale.models.hf_towers import num_image_tokens
    from kdscale.models.language import IMAGE, load_tokenizer

    tower, model = recipe.vision, recipe.llm
    assert isinstance(tower, TowerSpec)
    assert isinstance(model, LanguageModelSpec)
    recipe.check_length()
    tokenizer: Any = load_tokenizer(model)
    inputs = VlmInputs(
        pickle.dumps(tokenizer),
        int(tokenizer.convert_tokens_to_ids(IMAGE)),
        num_image_tokens(tower, recipe.siglip_tokens, recipe.hierarchical_tokens),
    )
    check_template(
        recipe.template,
        tokenizer,
        image_token_id=inputs.image_token_id,
        num_image_tokens=inputs.num_image_tokens,
        max_length=recipe.max_length,
    )
    return inputs


def instruct_config(job: VlmJob, num_workers: int = 1) -> InstructConfig:
    """Returns the stream of a VLM job from its first step; arguments as of `stream_config`."""
    recipe, run, inputs = job.recipe, job.recipe.run, job.inputs
    tower = recipe.vision
    assert run is not None
    assert isinstance(tower, TowerSpec)
    return InstructConfig(
        manifest=job.data,
        global_batch_size=recipe.global_batch_size,
        micro_batch_size=recipe.micro_batch_size,
        template=recipe.template,
        tokenizer=partial(pickle.loads, inputs.tokenizer),
        image_token_id=inputs.image_token_id,
        num_image_tokens=inputs.num_image_tokens,
        max_length=recipe.max_length,
        image_px=tower.image_px,
        render=partial(renderer, tower),
        pad_colour=pad_colour(tower, recipe.image_mode),
        features=job.features,
        epochs=recipe.epochs,
        total_steps=job.total_steps,
        seed=recipe.seed,
        group_size=recipe.group_size if recipe.length_grouping else None,
        num_workers=num_workers,
        cpus_per_task=run.cpus_per_data_task,
        readers=max(1, round(run.data_cpus / 8)),
    )


def pad_colour(tower: TowerSpec, image_mode: ImageMode) -> tuple[int, int, int] | None:
    """Returns what fills images up to squares, as upstream computes it; None where nothing does."""
    red, green, blue = (int(255 * value) for value in tower.mean)
    return (red, green, blue) if image_mode == "pad" else None


def renderer(tower: TowerSpec) -> Callable[[np.ndarray], np.ndarray]:
    """Makes the function that gives a tower the pixels of conversations' images."""
    return partial(eval_crop, spec=tower, floor=True)
