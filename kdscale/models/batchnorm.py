"""BatchNorm whose statistics do not depend on how a batch was divided.

The global batch is cut into consecutive groups of a fixed size; each group is normalised by its
own statistics, so any division of the batch into whole groups computes the same. Running
statistics move once per optimizer step, by the average over all groups of the global batch,
however many forward passes (micro-batches, replays) the step took.

A step: `collecting(model, True)`, the forward passes that count, `collecting(model, False)`,
replays if any, then `commit_running_stats`.

Shape suffixes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kdscale.core.types import ConfigError, MissingInput


class GroupedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over consecutive groups, optionally followed by timm's dropout and activation.

    Parameters, buffers and their names are those of the layer that it replaces. The collected
    sums are plain attributes, because DDP overwrites every buffer with rank 0's.

    Attributes:
        group: Samples that share statistics in training.
        collects: Whether forward passes add to the sums.
    """

    def __init__(self, replaced: nn.BatchNorm2d, group: int) -> None:
        super().__init__(
            replaced.num_features,
            eps=replaced.eps,
            momentum=replaced.momentum,
            affine=replaced.affine,
            track_running_stats=replaced.track_running_stats,
        )
        self.weight, self.bias = replaced.weight, replaced.bias
        for name, buffer in replaced.named_buffers(recurse=False):
            setattr(self, name, buffer)
        self.drop: nn.Module = nn.Identity()
        self.act: nn.Module = nn.Identity()
        if isinstance(replaced, BatchNormAct2d):
            self.drop = cast(nn.Module, replaced.drop)
            self.act = cast(nn.Module, replaced.act)
        self.train(replaced.training)
        self.group = group
        self.collects = False
        self.sum_mean_C: Tensor | None = None
        self.sum_var_C: Tensor | None = None
        self.num_groups = 0

    def forward(self, input: Tensor) -> Tensor:
        """Normalises (B, C, H, W); in training by group statistics, else by running ones."""
        normalised = self._by_group(input) if self.training else super().forward(input)
        return self.act(self.drop(normalised))

    def _by_group(self, input: Tensor) -> Tensor:
        """Normalises every group by itself with the framework's own kernel."""
        if len(input) % self.group:
            raise ConfigError(
                f"a forward pass of {len(input)} samples is not a multiple of bn_group="
                f"{self.group}; make the micro-batch (global_batch_size / num_workers / "
                "accumulation) a multiple of bn_group, or lower bn_group to a divisor of it"
            )
        outputs: list[Tensor] = []
        for part in input.split(self.group):
            # With momentum 1 the kernel leaves the part's mean and unbiased variance behind.
            mean_C = torch.zeros(self.num_features, device=input.device)
            var_C = torch.ones(self.num_features, device=input.device)
            outputs.append(
                F.batch_norm(part, mean_C, var_C, self.weight, self.bias, True, 1.0, self.eps)
            )
            if self.collects:
                self._collect(mean_C, var_C)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    @torch.no_grad()
    def _collect(self, mean_C: Tensor, var_C: Tensor) -> None:
        """Adds one group to the sums; in double precision, so that their order hardly matters."""
        if self.sum_mean_C is None or self.sum_var_C is None:
            self.reset()
            self.sum_mean_C = torch.zeros_like(mean_C, dtype=torch.float64)
            self.sum_var_C = torch.zeros_like(var_C, dtype=torch.float64)
        self.sum_mean_C += mean_C
        self.sum_var_C += var_C
        self.num_groups += 1

    def reset(self) -> None:
        """Forgets what was collected."""
        self.sum_mean_C = self.sum_var_C = None
        self.num_groups = 0

    def sums(self) -> Tensor:
        """Returns (2C + 1,) fp64: summed means, summed variances, number of groups.

        Raises:
            MissingInput: Nothing was collected since the last commit.
        """
        if self.sum_mean_C is None or self.sum_var_C is None:
            raise MissingInput(
                "no BatchNorm statistics were collected; run a training forward pass between "
                "collecting(model, True) and commit_running_stats"
            )
        count = self.sum_mean_C.new_tensor([float(self.num_groups)])
        return torch.cat([self.sum_mean_C, self.sum_var_C, count])

    @torch.no_grad()
    def update(self, sums: Tensor) -> None:
        """Moves the running statistics by one step, given the sums over all workers."""
        if self.running_mean is None or self.running_var is None:
            return
        tracked = cast(Tensor, self.num_batches_tracked).add_(1)
        momentum = self.momentum if self.momentum is not None else 1.0 / float(tracked)
        mean_C, var_C = (sums[:-1] / sums[-1]).to(self.running_mean.dtype).chunk(2)
        self.running_mean.mul_(1.0 - momentum).add_(mean_C, alpha=momentum)
        self.running_var.mul_(1.0 - momentum).add_(var_C, alpha=momentum)


def group_batchnorm(model: nn.Module, group: int) -> list[GroupedBatchNorm2d]:
    """Replaces every BatchNorm of a model, in place.

    Args:
        model: Its state dict keeps its names and values.
        group: Samples that share statistics; every training forward pass must see a multiple.

    Returns:
        The new layers, in the model's order; empty for a model without BatchNorm.

    Raises:
        ConfigError: The group is smaller than 2, or a kind of BatchNorm is not supported.
    """
    if group < 2:
        raise ConfigError(f"bn_group is {group}; variances need at least 2 samples")
    layers: list[GroupedBatchNorm2d] = []
    for parent_name, parent in list(model.named_modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, _BatchNorm):
                continue
            if type(child) not in (nn.BatchNorm2d, BatchNormAct2d):
                raise ConfigError(
                    f"{parent_name}.{name} is a {type(child).__name__}; only BatchNorm2d and "
                    "timm's BatchNormAct2d can be grouped"
                )
            layers.append(GroupedBatchNorm2d(cast(nn.BatchNorm2d, child), group))
            setattr(parent, name, layers[-1])
    return layers


def collecting(model: nn.Module, on: bool) -> None:
    """Says whether the coming forward passes count towards the running statistics.

    Args:
        model: A model after `group_batchnorm`.
        on: True for the passes of a step that see each sample once, False for replays.
    """
    for layer in _layers(model):
        layer.collects = on


def commit_running_stats(
    model: nn.Module, all_reduce: Callable[[Tensor], Tensor] | None = None
) -> None:
    """Updates all running statistics once from what was collected, and starts anew.

    Args:
        model: A model after `group_batchnorm`; nothing happens without BatchNorm.
        all_reduce: Returns the sum over workers of a flat fp64 tensor; None on one worker.

    Raises:
        MissingInput: Nothing was collected.
    """
    layers = _layers(model)
    if not layers:
        return
    parts = [layer.sums() for layer in layers]
    flat = torch.cat(parts)
    if all_reduce is not None:
        flat = all_reduce(flat)
    for layer, sums in zip(layers, flat.split([len(part) for part in parts]), strict=True):
        layer.update(sums)
        layer.reset()


def _layers(model: nn.Module) -> list[GroupedBatchNorm2d]:
    """All grouped layers, in the model's order."""
    return [module for module in model.modules() if isinstance(module, GroupedBatchNorm2d)]
