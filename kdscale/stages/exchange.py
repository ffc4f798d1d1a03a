"""Gathers features of all ranks, runs a replicated global loss, returns local gradients.

The losses see the whole batch and no ranks; this is the only place where the two meet. Every
rank computes the same loss on the same leaves, so parameters of the loss get their exact
gradient on each rank and averaging them changes nothing. The encoders only see the gradient
of their own rows, hence the factor W: averaging over ranks then gives the exact gradient.
Shape suffixes: B rows of one rank, N = W B rows of all W ranks, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def gather_rows(local_BD: Tensor) -> Tensor:
    """Concatenates the rows of all ranks in rank order, without gradient.

    Args:
        local_BD: This rank's rows; all ranks hold equally many.

    Returns:
        (N, D) rows, the same on every rank; a copy of the input without process group.
    """
    local_BD = local_BD.detach().contiguous()
    if _world_size() == 1:
        return local_BD.clone()
    parts = [torch.empty_like(local_BD) for _ in range(_world_size())]
    dist.all_gather(parts, local_BD)
    return torch.cat(parts)


def exchange(
    features: Sequence[Tensor],
    loss_fn: Callable[..., dict[str, Tensor]],
    *,
    detached: bool,
    synced: bool = True,
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Computes a global loss and the gradient with respect to this rank's features.

    Backpropagating the returned gradients through the encoder and averaging parameter
    gradients over ranks gives the gradient of the global loss. Parameters that `loss_fn` reads
    (heads, scales) have their gradients accumulated here, to be averaged likewise.

    Args:
        features: (B, D) features of this rank, equally many rows on every rank, which hold
            consecutive parts of the global batch in rank order. Their own graphs are not read.
        loss_fn: Maps the gathered features, in the order given, to scalars with a `total`.
        detached: Leave the gradient unscaled, as if no gradient passed through the gather: the
            encoder's comes out 1/W of the true one.
        synced: Whether all ranks hold the same loss parameters. If not, the ranks' losses
            differ, and each rank gets the sum of their gradients for its rows.

    Returns:
        The detached terms, and one (B, D) gradient for each of the features (zeros for
        features that the loss does not read).
    """
    leaves = [gather_rows(local).requires_grad_() for local in features]
    with torch.enable_grad():
        terms = loss_fn(*leaves)
    terms["total"].backward()
    gradients: list[Tensor] = []
    for local, leaf in zip(features, leaves, strict=True):
        whole_ND = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        if not detached and not synced:
            whole_ND = _summed(whole_ND)
        start = _rank() * local.shape[0]
        own_BD = whole_ND[start : start + local.shape[0]]
        gradients.append(own_BD.clone() if detached or not synced else own_BD * _world_size())
    return {name: term.detach() for name, term in terms.items()}, gradients


def _summed(tensor: Tensor) -> Tensor:
    """Returns the sum over ranks."""
    if _world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def _world_size() -> int:
    """Returns the number of ranks, 1 without process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _rank() -> int:
    """Returns this process's rank, 0 without process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
