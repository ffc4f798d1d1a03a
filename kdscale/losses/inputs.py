"""What the loss terms read: features of the global batch, scales and fusion layers.

Derived tensors that several terms share (unit features, logits) are computed once.
Shape suffixes: N global batch, D student width, E teacher width (equal where no head is).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kdscale.core.types import KdscaleError, MissingInput
from kdscale.losses.contrastive import Scale, similarity_logits

T = TypeVar("T")
Fusion: TypeAlias = Callable[[Tensor], Tensor]


class ShapeMismatch(KdscaleError, ValueError):
    """Features whose shapes do not fit together."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LossInputs:
    """All that a term may read; a None makes the terms that need it raise `MissingInput`.

    Features are promoted to one dtype, float32 at least, and the teacher is detached.

    Attributes:
        student_image_ND: Raw student image features; their normalised form is used.
        student_text_ND: Raw student text features.
        teacher_image_NE: Unit teacher image features.
        teacher_text_NE: Unit teacher text features.
        student_scale: Multiplied-in logit scale of the student.
        teacher_scale: The same of the teacher.
        cross_scale: Multiplied-in scale of ICL and cross-KD.
        fusion_scale: Multiplied-in scale of AFD.
        logit_bias: Added to the logits of the sigmoid loss.
        projected_image_NE: Student image features after the head, before normalisation; None
            stands for no head (equal widths).
        projected_text_NE: The same for text.
        masked_image_NE: Features of the masked image, after the head if there is one.
        fuse_image: AFD's layer for images, from [student, teacher] features to student width.
        fuse_text: The same for text.
    """

    student_image_ND: Tensor
    student_text_ND: Tensor
    teacher_image_NE: Tensor | None
    teacher_text_NE: Tensor | None
    student_scale: Scale
    teacher_scale: Scale | None
    cross_scale: Scale
    fusion_scale: Scale
    logit_bias: Scale = 0.0
    projected_image_NE: Tensor | None = None
    projected_text_NE: Tensor | None = None
    masked_image_NE: Tensor | None = None
    fuse_image: Fusion | None = None
    fuse_text: Fusion | None = None

    def __post_init__(self) -> None:
        matrices = {name: x for name, x in vars(self).items() if _is_matrix_field(name, x)}
        num_rows = self.student_image_ND.shape[0]
        dtype = torch.float32
        for name, matrix in matrices.items():
            if matrix.ndim != 2 or matrix.shape[0] != num_rows:
                raise ShapeMismatch(
                    f"{name} must be a matrix of {num_rows} rows, as student_image_ND is; "
                    f"got shape {tuple(matrix.shape)}"
                )
            dtype = torch.promote_types(dtype, matrix.dtype)
        for name, matrix in matrices.items():
            constant = name.startswith("teacher")
            object.__setattr__(self, name, (matrix.detach() if constant else matrix).to(dtype))

    @cached_property
    def image_ND(self) -> Tensor:
        """Unit student image features."""
        return F.normalize(self.student_image_ND, dim=1)

    @cached_property
    def text_ND(self) -> Tensor:
        """Unit student text features."""
        return F.normalize(self.student_text_ND, dim=1)

    @cached_property
    def teacher_NE(self) -> tuple[Tensor, Tensor]:
        """Unit teacher features, image and text."""
        return given(self.teacher_image_NE), given(self.teacher_text_NE)

    @cached_property
    def projected_NE(self) -> tuple[Tensor, Tensor]:
        """Unit student features in the teacher's space, image and text."""
        image_NE, text_NE = self.projected_image_NE, self.projected_text_NE
        pair = (
            self.image_ND if image_NE is None else F.normalize(image_NE, dim=1),
            self.text_ND if text_NE is None else F.normalize(text_NE, dim=1),
        )
        for student_NE, teacher_NE in zip(pair, self.teacher_NE, strict=True):
            check_same_width(student_NE, teacher_NE)
        return pair

    @cached_property
    def similarity_NN(self) -> Tensor:
        """Cosines between student images (rows) and texts."""
        return self.image_ND @ self.text_ND.T

    @cached_property
    def student_logits_NN(self) -> Tensor:
        """Student logits, images along rows."""
        return self.student_scale * self.similarity_NN

    @cached_property
    def teacher_logits_NN(self) -> Tensor:
        """Teacher logits, images along rows."""
        return similarity_logits(*self.teacher_NE, self.constant_teacher_scale)

    @cached_property
    def cross_logits_NN(self) -> tuple[Tensor, Tensor]:
        """Logits of student images on teacher texts, and of student texts on teacher images."""
        image_NE, text_NE = self.projected_NE
        teacher_image_NE, teacher_text_NE = self.teacher_NE
        return (
            similarity_logits(image_NE, teacher_text_NE, self.cross_scale),
            similarity_logits(text_NE, teacher_image_NE, self.cross_scale),
        )

    @property
    def constant_teacher_scale(self) -> Scale:
        """The teacher's scale without gradient."""
        scale = given(self.teacher_scale)
        return scale.detach() if isinstance(scale, Tensor) else scale


def given(value: T | None) -> T:
    """Returns a value that must not be None.

    Raises:
        MissingInput: It is.
    """
    if value is None:
        raise MissingInput("a loss term reads an input that was not passed")
    return value


def check_same_width(student_NE: Tensor, teacher_NE: Tensor) -> None:
    """Refuses to compare features of different widths.

    Raises:
        ShapeMismatch: The widths differ.
    """
    if student_NE.shape[1] != teacher_NE.shape[1]:
        raise ShapeMismatch(
            f"student width {student_NE.shape[1]} differs from teacher width "
            f"{teacher_NE.shape[1]}; project the student first (DistillHeads does)"
        )


def _is_matrix_field(name: str, value: object) -> bool:
    """Returns whether a field of `LossInputs` holds features."""
    return name.endswith(("_ND", "_NE")) and value is not None
