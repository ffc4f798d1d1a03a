"""The VLM stages: train a projector, then projector and language model, on conversations.

The loop is that of transformers' Trainer, alone or under DeepSpeed. What a step trains on, and the
noise of its dropout, is a function of (seed, step) and not of the workers: micro-batches come
from `kdscale.data.instruct_stream`, and each begins with a random state of its own.
Shape suffixes: B samples of a micro-batch, T tokens.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import LlavaForConditionalGeneration, LlavaProcessor, Trainer, TrainingArguments

from kdscale.core.config import STAGE_WEIGHTS, Execution, TowerSpec
from kdscale.core.storage import Storage
from kdscale.core.types import CheckpointError
from kdscale.core.vlm_config import LanguageModelSpec, VlmStage
from kdscale.data.collate import collate
from kdscale.data.instruct import IGNORE
from kdscale.data.instruct_stream import InstructBatch
from kdscale.data.templates import chat_template
from kdscale.models.hf_towers import vision_model
from kdscale.models.language import DTYPES, Attention, attention_for, load_language
from kdscale.models.towers import load_tower
from kdscale.models.vlm import (
    build_vlm,
    load_projector,
    normalise_pixels,
    parameter_groups,
    prepare_training,
)
from kdscale.stages.jobs import VlmJob
from kdscale.stages.loop import World, check_precision

LEARNT = "learnt.safetensors"


@dataclass(frozen=True)
class Built:
    """A VLM that is ready to be trained, and what feeds it.

    Attributes:
        attention: The language model's attention, and why.
    """

    model: LlavaForConditionalGeneration
    processor: LlavaProcessor
    attention: Attention


def uses_deepspeed(recipe: VlmStage) -> bool:
    """Tells whether a stage runs under DeepSpeed."""
    return recipe.run is not None and recipe.run.deepspeed


def build(job: VlmJob, device: torch.device) -> Built:
    """Builds a stage's model: tower, projector and language model, with what learns set free."""
    recipe, storage = job.recipe, Storage(job.storage_root)
    tower, spec = recipe.vision, recipe.llm
    assert isinstance(tower, TowerSpec)
    assert isinstance(spec, LanguageModelSpec)
    precision = recipe.precision or "fp32"
    check_precision(precision, device.type)
    attention = attention_for(recipe.attention, device, precision)
    # DeepSpeed keeps fp32 copies of its own; without it autocast wants fp32 weights.
    dtype = DTYPES[precision] if uses_deepspeed(recipe) else torch.float32
    clip = load_tower(tower, storage, seed=recipe.seed)
    vision = vision_model(clip, tower, recipe.hierarchical_tokens)
    with trained_weights(spec, storage) as found:
        language, tokenizer = load_language(
            found, seed=recipe.seed, dtype=dtype, attention=attention.name
        )
    model, processor = build_vlm(
        vision, language, tokenizer, recipe, tower, chat_template=chat_template(recipe.template)
    )
    projector = getattr(recipe, "projector", None)
    if projector is not None:
        kind, key = projector.removeprefix(STAGE_WEIGHTS).split("/")
        with storage.local_directory("stages", kind, key, "output") as directory:
            load_projector(model, directory)
    return Built(prepare_training(model, recipe), processor, attention)


@contextmanager
def trained_weights(spec: LanguageModelSpec, storage: Storage) -> Generator[LanguageModelSpec]:
    """Yields a language model with the directory of the stage that trained it, where one did."""
    if not spec.weights.startswith(STAGE_WEIGHTS):
        yield spec
        return
    kind, key = spec.weights.removeprefix(STAGE_WEIGHTS).split("/")
    with storage.local_directory("stages", kind, key, "output", "model") as directory:
        yield spec.replace(weights=directory)


