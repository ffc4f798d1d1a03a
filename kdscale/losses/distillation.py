"""Distillation terms over a global batch, their weighted total, and the stateless entry.

Nothing here knows of ranks or owns parameters: features come in whole, terms go out.
Notation: u, v raw student image and text features; p, q unit teacher features; s a scale.
Shape suffixes: N global batch, D student width, E teacher width (equal where no head is).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from kdscale.core.types import ConfigError, MissingInput
from kdscale.losses.contrastive import (
    Scale,
    sigmoid_loss,
    similarity_logits,
    symmetric_cross_entropy,
)
from kdscale.losses.inputs import Fusion, LossInputs, check_same_width, given
from kdscale.losses.recipes import (
    LossFlags,
    Mode,
    Reduction,
    active_terms,
    as_flags,
    needs_teacher,
    weights_for,
)

LossCallable: TypeAlias = Callable[..., "Tensor | Mapping[str, Tensor]"]
"""`f(student_image, student_text, teacher_image, teacher_text, student_scale, teacher_scale)`,
given the features as they enter `compute`; returns a scalar, or named scalars of which `total`
(their sum, if absent) is minimised. Must be importable where it runs."""

INITIAL_LOG_SCALE = math.log(1 / 0.07)

# Fields of LossInputs that may be None, and the arguments that fill them.
TEACHER_INPUTS = {"teacher_image_NE": "teacher_image", "teacher_text_NE": "teacher_text"}
OWN_INPUTS = {
    "mfd": {"masked_image_NE": "masked_student_image"},
    "afd": {"fuse_image": "afd_image", "fuse_text": "afd_text"},
}


def feature_distance(student_NE: Tensor, teacher_NE: Tensor, reduction: Reduction) -> Tensor:
    """Computes the squared distance between two sets of unit features, averaged over rows.

    Args:
        student_NE: Unit student features in the teacher's width.
        teacher_NE: Unit teacher features.
        reduction: "sum" over the width, 2 (1 - cos) a row; "mean" divides that by E.

    Returns:
        Scalar in [0, 4], or [0, 4 / E].

    Source:
        CLIP-KD, FD; the released code averages, which ties the strength to the width.
    """
    num_rows, width = student_NE.shape
    loss = F.mse_loss(student_NE, teacher_NE, reduction="sum") / num_rows
    return loss / width if reduction == "mean" else loss


def relation_kl(student_NN: Tensor, teacher_NN: Tensor) -> Tensor:
    """Computes KL(teacher || student) between the softmaxes of matching rows, row mean.

    Args:
        student_NN: Student logits.
        teacher_NN: Teacher logits, taken as constants.

    Returns:
        Scalar >= 0, in nats; temperature 1.

    Source:
        CLIP-KD, CRD. Soft-target cross-entropy minus the teacher's entropy.
    """
    student_log_NN = F.log_softmax(student_NN, dim=1)
    teacher_log_NN = F.log_softmax(teacher_NN.detach(), dim=1)
    return F.kl_div(student_log_NN, teacher_log_NN, reduction="batchmean", log_target=True)


def contrastive_gradients(
    anchor_ND: Tensor, key_ND: Tensor, temperature: Scale
) -> tuple[Tensor, Tensor]:
    """Computes the gradient of one direction's contrastive loss in closed form.

    Args:
        anchor_ND: Unit features along the rows of the logits.
        key_ND: Unit features along the columns.
        temperature: Divides the logits.

    Returns:
        Gradients for anchors and for keys, (N, D) each.

    Source:
        CLIP-KD, GD. One product each; the released code builds an (N, D, N) intermediate.
    """
    num_rows = anchor_ND.shape[0]
    residual_NN = F.softmax((anchor_ND @ key_ND.T) / temperature, dim=1)
    residual_NN = residual_NN - torch.eye(
        num_rows, dtype=residual_NN.dtype, device=residual_NN.device
    )
    factor = 1.0 / (temperature * num_rows)
    return factor * (residual_NN @ key_ND), factor * (residual_NN.T @ anchor_ND)


def _task(inputs: LossInputs, flags: LossFlags) -> Tensor:
    """CLIP's loss on the student's own features."""
    return symmetric_cross_entropy(inputs.student_logits_NN)


def _sigmoid(inputs: LossInputs, flags: LossFlags) -> Tensor:
    """SigLIP's loss on the student's own features."""
    return sigmoid_loss(inputs.student_logits_NN + inputs.logit_bias)


def _fd(inputs: LossInputs, flags: LossFlags) -> Tensor:
    """Feature distance, image plus text."""
    pairs = zip(inputs.projected_NE, inputs.teacher_NE, strict=True)
    image, text = (feature_distance(student, p, flags.fd_reduction) for student, p in pairs)
    return image + text


def _mfd(inputs: LossInputs, flags: LossFlags) -> Tensor:
    """Feature distance with the masked image's features."""
    masked_NE = given(inputs.masked_image_NE)
    if flags.mfd_noop:
        return _fd(inputs, flags)
    teacher_image_NE, teacher_text_NE = inputs.teacher_NE
    check_same_width(masked_NE, teacher_image_NE)
    image = feature_distance(F.normalize(masked_NE, dim=1), teacher_image_NE, flags.fd_reduction)
    return image + feature_distance(inputs.projected_NE[1], teacher_text_NE, flags.fd_reduction)


