"""Losses against closed forms, hand-written references, open_clip and their invariances."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from loss_references import LargestTensor, batch, ce, features, identity, kl, naive_gradients
from open_clip.loss import ClipLoss, DistillClipLoss

from kdscale.core.types import ConfigError, KdscaleError, MissingInput, UnknownName
from kdscale.losses import RECIPES, TERMS, DistillHeads, LossFlags, compute, weights_for
from kdscale.losses.distillation import contrastive_gradients
from kdscale.losses.inputs import ShapeMismatch

LOG_SCALE = math.log(1 / 0.07)
MODES = ("paper", "corrected")
SOFTMAX_TERMS = ("task", "fd", "icl", "ckd", "cross_kd", "gd")


def value(term: str, *args: object, **keywords: object) -> float:
    """Computes one term."""
    return compute(*args, weights={term: 1.0}, **keywords)[term].item()  # type: ignore[arg-type]


class TestReferenceValues:
    @pytest.mark.parametrize("mode", MODES)
    def test_task(self, mode: str):
        eye = identity(4)
        assert value("task", eye, eye, mode=mode) == pytest.approx(0.743668, abs=1e-6)
        assert value("task", eye, eye, student_scale=7.0) == pytest.approx(
            math.log1p(3 * math.exp(-7))
        )
        same = torch.ones(4, 3)
        assert value("task", same, same, student_scale=9.0) == pytest.approx(math.log(4))

    def test_icl_raw_and_exponentiated(self):
        eye = identity(4)
        args = (eye, eye, eye, eye, 1.0, 1.0)
        assert value("icl", *args, mode="paper") == pytest.approx(0.190620, abs=1e-6)
        assert value("icl", *args) == pytest.approx(1.87e-6, abs=5e-9)
        assert value("icl", *args, cross_scale=0.0) == pytest.approx(0.743668, abs=1e-6)
        learnt = torch.tensor(LOG_SCALE, dtype=torch.float64)
        assert value("icl", *args, cross_scale=learnt) == pytest.approx(1.87e-6, abs=5e-9)

    def test_raw_icl_floor_at_paper_batch(self):
        # 4095 orthogonal negatives: the best that a raw scale of 2.659 can reach.
        floor = math.log1p(4095 * math.exp(-LOG_SCALE))
        assert floor == pytest.approx(5.66, abs=0.005)
        eye = identity(64)
        assert value("icl", eye, eye, eye, eye, mode="paper") == pytest.approx(
            math.log1p(63 * math.exp(-LOG_SCALE))
        )

    @pytest.mark.parametrize(("mode", "factor"), [("paper", 1.0), ("corrected", 2.0)])
    def test_fd(self, mode: str, factor: float):
        x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        angled = torch.tensor([[0.5, math.sqrt(0.75)]])
        assert value("fd", x, x, y, y, mode=mode) == pytest.approx(2.0 * factor)
        assert value("fd", x, x, -x, -x, mode=mode) == pytest.approx(4.0 * factor)
        assert value("fd", angled, y, x, y, mode=mode) == pytest.approx(0.5 * factor)

    def test_ckd(self):
        eye, same = identity(2), torch.ones(2, 2, dtype=torch.float64)
        assert value("ckd", same, same, eye, eye, 1.0, 2.0) == pytest.approx(0.327813, abs=1e-6)
        assert value("ckd", eye, eye, eye, eye, 1.0, 2.0) == pytest.approx(0.067131, abs=1e-6)
        image, text, _, _ = batch()
        image.requires_grad_()
        teacher = F.normalize(image.detach(), dim=1), F.normalize(text, dim=1)
        loss = compute(image, text, *teacher, 3.0, 3.0, weights={"ckd": 1})["total"]
        loss.backward()
        assert loss.item() == pytest.approx(0.0, abs=1e-12)
        assert image.grad is not None
        assert image.grad.abs().max() < 1e-12

    def test_gd(self):
        eye = identity(2)
        one, half = (contrastive_gradients(eye, eye, tau)[0] for tau in (1.0, 0.5))
        torch.testing.assert_close(one.abs(), torch.full_like(one, 0.134471), atol=1e-6, rtol=0)
        torch.testing.assert_close(half.abs(), torch.full_like(one, 0.119203), atol=1e-6, rtol=0)
        assert value("gd", eye, eye, eye, eye, 1.0, 2.0) == pytest.approx(9.3242e-4, abs=1e-8)
        paper = value("gd", eye, eye, eye, eye, 1.0, 0.5, mode="paper")
        assert paper == pytest.approx(9.3242e-4, abs=1e-8)

    def test_sigmoid(self):
        eye = identity(2)
        result = value("sigmoid", eye, eye, student_scale=10.0, logit_bias=-10.0)
        assert result == pytest.approx(0.693193, abs=1e-6)


class TestAgainstOtherCode:
    def test_gradients_are_those_of_cross_entropy(self):
        anchor, key = (F.normalize(features(seed), dim=1).requires_grad_() for seed in (4, 5))
        F.cross_entropy(anchor @ key.T / 0.3, torch.arange(6)).backward()
        found = contrastive_gradients(anchor.detach(), key.detach(), 0.3)
        torch.testing.assert_close(found[0], anchor.grad)
        torch.testing.assert_close(found[1], key.grad)

    def test_gd_equals_naive_intermediate(self):
        image, text, p, q = batch()
        image.requires_grad_()
        unit = F.normalize(image, dim=1), F.normalize(text, dim=1)
        naive = torch.zeros((), dtype=torch.float64)
        for (a, k), (ta, tk) in (((0, 1), (p, q)), ((1, 0), (q, p))):
            ours = naive_gradients(unit[a], unit[k], 1 / 7.0)
            theirs = naive_gradients(ta, tk, 1 / 20.0)
            naive = naive + sum(F.mse_loss(x, y) for x, y in zip(ours, theirs, strict=True))
        (expected,) = torch.autograd.grad(naive, image)
        loss = compute(image, text, p, q, 7.0, 20.0, weights={"gd": 1})["gd"]
        loss.backward()
        torch.testing.assert_close(loss, naive)
        torch.testing.assert_close(image.grad, expected)

    def test_gd_makes_no_cubic_temporary(self):
        num_rows, width = 256, 128
        args = [F.normalize(features(i, num_rows, width).float(), dim=1) for i in range(4)]
        student = [x.requires_grad_() for x in args[:2]]
        with LargestTensor() as largest:
            compute(*student, *args[2:], 10.0, 20.0, weights={"gd": 1})["gd"].backward()
        assert largest.numel == num_rows * num_rows

    def test_task_equals_open_clip(self):
        image, text, _, _ = batch()
        unit = F.normalize(image, dim=1), F.normalize(text, dim=1)
        scale = torch.tensor(12.5, dtype=torch.float64)
        expected = ClipLoss()(*unit, scale)
        assert value("task", image, text, student_scale=scale) == pytest.approx(expected.item())

    def test_ckd_plus_teacher_entropy_equals_open_clip(self):
        image, text, p, q = batch()
        unit = F.normalize(image, dim=1), F.normalize(text, dim=1)
        s, t = (torch.tensor(x, dtype=torch.float64) for x in (6.0, 11.0))
        _, soft = DistillClipLoss()(*unit, s, p, q, t)
        logits = t * p @ q.T
        entropy = sum(
            torch.distributions.Categorical(logits=x).entropy().mean() / 2
            for x in (logits, logits.T)
        )
        assert value("ckd", image, text, p, q, s, t) + entropy == pytest.approx(soft.item())

    @pytest.mark.parametrize("mode", MODES)
    def test_terms_equal_formulas(self, mode: str):
        image, text, p, q = batch()
        u, v = F.normalize(image, dim=1), F.normalize(text, dim=1)
        c = LOG_SCALE if mode == "paper" else 1 / 0.07
        found = compute(
            image, text, p, q, 4.0, 9.0, weights=dict.fromkeys(SOFTMAX_TERMS, 1.0), mode=mode
        )
        icl = (ce(c * u @ q.T) + ce(c * v @ p.T)) / 2
        cross = (kl(9.0 * p @ q.T, c * u @ q.T) + kl(9.0 * q @ p.T, c * v @ p.T)) / 2
        ckd = (kl(9.0 * p @ q.T, 4.0 * u @ v.T) + kl(9.0 * q @ p.T, 4.0 * v @ u.T)) / 2
        fd = ((u - p) ** 2 + (v - q) ** 2).sum() / 6 / (5 if mode == "paper" else 1)
        for name, expected in {"icl": icl, "cross_kd": cross, "ckd": ckd, "fd": fd}.items():
            torch.testing.assert_close(found[name], expected)
        torch.testing.assert_close(
            found["total"], torch.stack([found[t] for t in SOFTMAX_TERMS]).sum()
        )

    def test_sigmoid_equals_double_loop(self):
        image, text, _, _ = batch()
        z = 5.0 * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T - 2.0
        loops = 0.0
        for i in range(6):
            for j in range(6):
                sign = 1.0 if i == j else -1.0
                loops += math.log1p(math.exp(-sign * z[i, j].item())) / 6
        found = value("sigmoid", image, text, student_scale=5.0, logit_bias=-2.0)
        assert found == pytest.approx(loops)


class TestInvariances:
    def test_sample_permutation(self):
        args = batch()
        order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
        weights = dict.fromkeys((*SOFTMAX_TERMS, "sigmoid"), 1.0)
        first = compute(*args, 4.0, 9.0, weights=weights)
        second = compute(*[x[order] for x in args], 4.0, 9.0, weights=weights)
        for name in first:
            torch.testing.assert_close(first[name], second[name])

    def test_raw_feature_scale(self):
        image, text, p, q = batch()
        weights = dict.fromkeys((*SOFTMAX_TERMS, "sigmoid"), 1.0)
        row_scale = torch.linspace(0.1, 30, 6, dtype=torch.float64)[:, None]
        first = compute(image, text, p, q, 4.0, 9.0, weights=weights)
        second = compute(image * row_scale, text * 3, p, q, 4.0, 9.0, weights=weights)
        for name in first:
            torch.testing.assert_close(first[name], second[name])

    def test_rotation_of_both_student_modalities(self):
        image, text, p, q = batch()
        rotation, _ = torch.linalg.qr(features(9, 5))
        weights = {"task": 1.0, "ckd": 1.0, "fd": 1.0}
        first = compute(image, text, p, q, 4.0, 9.0, weights=weights)
        second = compute(image @ rotation, text @ rotation, p, q, 4.0, 9.0, weights=weights)
        torch.testing.assert_close(first["task"], second["task"])
        torch.testing.assert_close(first["ckd"], second["ckd"])
        assert abs(first["fd"] - second["fd"]) > 1e-2


class TestInterface:
    def test_only_weighted_terms_are_computed(self):
        result = compute(*batch(), 1.0, 1.0, weights={"task": 1, "fd": 0, "mfd": 0, "afd": 0})
        assert set(result) == {"task", "total"}
        assert set(compute(*batch(), 1.0, 1.0, weights={"task": 1}, mode="paper")) == {
            "task",
            "total",
        }

    def test_explicit_weights_are_used_as_given(self):
        for mode in MODES:
            result = compute(*batch(), 2.0, 3.0, weights={"fd": 2000.0, "crd": 0.5}, mode=mode)
            expected = 2000 * result["fd"] + 0.5 * result["ckd"]
            torch.testing.assert_close(result["total"], expected)

    def test_total_does_not_depend_on_the_order_of_weights(self):
        weights = {"icl": 0.3, "task": 0.7, "ckd": 0.1, "fd": 13.0}
        turned = dict(reversed(weights.items()))
        totals = [compute(*batch(), 2.0, 3.0, weights=w)["total"] for w in (weights, turned)]
        assert torch.equal(*totals)

    def test_recipes(self):
        assert weights_for("clip_kd", "paper") == {"task": 1, "fd": 2000, "icl": 1, "ckd": 1}
        assert weights_for("clip_kd") == {"task": 1, "fd": 3.90625, "icl": 1, "ckd": 1}
        assert weights_for("mse", "paper") == {"task": 1, "fd": 2000}
        assert weights_for("mse", "corrected") == {"task": 1, "fd": 3.90625}
        assert weights_for("icl") == {"task": 1, "icl": 1}
        assert weights_for("kl") == {"task": 1, "ckd": 1}
        assert weights_for("clip") == {"task": 1}
        assert weights_for({"icl": 2, "crd": 3}) == {"icl": 2, "ckd": 3}
        assert weights_for("mse", LossFlags(fd_reduction="mean"))["fd"] == 2000

    def test_recipes_agree_between_modes_at_width_512(self):
        args = batch(4, 512)
        totals = [
            compute(*args, 2.0, 3.0, weights="mse", mode=mode)["total"].item() for mode in MODES
        ]
        assert totals[0] == pytest.approx(totals[1], rel=1e-12)

    @pytest.mark.parametrize(
        ("loss", "error", "word"),
        [
            ("fd", UnknownName, "clip_kd"),
            ({"clip_kd": 1}, UnknownName, "cross_kd"),
            ({"task": -1.0}, ConfigError, "task"),
            ({"task": math.nan}, ConfigError, "task"),
            ({"task": math.inf}, ConfigError, "task"),
            ({"task": True}, ConfigError, "number"),
            ({"task": "1"}, ConfigError, "number"),
            ({"ckd": 1, "crd": 1}, ConfigError, "twice"),
            ({"task": 0}, ConfigError, "positive"),
            ({}, ConfigError, "positive"),
            (["task"], ConfigError, "mapping"),
        ],
    )
    def test_bad_losses_are_refused(self, loss: object, error: type[Exception], word: str):
        with pytest.raises(error, match=word):
            weights_for(loss)  # type: ignore[arg-type]
        with pytest.raises(error, match=word):
            compute(*batch(), 1.0, 1.0, weights=loss)  # type: ignore[arg-type]

    def test_bad_modes_and_flags_are_refused(self):
        with pytest.raises(UnknownName, match="corrected"):
            compute(*batch(), 1.0, 1.0, weights={"task": 1}, mode="fixed")  # type: ignore[arg-type]
        with pytest.raises(UnknownName, match="head_wd"):
            LossFlags.for_mode("paper", head_decay=True)
        with pytest.raises(ConfigError, match="fd_reduction"):
            LossFlags.for_mode("paper", fd_reduction="max")
        with pytest.raises(ConfigError, match="head_wd"):
            LossFlags(head_wd="no")  # type: ignore[arg-type]

    def test_modes(self):
        paper, corrected = (LossFlags.for_mode(mode) for mode in MODES)
        assert corrected == LossFlags()
        assert paper.fd_reduction == "mean"
        assert not paper.frozen_heads
        names = set(vars(paper)) - {"fd_reduction", "frozen_heads"}
        assert all(getattr(paper, name) and not getattr(corrected, name) for name in names)
        assert not LossFlags.for_mode("paper", detached_gather=False).detached_gather

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize(
        ("term", "word"), [("mfd", "masked_student_image"), ("afd", "afd_image")]
    )
    def test_missing_inputs_are_named(self, mode: str, term: str, word: str):
        with pytest.raises(MissingInput, match=f"{term} needs.*{word}"):
            compute(*batch(), 1.0, 1.0, weights={term: 1.0}, mode=mode)

    def test_missing_teacher_is_named(self):
        image, text, p, q = batch()
        for term in set(TERMS) - {"task", "sigmoid"}:
            with pytest.raises(MissingInput, match=f"{term} needs teacher_image, teacher_text"):
                compute(image, text, weights={term: 1.0})
        with pytest.raises(MissingInput, match="ckd needs teacher_scale"):
            compute(image, text, p, q, 1.0, weights={"ckd": 1.0})

    def test_shapes_are_checked(self):
        image, text, p, q = batch(teacher_width=7)
        for term in ("fd", "icl", "cross_kd", "gd"):
            with pytest.raises(ShapeMismatch, match="width 5 differs from teacher width 7"):
                compute(image, text, p, q, 1.0, 1.0, weights={term: 1.0})
        assert math.isfinite(value("ckd", image, text, p, q, 1.0, 1.0))
        with pytest.raises(ShapeMismatch, match="student_text"):
            compute(image, text[:-1], weights={"task": 1.0})
        assert issubclass(ShapeMismatch, KdscaleError)

    def test_masked_features(self):
        image, text, p, q = batch()
        masked = features(8)
        args = (image, text, p, q, 1.0, 1.0)
        mixed = value("fd", masked, text, p, q, 1.0, 1.0)
        assert value("mfd", *args, masked_student_image=masked) == pytest.approx(mixed)
        paper = value("mfd", *args, masked_student_image=masked, mode="paper")
        assert paper == pytest.approx(value("fd", *args, mode="paper"))

    def test_afd(self):
        image, text, p, q = batch()
        layers = [torch.nn.Linear(10, 5, dtype=torch.float64) for _ in range(2)]
        z = [
            F.normalize(layer(torch.cat((F.normalize(raw, dim=1), unit), 1)), dim=1)
            for layer, raw, unit in zip(layers, (image, text), (p, q), strict=True)
        ]
        keywords = {"afd_image": layers[0], "afd_text": layers[1]}
        for mode, c in (("paper", LOG_SCALE), ("corrected", 1 / 0.07)):
            logits = c * z[0] @ z[1].T
            expected = ((ce(logits) + ce(logits.T)) / 2).item()
            found = value("afd", image, text, p, q, mode=mode, **keywords)
            assert found == pytest.approx(expected)

    def test_the_teacher_is_constant_and_precision_is_promoted(self):
        image, text, p, q = batch()
        p.requires_grad_()
        scale = torch.tensor(2.0, requires_grad=True)
        teacher_scale = torch.tensor(3.0, requires_grad=True)
        terms = compute(
            image.half().requires_grad_(),
            text,
            p,
            q.bfloat16(),
            scale,
            teacher_scale,
            weights=dict.fromkeys(SOFTMAX_TERMS, 1.0),
        )
        terms["total"].backward()
        assert terms["total"].dtype == torch.float64
        assert p.grad is None
        assert teacher_scale.grad is None
        assert scale.grad is not None
        half = [x.half() for x in (image, text)]
        assert compute(*half, weights={"task": 1})["task"].dtype == torch.float32

    def test_user_loss(self):
        args = (*batch(), 2.0, 3.0)

        def cosine(image, text, p, q, s, t):
            return 1 - F.cosine_similarity(image, p).mean()

        def several(image, text, p, q, s, t):
            return {"a": image.mean(), "b": text.mean()}

        def weighted(image, text, p, q, s, t):
            return several(image, text, p, q, s, t) | {"total": s * image.mean()}

        assert set(compute(*args, weights=cosine)) == {"cosine", "total"}
        sums = compute(*args, weights=several)
        torch.testing.assert_close(sums["total"], sums["a"] + sums["b"])
        torch.testing.assert_close(compute(*args, weights=weighted)["total"], 2 * sums["a"])
        heads = DistillHeads(5, 5, several, LossFlags(), seed=0)
        torch.testing.assert_close(heads(*args)["total"], sums["total"])
        assert not list(heads.parameters())
        with pytest.raises(ConfigError, match="lambda"):
            compute(*args, weights=lambda *features: features[0])

    def test_recipes_need_no_torch(self):
        code = "import sys, kdscale.losses.recipes; assert 'torch' not in sys.modules"
        subprocess.run([sys.executable, "-c", code], check=True)


def test_recipes_use_known_terms():
    assert {term for terms in RECIPES.values() for term in terms} <= set(TERMS)