def training_arguments(job: VlmJob, world: World, directory: str) -> TrainingArguments:
    """Translates a recipe into the Trainer's terms.

    Args:
        directory: Scratch space of this worker.
    """
    recipe, run, on_cpu = job.recipe, job.recipe.run or Execution(), world.device.type == "cpu"
    parts = recipe.global_batch_size // (recipe.micro_batch_size * world.size)
    return TrainingArguments(
        output_dir=directory,
        max_steps=job.total_steps,
        per_device_train_batch_size=recipe.micro_batch_size,
        gradient_accumulation_steps=parts,
        learning_rate=recipe.lr,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.grad_clip or 0.0,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(recipe.warmup_ratio * job.total_steps),
        bf16=recipe.precision == "bf16",
        fp16=recipe.precision == "fp16",
        tf32=None,
        use_cpu=on_cpu,
        activation_checkpointing=not on_cpu,
        activation_checkpointing_kwargs=None if on_cpu else {"use_reentrant": False},
        ddp_find_unused_parameters=False,
        ddp_backend="gloo" if on_cpu and world.size > 1 else None,
        deepspeed=deepspeed_config(recipe, on_cpu) if uses_deepspeed(recipe) else None,
        save_strategy="steps",
        save_steps=run.checkpoint_every,
        save_total_limit=1,
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        ignore_data_skip=True,
        dataloader_pin_memory=not on_cpu,
        seed=recipe.seed,
    )


def deepspeed_config(recipe: VlmStage, on_cpu: bool) -> dict[str, Any]:
    """Generates DeepSpeed's configuration.

    Clipping is written out: DeepSpeed's own default was 0 (off) when the paper's recipes were
    made and is 1 today.
    """
    precision = recipe.precision
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": recipe.grad_clip or 0.0,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16", "loss_scale": 0, "initial_scale_power": 16},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": recipe.zero_stage,
            "overlap_comm": not on_cpu,
            "contiguous_gradients": True,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
    }


@dataclass
class StepData:
    """What a step was trained on, on this worker.

    Attributes:
        num_tokens: Attended tokens, images expanded.
        num_learnt: Tokens with a label.
        num_masked: Samples without any, as the references have them too.
    """

    step: int
    epoch: int
    rows: list[int]
    keys: list[str]
    num_tokens: int = 0
    num_learnt: int = 0
    num_masked: int = 0


class MicroBatches(IterableDataset[dict[str, Any]]):
    """This worker's micro-batches from a step on, collated.

    Attributes:
        steps: What has been given out, a step each, until somebody takes it.
    """

    def __init__(
        self, job: VlmJob, world: World, processor: LlavaProcessor, shape: tuple[int, ...]
    ) -> None:
        self._job, self._world, self._shape = job, world, shape
        self._options = {
            "pad_id": processor.tokenizer.pad_token_id,
            "image_token_id": processor.image_token_id,
        }
        self.source: Iterator[InstructBatch] = iter(())
        self.steps: deque[StepData] = deque()
        self.num_image_tokens = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields the Trainer's inputs, and `draw`: the seed of the forward pass's noise."""
        for batch in self.source:
            data = StepData(batch.step, batch.epoch, [], [])
            self.steps.append(data)
            for place, micro in enumerate(batch.micro):
                columns = collate(
                    micro.encoded,
                    micro.pixels,
                    num_image_tokens=self.num_image_tokens,
                    pixel_shape=self._shape,
                    **self._options,
                )
                data.rows += micro.rows.tolist()
                data.keys += micro.keys
                learnt_B = (columns["labels"][:, 1:] != IGNORE).sum(dim=1)
                data.num_tokens += int(columns["attention_mask"].sum())
                data.num_learnt += int(learnt_B.sum())
                data.num_masked += int((learnt_B == 0).sum())
                number = place * self._world.size + self._world.rank
                yield {**columns, "draw": draw(self._job.recipe.seed, batch.step, number)}


def draw(seed: int, step: int, micro_batch: int) -> int:
    """Returns the seed of one micro-batch's noise."""
    digest = blake2b(f"{seed}/{step}/{micro_batch}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")