def _icl(inputs: LossInputs, flags: LossFlags) -> Tensor:
    """Student anchors contrasted against teacher keys of the other modality."""
    return symmetric_cross_entropy(*inputs.cross_logits_NN)


def _ckd(inputs: LossInputs, flags: LossFlags) -> Tensor:
    """KL from the teacher's similarity distributions to the student's."""
    student_NN, teacher_NN = inputs.student_logits_NN, inputs.teacher_logits_NN
    return (relation_kl(student_NN, teacher_NN) + relation_kl(student_NN.T, teacher_NN.T)) / 2


def _cross_kd(inputs: LossInputs, flags: LossFlags) -> Tensor:
    """KL from the teacher's similarity distributions to those of student on teacher."""
    image_NN, text_NN = inputs.cross_logits_NN
    teacher_NN = inputs.teacher_logits_NN
    return (relation_kl(image_NN, teacher_NN) + relation_kl(text_NN, teacher_NN.T)) / 2


def _gd(inputs: LossInputs, flags: LossFlags) -> Tensor:
    """Distance between the contrastive gradients of student and teacher, four of them."""
    student_tau, teacher_tau = inputs.student_scale, inputs.constant_teacher_scale
    if not flags.gd_scale_as_tau:
        student_tau, teacher_tau = 1 / student_tau, 1 / teacher_tau
    image_NE, text_NE = inputs.projected_NE
    p_NE, q_NE = inputs.teacher_NE
    loss = image_NE.new_zeros(())
    directions = ((image_NE, text_NE, p_NE, q_NE), (text_NE, image_NE, q_NE, p_NE))
    for student_anchor, student_key, teacher_anchor, teacher_key in directions:
        student_grads = contrastive_gradients(student_anchor, student_key, student_tau)
        teacher_grads = contrastive_gradients(teacher_anchor, teacher_key, teacher_tau)
        for student_NE, teacher_NE in zip(student_grads, teacher_grads, strict=True):
            loss = loss + F.mse_loss(student_NE, teacher_NE)
    return loss


def _afd(inputs: LossInputs, flags: LossFlags) -> Tensor:
    """CLIP's loss on fused student and teacher features."""
    fuse_image, fuse_text = given(inputs.fuse_image), given(inputs.fuse_text)
    own_ND = (inputs.image_ND, inputs.text_ND)
    student_ND = inputs.projected_NE if flags.afd_projected else own_ND
    image_ND = fuse_image(torch.cat((student_ND[0], inputs.teacher_NE[0]), dim=1))
    text_ND = fuse_text(torch.cat((student_ND[1], inputs.teacher_NE[1]), dim=1))
    unit_ND = (F.normalize(image_ND, dim=1), F.normalize(text_ND, dim=1))
    return symmetric_cross_entropy(similarity_logits(*unit_ND, inputs.fusion_scale))


_TERM_FUNCTIONS: dict[str, Callable[[LossInputs, LossFlags], Tensor]] = {
    "task": _task,
    "fd": _fd,
    "mfd": _mfd,
    "icl": _icl,
    "ckd": _ckd,
    "cross_kd": _cross_kd,
    "gd": _gd,
    "afd": _afd,
    "sigmoid": _sigmoid,
}


def total(
    inputs: LossInputs, weights: Mapping[str, float] | LossCallable, flags: LossFlags
) -> dict[str, Tensor]:
    """Computes the terms of positive weight and their weighted sum.

    Args:
        inputs: Features, scales and layers.
        weights: Weights by term, aliases resolved; or a user's loss.
        flags: Behaviour.

    Returns:
        Scalars: the unweighted terms by name, and `total`.

    Raises:
        MissingInput: A term needs something that is None.
        ShapeMismatch: A term compares features of different widths.
        ConfigError: A user's loss returns no scalars.
    """
    if callable(weights):
        return _user_total(inputs, weights)
    names = active_terms(weights)
    _check_complete(inputs, names)
    terms = {name: _TERM_FUNCTIONS[name](inputs, flags) for name in names}
    return terms | {"total": _sum([weights[name] * term for name, term in terms.items()])}


class TermInputs(TypedDict, total=False):
    """What single terms read beside the features: arguments of `compute` by name.

    Attributes:
        cross_scale: Scale c of `icl` and `cross_kd`: exponentiated, or raw in paper mode;
            ln(1 / 0.07) unless given.
        logit_bias: Added to the logits of `sigmoid`; 0 unless given.
        masked_student_image: (N, D) raw features of the masked images, for `mfd`.
            Required even under `mfd_noop`, which ignores their values.
        afd_image: Layer for `afd` from the (N, 2 D) features [student, teacher] to (N, D).
        afd_text: The same for text.
        afd_scale: Scale of `afd`, treated as `cross_scale` is.
    """

    cross_scale: Scale
    logit_bias: Scale
    masked_student_image: Tensor
    afd_image: Fusion
    afd_text: Fusion
    afd_scale: Scale


