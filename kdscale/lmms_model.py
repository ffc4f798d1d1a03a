"""A kdscale checkpoint behind the interface of lmms-eval 0.7: greedy answers to its requests.

Imported by lmms-eval alone (`kdscale.lmms_plugin`). Its prompts and rules are not those of
`kdscale evaluate`, and so are its scores.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from PIL import Image

from kdscale.core.types import ConfigError, DataError, unknown_name
from kdscale.eval.generate import BATCH_SIZE, IMAGE, Generator, Pixels, Prompt
from kdscale.models.language import DTYPES
from kdscale.models.vlm import load_vlm

DEFAULT_NEW_TOKENS = 512


class KdscaleVlm(lmms):  # type: ignore[misc]  # lmms-eval has no types
    """Answers lmms-eval's requests with a checkpoint in the hub's layout.

    Args:
        pretrained: The directory (`--model_args pretrained=DIR`).
        batch_size: Requests at once; lmms-eval passes `--batch_size` on.
        device: Where the model runs, None for a GPU if there is one.
        dtype: `fp32`, `bf16` or `fp16`.
        max_batch_size: Passed on by lmms-eval; without a meaning here.

    Raises:
        ConfigError: Several processes, which lmms-eval would want gathered.
        WeightsError: There is no such model.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = BATCH_SIZE,
        device: str | None = None,
        dtype: str = "fp32",
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError(
                "the kdscale model runs in one process; start lmms_eval without accelerate"
            )
        if dtype not in DTYPES:
            raise unknown_name("dtype", dtype, DTYPES)
        size = int(batch_size) if str(batch_size).isdecimal() else BATCH_SIZE
        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        loaded, processor = load_vlm(pretrained, dtype=DTYPES[dtype])
        model: Any = loaded
        self.pretrained = pretrained
        self._generate = Generator(model.to(place), processor, _pixels, batch_size=size)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers requests greedily.

        Args:
            requests: lmms-eval's instances, whose arguments are (context, settings, function that
                gives a document's images, document id, task, split).

        Returns:
            The answers in order, each cut off before the first of its settings' `until`.

        Raises:
            ConfigError: A task wants answers to be drawn, or several beams.
            DataError: A document shows something else than images.
        """
        asked = [self._prompt(*request.args) for request in requests]
        found = self._generate([prompt for prompt, _ in asked])
        texts: list[str] = []
        for request, (_, until), answer in zip(requests, asked, found, strict=True):
            text = answer.text
            for stop in until:
                text = text.partition(stop)[0]
            texts.append(text.strip())
            self.cache_hook.add_partial("generate_until", request.args[:2], texts[-1])
        return texts

    def _prompt(
        self,
        context: str,
        settings: dict[str, Any],
        images: Any,
        doc_id: Any,
        task: str,
        split: str,
    ) -> tuple[Prompt, list[str]]:
        """Turns a request into a prompt, and says what ends its answer."""
        name = f"{task} {doc_id}"
        if settings.get("do_sample") or (settings.get("num_beams") or 1) > 1:
            raise ConfigError(f"{name} asks for sampling or beams; this model answers greedily")
        until = settings.get("until") or []
        prompt = Prompt(
            name=name,
            # Where a task marks the place of its images, they still come first, as in training.
            text=context.replace(IMAGE, "").strip("\n"),
            images=tuple(_flat(images(self.task_dict[task][split][doc_id]), name)),
            max_new_tokens=int(settings.get("max_new_tokens") or DEFAULT_NEW_TOKENS),
        )
        return prompt, [until] if isinstance(until, str) else list(until)

    def loglikelihood(self, requests: Sequence[Any]) -> NoReturn:
        """Refuses.

        Raises:
            ConfigError: Always; the model only answers in words.
        """
        raise ConfigError("the kdscale model has no likelihoods; choose tasks of generate_until")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> NoReturn:
        """Refuses.

        Raises:
            ConfigError: Always; the model answers one question at a time.
        """
        raise ConfigError("the kdscale model answers single questions; choose other tasks")


def _flat(shown: Any, name: str) -> list[Image.Image]:
    """Returns the images that a document shows."""
    found = [] if shown is None else list(shown) if isinstance(shown, list | tuple) else [shown]
    for image in found:
        if not isinstance(image, Image.Image):
            raise DataError(f"{name} shows a {type(image).__name__}; this model sees images only")
    return found


def _pixels(image: Image.Image) -> Pixels:
    """Returns (H, W, 3) uint8 RGB."""
    try:
        return np.asarray(image.convert("RGB"))
    except OSError as error:
        raise DataError(str(error)) from error
