"""The trainable state of the distillation losses: projection heads, scales, fusion layers.

Built from a seed of its own, so that no other random state moves and, in corrected mode,
every rank holds the same parameters without a broadcast.
Shape suffixes: N global batch, D student width, E teacher width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kdscale.core.types import ConfigError, MissingInput
from kdscale.losses.contrastive import Scale
from kdscale.losses.distillation import INITIAL_LOG_SCALE, LossCallable, multiplied_in, total
from kdscale.losses.inputs import LossInputs
from kdscale.losses.recipes import (
    CROSS_SCALE_TERMS,
    PROJECTED_TERMS,
    LossFlags,
    active_terms,
    needs_teacher,
    weights_for,
)

MAX_LOG_SCALE = math.log(100.0)
DEFAULT_ADAMW_WEIGHT_DECAY = 0.01


class DistillHeads(nn.Module):
    """Loss terms over a global batch, with the layers that they train.

    Attributes:
        weights: Weights by term, or the user's loss.
        flags: Behaviour.
        image_head: Affine map from student to teacher width, or None.
        text_head: The same for text.
        cross_scale: Scale of ICL and cross-KD (raw, or its logarithm), or None.
        image_fusion: AFD's layer from [student, teacher] to student width, or None.
        text_fusion: The same for text.
        fusion_scale: Scale of AFD, or None.
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int | None,
        weights: Mapping[str, float] | str | LossCallable,
        flags: LossFlags,
        seed: int,
        rank: int = 0,
    ) -> None:
        """Builds the layers that the weighted terms need, on the CPU.

        Args:
            student_dim: Width of the student's features.
            teacher_dim: Width of the teacher's, None without a teacher.
            weights: Weights by term, a recipe's name, or a user's loss (which gets no layers).
            flags: Behaviour.
            seed: Seeds the parameters.
            rank: Added to the seed if `unsynced_heads` is set.

        Raises:
            MissingInput: A weighted term needs a teacher and there is none.
            ConfigError: `afd_projected` is set and the widths differ.
        """
        super().__init__()
        known = weights if callable(weights) else weights_for(weights, flags)
        self.weights: Mapping[str, float] | LossCallable = known
        self.flags = flags
        self.terms = () if callable(known) else active_terms(known)
        self.image_head: nn.Linear | None = None
        self.text_head: nn.Linear | None = None
        self.image_fusion: nn.Linear | None = None
        self.text_fusion: nn.Linear | None = None
        self.cross_scale: nn.Parameter | None = None
        self.fusion_scale: nn.Parameter | None = None
        if teacher_dim is not None:
            self._build(student_dim, teacher_dim, seed + rank if flags.unsynced_heads else seed)
        elif needs_teacher(self.terms):
            raise MissingInput(f"teacher_dim is None, but the loss has terms {self.terms}")
        self.requires_grad_(not flags.frozen_heads)

    def _build(self, student_dim: int, teacher_dim: int, seed: int) -> None:
        """Makes the layers and scales from one generator."""
        generator = torch.Generator().manual_seed(seed)
        uses, flags = frozenset(self.terms), self.flags
        if student_dim != teacher_dim and uses & PROJECTED_TERMS:
            self.image_head = _linear(student_dim, teacher_dim, generator)
            self.text_head = _linear(student_dim, teacher_dim, generator)
        if "afd" in uses:
            if flags.afd_projected and student_dim != teacher_dim:
                raise ConfigError(
                    f"afd with the flag afd_projected needs equal widths, got student "
                    f"{student_dim} and teacher {teacher_dim}; set afd_projected=False"
                )
            self.image_fusion = _linear(student_dim + teacher_dim, student_dim, generator)
            self.text_fusion = _linear(student_dim + teacher_dim, student_dim, generator)
            self.fusion_scale = nn.Parameter(torch.tensor(INITIAL_LOG_SCALE))
        if uses & CROSS_SCALE_TERMS or (uses and flags.decay_unused_scale):
            self.cross_scale = nn.Parameter(torch.tensor(INITIAL_LOG_SCALE))

    def forward(
        self,
        student_image_ND: Tensor,
        student_text_ND: Tensor,
        teacher_image_NE: Tensor | None,
        teacher_text_NE: Tensor | None,
        student_scale: Scale,
        teacher_scale: Scale | None,
        *,
        logit_bias: Scale = 0.0,
        masked_student_image: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Computes the weighted terms of a global batch and their total.

        Args:
            student_image_ND: Raw image features; the heads read them unnormalised.
            student_text_ND: Raw text features.
            teacher_image_NE: Unit teacher features, None if no term reads the teacher.
            teacher_text_NE: The same for text.
            student_scale: Multiplied-in scale of the student's logits.
            teacher_scale: The same of the teacher.
            logit_bias: Added to the logits of `sigmoid`.
            masked_student_image: (N, D) raw features of masked images, for `mfd`; need not be
                computed if `mfd_noop` is set.

        Returns:
            Scalars: unweighted terms by name, and `total`.

        Raises:
            MissingInput: A term needs something that is None.
            ShapeMismatch: Features do not fit together.
        """
        flags = self.flags
        masked_ND = masked_student_image
        if masked_ND is None and flags.mfd_noop:
            masked_ND = student_image_ND
        inputs = LossInputs(
            student_image_ND=student_image_ND,
            student_text_ND=student_text_ND,
            teacher_image_NE=teacher_image_NE,
            teacher_text_NE=teacher_text_NE,
            student_scale=student_scale,
            teacher_scale=teacher_scale,
            cross_scale=self._factor(self.cross_scale),
            fusion_scale=self._factor(self.fusion_scale),
            logit_bias=logit_bias,
            projected_image_NE=_projected(self.image_head, student_image_ND),
            projected_text_NE=_projected(self.text_head, student_text_ND),
            masked_image_NE=_projected(self.image_head, masked_ND, identity=True),
            fuse_image=self.image_fusion,
            fuse_text=self.text_fusion,
        )
        terms = total(inputs, self.weights, flags)
        if self.cross_scale is not None and not CROSS_SCALE_TERMS.intersection(self.terms):
            # A zero gradient, unlike none, lets the optimizer decay the parameter.
            terms["total"] = terms["total"] + 0.0 * self.cross_scale
        return terms

    @torch.no_grad()
    def clamp_(self) -> None:
        """Clamps the scales to [0, ln 100], as the student's; call after every step."""
        if self.flags.raw_cross_scale or self.flags.frozen_heads:
            return
        for scale in (self.cross_scale, self.fusion_scale):
            if scale is not None:
                scale.clamp_(0.0, MAX_LOG_SCALE)

    def weight_decay_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Returns the optimizer groups of the trainable parameters, none if there are none.

        Args:
            weight_decay: The recipe's weight decay, for matrices; biases and scales have 0.
                Under `head_wd` all have AdamW's default.

        Returns:
            Groups with `params`, `weight_decay` and `clip_grad` (whether the recipe's gradient
            clipping covers them).
        """
        params = [p for p in self.parameters() if p.requires_grad]
        if self.flags.head_wd:
            split = [(params, DEFAULT_ADAMW_WEIGHT_DECAY)]
        else:
            matrices = [p for p in params if p.ndim >= 2]
            split = [(matrices, weight_decay), ([p for p in params if p.ndim < 2], 0.0)]
        clip = not self.flags.head_wd
        return [{"params": p, "weight_decay": wd, "clip_grad": clip} for p, wd in split if p]

    def _factor(self, scale: nn.Parameter | None) -> Scale:
        """Returns a scale as it multiplies the logits."""
        return 1.0 if scale is None else multiplied_in(scale, self.flags)


def _linear(in_dim: int, out_dim: int, generator: torch.Generator) -> nn.Linear:
    """Builds an affine layer with torch's default distribution from a generator."""
    # The constructor draws from the global state.
    with torch.random.fork_rng(devices=()):  # pyright: ignore[reportUnknownMemberType]
        layer = nn.Linear(in_dim, out_dim, device="cpu")
    bound = 1 / math.sqrt(in_dim)
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=generator)
        layer.bias.uniform_(-bound, bound, generator=generator)
    return layer


def _projected(
    head: nn.Linear | None, features_ND: Tensor | None, *, identity: bool = False
) -> Tensor | None:
    """Applies a head in its own dtype; without one, None or the features themselves."""
    if head is None or features_ND is None:
        return features_ND if identity else None
    return head(features_ND.to(head.weight.dtype))