class StageTrainer(Trainer):
    """transformers' Trainer, fed by the stream.

    Args:
        built: Model and processor.
        batches: This worker's micro-batches.
        recipe: Gives the optimizer's groups and the normalisation of the loss.
        arguments: From `training_arguments`.
    """

    def __init__(
        self,
        built: Built,
        batches: MicroBatches,
        recipe: VlmStage,
        arguments: TrainingArguments,
        callbacks: list[Any],
    ) -> None:
        self._recipe, self._batches = recipe, batches
        groups = parameter_groups(built.model, recipe)
        self._peaks = [float(group["lr"]) for group in groups]
        optimizer = torch.optim.AdamW(groups, lr=recipe.lr)
        super().__init__(
            model=built.model,
            args=arguments,
            train_dataset=batches,
            optimizers=(optimizer, None),
            callbacks=callbacks,
        )
        # False: the mean of the micro-batches' means. True: one mean over the step's tokens.
        self.model_accepts_loss_kwargs = recipe.loss_norm == "update"
        self.step_loss: Tensor | None = None

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Returns the micro-batches as they come: they are shared out already."""
        return DataLoader(self._batches, batch_size=None)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Trains on one micro-batch and adds its part to the step's loss."""
        inputs = dict(inputs)
        torch.manual_seed(inputs.pop("draw"))
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.step_loss = loss if self.step_loss is None else self.step_loss + loss
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Normalises the pixels on the device; a micro-batch without a label adds nothing."""
        tower = self._recipe.vision
        assert isinstance(tower, TowerSpec)
        pixels = normalise_pixels(inputs["pixel_values"], tower)
        dtype = next(model.parameters()).dtype
        inputs = inputs | {"pixel_values": pixels.to(dtype)}
        if bool((inputs["labels"][:, 1:] != IGNORE).any()):
            return super().compute_loss(model, inputs, *args, **kwargs)
        labels = inputs.pop("labels")
        del labels
        return model(**inputs).logits.float().sum() * 0.0

    def rates(self) -> dict[str, float]:
        """Returns the next step's learning rates: `lr`, and `projector_lr` where it has its own."""
        scheduler: Any = self.lr_scheduler
        # One schedule for all groups, of which DeepSpeed makes more.
        factor = max(scheduler.get_last_lr()) / max(self._peaks)
        lr = self._recipe.lr
        return {"lr" if peak == lr else "projector_lr": factor * peak for peak in self._peaks}

    def take_loss(self, world: World) -> float:
        """Returns the global loss of the step that just ended."""
        assert self.step_loss is not None
        total = world.sum(self.step_loss.detach().float().clone())
        self.step_loss = None
        return float(total) / world.size

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Writes what learns, and nothing else."""
        folder = Path(output_dir or self.args.output_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        model: Any = self.model
        save_file(learnt(model, state_dict), folder / LEARNT)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Reads what `_save` wrote.

        Raises:
            CheckpointError: It cannot be read, or is not of this model.
        """
        path = Path(resume_from_checkpoint, LEARNT)
        try:
            state = load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{path.name} of {path.parent.name} cannot be read ({error}): remove that step "
                "from the stage's checkpoints, and it goes on from the one before"
            ) from error
        target: Any = model or self.model
        fill(target, state)


def learnt(model: nn.Module, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Returns the tensors that a stage trains, on the CPU.

    Args:
        model: A model in training.
        state: Its tensors where the model itself holds only parts of them (ZeRO-3).
    """
    names = [name for name, value in model.named_parameters() if value.requires_grad]
    whole = dict(model.named_parameters()) if state is None else state
    return {name: whole[name].detach().cpu().contiguous() for name in names}


def fill(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Gives a model in training the tensors that `learnt` has taken from one, in place.

    Raises:
        CheckpointError: They are not of such a model.
    """
    own = {n: p.shape for n, p in model.named_parameters() if p.requires_grad}
    found = {n: value.shape for n, value in state.items()}
    differing = sorted(n for n in own.keys() | found.keys() if own.get(n) != found.get(n))
    if differing:
        name = differing[0]
        raise CheckpointError(
            f"the checkpoint is of another model: {name} is {_shape(found.get(name))} there and "
            f"{_shape(own.get(name))} here, {len(differing)} differ in all; remove the stage's "
            "checkpoints, and it begins anew"
        )
    model.load_state_dict(state, strict=False)


def _shape(shape: torch.Size | None) -> str:
    """Puts the shape of a tensor that may be absent in words."""
    return "nothing" if shape is None else f"of shape {tuple(shape)}"
