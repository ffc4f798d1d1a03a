"""Inputs and hand-written references that the loss tests share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def features(seed: int, num_rows: int = 6, width: int = 5) -> Tensor:
    """Draws raw float64 features."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, width, generator=generator, dtype=torch.float64)


def batch(num_rows: int = 6, width: int = 5, teacher_width: int | None = None) -> list[Tensor]:
    """Returns raw student and unit teacher features, image and text each."""
    teacher_width = width if teacher_width is None else teacher_width
    student = [features(seed, num_rows, width) for seed in (0, 1)]
    teacher = [F.normalize(features(seed, num_rows, teacher_width), dim=1) for seed in (2, 3)]
    return student + teacher


def identity(num_rows: int) -> Tensor:
    """Returns orthogonal unit features."""
    return torch.eye(num_rows, dtype=torch.float64)


def naive_gradients(anchor: Tensor, key: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Contrastive gradients with the (N, D, N) intermediate spelt out."""
    num_rows = anchor.shape[0]
    residual = F.softmax(anchor @ key.T / tau, dim=1) - identity(num_rows)
    key_grad = (residual.T[:, None, :] * anchor.T[None]).sum(-1)
    return residual @ key / (tau * num_rows), key_grad / (tau * num_rows)


def ce(logits: Tensor) -> Tensor:
    """Mean row cross-entropy with diagonal targets, from its definition."""
    return (logits.logsumexp(1) - logits.diagonal()).mean()


def kl(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean row KL divergence between softmaxes, from its definition."""
    p, q = teacher.softmax(1), student.softmax(1)
    return (p * (p / q).log()).sum(1).mean()


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result
