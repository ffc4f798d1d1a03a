"""The step loop of contrastive training: gather, accumulate, schedule, resume.

One optimizer step sees one global batch, whatever the number of workers or micro-batches: each
worker encodes its rows, features are gathered, the loss is computed on all of them, and the
gradient of a worker's rows goes back through its encoder. With several micro-batches features
are computed first without a graph and each micro-batch is replayed (gradient caching, Gao et
al. 2021, arXiv 2101.06983).
Shape suffixes: B rows of one worker, D width.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kdscale.core.config import Distill, Precision
from kdscale.core.types import ConfigError, PrecisionError
from kdscale.stages.exchange import exchange

Encode = Callable[[slice], tuple[Tensor, ...]]
NO_DECAY = ("bn", "ln", "bias", "logit_scale", "logit_bias")


def _nobody() -> bool:
    """Tells that no notice has come."""
    return False


@dataclass(frozen=True)
class World:
    """This process's place among the workers.

    Attributes:
        noticed: Tells whether this process, or its machine, is to go away soon.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    noticed: Callable[[], bool] = _nobody

    @property
    def is_first(self) -> bool:
        """Whether this worker writes what is written once."""
        return self.rank == 0

    def wait(self) -> None:
        """Returns when every worker has come here."""
        if self.size > 1:
            dist.barrier()

    def sum(self, tensor: Tensor) -> Tensor:
        """Returns the sum of a tensor over all workers."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor


def check_precision(precision: Precision, device_type: str) -> None:
    """Refuses fp16 on a CPU, where it is emulated and some hundred times slower.

    Raises:
        PrecisionError: With what to choose instead.
    """
    if precision == "fp16" and device_type == "cpu":
        raise PrecisionError(
            "fp16 on a CPU is emulated and unusably slow; use precision='fp32' or 'bf16', "
            "or give the workers GPUs (Execution.gpus_per_worker)"
        )


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Returns the autocast context of a precision."""
    if precision == "fp32":
        return nullcontext()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    return torch.autocast(device.type, dtype=dtype)


def gradient_scaler(precision: Precision, device: torch.device) -> torch.amp.GradScaler:
    """Returns the gradient scaler of a precision, which only fp16 uses.

    `backward_step` multiplies gradients by its factor, so `scaler.scale` is never called on a loss;
    that call is also what makes the scaler's own tensors, without which it refuses to step.
    """
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    scaler.scale(torch.zeros((), device=device))
    return scaler


def learning_rate(step: int, *, lr: float, warmup_steps: int, total_steps: int) -> float:
    """Returns the learning rate of a step (0-based): linear warm-up, then cosine to zero.

    Source:
        CLIP-KD's and open_clip's `cosine_lr`.
    """
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * lr * (1 + math.cos(math.pi * progress))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Splits a student's parameters as CLIP-KD does: gains, biases and scales do not decay."""
    decay: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        exempt = parameter.ndim < 2 or any(part in name for part in NO_DECAY)
        (rest if exempt else decay).append(parameter)
    groups = [
        {"params": decay, "weight_decay": weight_decay, "clip_grad": True},
        {"params": rest, "weight_decay": 0.0, "clip_grad": True},
    ]
    return [group for group in groups if group["params"]]


def adam_options(recipe: Distill, by_name: bool) -> dict[str, object]:
    """Returns AdamW's betas and eps; `by_name` repeats the reference's test for "vit"."""
    if not by_name:
        return {"betas": recipe.betas, "eps": recipe.eps}
    name = recipe.student if isinstance(recipe.student, str) else recipe.student.name
    if "vit" in name.lower():
        return {"betas": (0.9, 0.98), "eps": 1e-6}
    return {"betas": (0.9, 0.999), "eps": 1e-8}


def micro_batches(num_rows: int, micro_batch_size: int | None) -> list[slice]:
    """Splits a worker's rows into micro-batches.

    Raises:
        ConfigError: If they do not divide the rows.
    """
    size = micro_batch_size or num_rows
    if num_rows % size:
        raise ConfigError(
            f"micro_batch_size {size} does not divide the {num_rows} rows of a worker; "
            "choose a divisor"
        )
    return [slice(start, start + size) for start in range(0, num_rows, size)]