def compute(
    student_image: Tensor,
    student_text: Tensor,
    teacher_image: Tensor | None = None,
    teacher_text: Tensor | None = None,
    student_scale: Scale = 1.0,
    teacher_scale: Scale | None = None,
    *,
    weights: Mapping[str, float] | str | LossCallable,
    mode: Mode | LossFlags = "corrected",
    **more: Unpack[TermInputs],
) -> dict[str, Tensor]:
    """Computes named distillation losses of a global batch, without any state.

    Works in float32 at least, unless autocast is on where it is called.

    Args:
        student_image: (N, D) raw image features; normalised here.
        student_text: (N, D) raw text features, matching rows.
        teacher_image: (N, D) unit image features, used as given, without gradient. None if
            only `task` and `sigmoid` have weight. `task`, `ckd`, `afd` and `sigmoid` accept
            a width other than the student's.
        teacher_text: (N, D) unit text features.
        student_scale: Multiplied-in scale of the student's logits (s = e^theta).
        teacher_scale: The same of the teacher.
        weights: Weights by term, used as given, `crd` meaning `ckd`; the name of a recipe; or
            a user's loss (`LossCallable`).
        mode: "paper", "corrected", or `LossFlags`.
        **more: `TermInputs`.

    Returns:
        Scalars: every term of positive weight, unweighted, and `total`.

    Raises:
        MissingInput: A term needs something that was not passed.
        ShapeMismatch: Features do not fit together (`DistillHeads` projects unequal widths).
        UnknownName: No such term, recipe or mode.
        ConfigError: A weight is negative or not finite, or none is positive.

    Source:
        CLIP-KD (CVPR 2024); SigLIP (2023) for `sigmoid`. `LossFlags` lists the differences.
    """
    flags = as_flags(mode)
    inputs = LossInputs(
        student_image_ND=student_image,
        student_text_ND=student_text,
        teacher_image_NE=teacher_image,
        teacher_text_NE=teacher_text,
        student_scale=student_scale,
        teacher_scale=teacher_scale,
        **_term_inputs(flags, **more),
    )
    known = weights if callable(weights) else weights_for(weights, flags)
    return total(inputs, known, flags)


def _term_inputs(
    flags: LossFlags,
    *,
    cross_scale: Scale = INITIAL_LOG_SCALE,
    logit_bias: Scale = 0.0,
    masked_student_image: Tensor | None = None,
    afd_image: Fusion | None = None,
    afd_text: Fusion | None = None,
    afd_scale: Scale = INITIAL_LOG_SCALE,
) -> dict[str, Any]:
    """Returns the fields of `LossInputs` that `TermInputs` stand for."""
    return {
        "cross_scale": multiplied_in(cross_scale, flags),
        "fusion_scale": multiplied_in(afd_scale, flags),
        "logit_bias": logit_bias,
        "masked_image_NE": masked_student_image,
        "fuse_image": afd_image,
        "fuse_text": afd_text,
    }


def multiplied_in(parameter: Scale, flags: LossFlags) -> Scale:
    """Returns the factor that a learnt scale of ICL, cross-KD or AFD puts on the logits."""
    if flags.raw_cross_scale:
        return parameter
    return parameter.exp() if isinstance(parameter, Tensor) else math.exp(parameter)


def _user_total(inputs: LossInputs, loss: LossCallable) -> dict[str, Tensor]:
    """Runs a user's loss and completes what it returns."""
    result = loss(
        inputs.student_image_ND,
        inputs.student_text_ND,
        inputs.teacher_image_NE,
        inputs.teacher_text_NE,
        inputs.student_scale,
        inputs.teacher_scale,
    )
    name = getattr(loss, "__name__", type(loss).__name__)
    terms: dict[str, object] = dict(result) if isinstance(result, Mapping) else {name: result}
    scalars = {key: x for key, x in terms.items() if isinstance(x, Tensor) and x.ndim == 0}
    if not terms or len(scalars) < len(terms):
        raise ConfigError(f"loss {name} must return a scalar tensor or named ones, got {result!r}")
    return {"total": _sum(list(scalars.values()))} | scalars


def _sum(terms: list[Tensor]) -> Tensor:
    """Adds scalars in order."""
    return sum(terms[1:], start=terms[0])


def _check_complete(inputs: LossInputs, names: tuple[str, ...]) -> None:
    """Names the terms that cannot be computed, and what they lack."""
    lacking: list[str] = []
    for name in names:
        needed = TEACHER_INPUTS if needs_teacher((name,)) else {}
        if name in ("ckd", "cross_kd", "gd"):
            needed = needed | {"teacher_scale": "teacher_scale"}
        needed = needed | OWN_INPUTS.get(name, {})
        absent = [argument for field, argument in needed.items() if getattr(inputs, field) is None]
        if absent:
            lacking.append(f"{name} needs {', '.join(absent)}")
    if lacking:
        raise MissingInput(f"inputs missing for loss terms: {'; '.join(lacking)}; pass them")