def backward_step(
    encoder: nn.Module,
    encode: Callable[[slice, bool], tuple[Tensor, ...]],
    loss_fn: Callable[..., dict[str, Tensor]],
    parts: Sequence[slice],
    options: ExchangeOptions,
) -> dict[str, Tensor]:
    """Accumulates the gradient of one global batch in the parameters' `.grad`.

    Args:
        encoder: The module whose forward `encode` calls (under DDP with several workers).
        encode: Maps (rows, replay) to this worker's features; `replay` tells that the rows were
            encoded before in this step, so that running statistics must not see them again.
        loss_fn: Maps gathered features, in order, to scalars with a `total`.
        parts: This worker's micro-batches.
        options: How gradients cross workers.

    Returns:
        The detached terms of the global loss, the same on every worker.
    """
    if len(parts) == 1:
        features = encode(parts[0], False)
        terms, gradients = exchange(
            [f.detach().float() for f in features],
            loss_fn,
            detached=options.detached,
            synced=options.synced,
        )
        _backward(features, gradients, options.scale)
        return terms
    with torch.no_grad():
        pieces = [encode(rows, False) for rows in parts]
    whole = [torch.cat(column).float() for column in zip(*pieces, strict=True)]
    terms, gradients = exchange(whole, loss_fn, detached=options.detached, synced=options.synced)
    for index, rows in enumerate(parts):
        with _maybe_no_sync(encoder, index < len(parts) - 1):
            _backward(encode(rows, True), [g[rows] for g in gradients], options.scale)
    return terms


@dataclass(frozen=True)
class ExchangeOptions:
    """How gradients cross workers, and the factor of a gradient scaler."""

    detached: bool = False
    synced: bool = True
    scale: float = 1.0


def _backward(features: Sequence[Tensor], gradients: Sequence[Tensor], scale: float) -> None:
    """Sends feature gradients back through the encoder."""
    scaled = [(g * scale).to(f.dtype) for f, g in zip(features, gradients, strict=True)]
    torch.autograd.backward(list(features), scaled)


def _maybe_no_sync(encoder: nn.Module, skip: bool) -> AbstractContextManager[object]:
    """Leaves gradients of all but the last micro-batch unsummed."""
    if skip and isinstance(encoder, DistributedDataParallel):
        return encoder.no_sync()
    return nullcontext()


def average_gradients(parameters: Sequence[nn.Parameter], world: World) -> None:
    """Averages gradients that DDP does not see (scales, heads), as one flat tensor."""
    found = [p for p in parameters if p.grad is not None]
    if world.size == 1 or not found:
        return
    flat = torch.cat([p.grad.reshape(-1) for p in found if p.grad is not None])
    dist.all_reduce(flat)
    flat /= world.size
    offset = 0
    for parameter in found:
        count = parameter.numel()
        assert parameter.grad is not None
        parameter.grad.copy_(flat[offset : offset + count].view_as(parameter.grad))
        offset += count


def batch_digest(rows: Sequence[int], keys: Sequence[str], world: World) -> str:
    """Returns a digest of a global batch's sample ids and their order, whatever the workers."""
    total = 0
    for row, key in zip(rows, keys, strict=True):
        digest = hashlib.blake2b(f"{int(row)}:{key}".encode(), digest_size=7).digest()
        total += int.from_bytes(digest, "big")
    summed = world.sum(torch.tensor([total % 2**56], dtype=torch.int64, device=world.device))
    return f"{int(summed.item()) % 2**56:014x}"


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a tensor to a device, through pinned memory where that lets the copy run beside."""
    if device.type == "cuda" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def chunks(count: int, size: int) -> Iterator[slice]:
    """Yields consecutive slices of at most `size`."""
    for start in range(0, count, size):
        yield slice(start, min(count, start + size))
