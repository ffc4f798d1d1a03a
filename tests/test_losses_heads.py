"""The losses' trainable state: seeds, what gets built, decay, clamping, checkpoints."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from loss_references import batch, features

from kdscale.core.types import ConfigError, MissingInput
from kdscale.losses import TERMS, DistillHeads, LossFlags, compute

LOG_SCALE = math.log(1 / 0.07)


class TestHeads:
    weights = dict.fromkeys(set(TERMS) - {"mfd", "afd"}, 1.0)

    @staticmethod
    def heads(mode: str = "corrected", rank: int = 0, **flags: object) -> DistillHeads:
        loss_flags = LossFlags.for_mode(mode, **flags)
        return DistillHeads(5, 7, TestHeads.weights, loss_flags, seed=3, rank=rank)

    def test_same_on_all_ranks_unless_unsynced(self):
        first, second = (self.heads(rank=rank).state_dict() for rank in (0, 1))
        assert all(torch.equal(first[name], second[name]) for name in first)
        first, second = (self.heads("paper", rank=rank).state_dict() for rank in (0, 1))
        assert not torch.equal(first["image_head.weight"], second["image_head.weight"])
        assert not torch.equal(first["image_head.weight"], first["text_head.weight"])

    def test_moves_no_other_random_state(self):
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        self.heads()
        assert torch.equal(torch.rand(3), expected)

    def test_initialised_as_torch_does(self):
        torch.manual_seed(3)
        expected = torch.nn.Linear(5, 7)
        head = self.heads().image_head
        assert head is not None
        torch.testing.assert_close(head.weight, expected.weight)
        torch.testing.assert_close(head.bias, expected.bias)

    def test_state_dict_round_trip(self):
        source, target = self.heads(), DistillHeads(5, 7, self.weights, LossFlags(), seed=9)
        target.load_state_dict(source.state_dict())
        args = (*[x.float() for x in batch(teacher_width=7)], 4.0, 9.0)
        assert torch.equal(source(*args)["total"], target(*args)["total"])
        assert {"image_head.weight", "text_head.bias", "cross_scale"} <= set(source.state_dict())

    def test_only_what_the_terms_need_is_built(self):
        def names(student: int, teacher: int | None, loss: object, mode: str = "corrected"):
            flags = LossFlags.for_mode(mode)
            built = DistillHeads(student, teacher, loss, flags, seed=0)  # type: ignore[arg-type]
            return {name.split(".")[0] for name, _ in built.named_parameters()}

        assert names(5, None, "clip") == set()
        assert names(5, 7, "clip") == set()
        assert names(5, 7, "kl") == set()
        assert names(5, 7, "mse") == {"image_head", "text_head"}
        assert names(5, 5, "clip_kd") == {"cross_scale"}
        assert names(5, 7, "clip_kd") == {"image_head", "text_head", "cross_scale"}
        assert names(5, 7, {"afd": 1}) == {"image_fusion", "text_fusion", "fusion_scale"}
        assert names(5, 5, "mse", "paper") == {"cross_scale"}
        assert names(5, None, "clip", "paper") == set()
        with pytest.raises(MissingInput, match="fd"):
            names(5, None, "mse")
        with pytest.raises(ConfigError, match="afd_projected"):
            names(5, 7, {"afd": 1}, "paper")

    def test_forward_equals_compute_on_projected_features(self):
        heads = self.heads().double()
        image, text, p, q = batch(teacher_width=7)
        assert heads.image_head is not None
        assert heads.text_head is not None
        found = heads(image, text, p, q, 4.0, 9.0, logit_bias=-1.0)
        own = compute(
            image,
            text,
            p,
            q,
            4.0,
            9.0,
            weights=dict.fromkeys(("task", "ckd", "sigmoid"), 1.0),
            logit_bias=-1.0,
        )
        projected = compute(
            heads.image_head(image),
            heads.text_head(text),
            p,
            q,
            4.0,
            9.0,
            weights=dict.fromkeys(("fd", "icl", "cross_kd", "gd"), 1.0),
        )
        assert set(found) == set(own) | set(projected)
        for name in self.weights:
            torch.testing.assert_close(found[name], (own | projected)[name], rtol=1e-6, atol=0)
        torch.testing.assert_close(found["total"], own["total"] + projected["total"])

    def test_mfd_and_afd_through_heads(self):
        image, text, p, q = batch(teacher_width=7)
        weights = {"fd": 1.0, "mfd": 1.0, "afd": 1.0}
        heads = DistillHeads(5, 7, weights, LossFlags(), seed=0).double()
        with pytest.raises(MissingInput, match="masked_student_image"):
            heads(image, text, p, q, 4.0, 9.0)
        terms = heads(image, text, p, q, 4.0, 9.0, masked_student_image=image)
        torch.testing.assert_close(terms["mfd"], terms["fd"])
        terms["total"].backward()
        assert all(p.grad is not None for p in heads.parameters())
        paper = LossFlags.for_mode("paper", afd_projected=False)
        terms = DistillHeads(5, 7, weights, paper, seed=0).double()(image, text, p, q, 4.0, 9.0)
        torch.testing.assert_close(terms["mfd"], terms["fd"])

    def test_clamp(self):
        for mode, low, high in (("corrected", 0.0, math.log(100)), ("paper", -1.0, 9.0)):
            heads = self.heads(mode)
            assert heads.cross_scale is not None
            for start, end in ((-1.0, low), (9.0, high)):
                heads.cross_scale.data.fill_(start)
                heads.clamp_()
                assert heads.cross_scale.item() == pytest.approx(end)

    def test_weight_decay_groups(self):
        groups = self.heads().weight_decay_groups(0.1)
        assert [(len(g["params"]), g["weight_decay"]) for g in groups] == [(2, 0.1), (3, 0.0)]
        assert all(g["clip_grad"] for g in groups)
        (group,) = self.heads("paper").weight_decay_groups(0.1)
        assert (len(group["params"]), group["weight_decay"]) == (5, 0.01)
        assert not group["clip_grad"]
        torch.optim.AdamW(groups, lr=1e-3)
        assert self.heads(frozen_heads=True).weight_decay_groups(0.1) == []

    def test_frozen_heads_pass_gradients_on(self):
        heads = self.heads(frozen_heads=True).double()
        image, text, p, q = batch(teacher_width=7)
        image.requires_grad_()
        heads(image, text, p, q, 4.0, 9.0)["total"].backward()
        assert image.grad is not None
        assert all(x.grad is None for x in heads.parameters())

    def test_unused_scale_decays_in_paper_mode(self):
        heads = DistillHeads(5, 5, "kl", LossFlags.for_mode("paper"), seed=0).double()
        optimizer = torch.optim.AdamW(heads.weight_decay_groups(0.1), lr=0.5)
        heads(*batch(), 4.0, 9.0)["total"].backward()
        optimizer.step()
        assert heads.cross_scale is not None
        assert heads.cross_scale.item() == pytest.approx(LOG_SCALE * (1 - 0.5 * 0.01))

    def test_fixed_random_head_bounds_the_cosine(self):
        # The image of a fixed H is a d_s-dimensional subspace of the teacher's space.
        for student, teacher in ((512, 768), (512, 1152)):
            heads = DistillHeads(student, teacher, {"fd": 1}, LossFlags(), seed=0)
            assert heads.image_head is not None
            basis, _ = torch.linalg.qr(heads.image_head.weight.detach())
            targets = F.normalize(features(7, 200, teacher).float(), dim=1)
            best = (targets @ basis).norm(dim=1).mean().item()
            assert best == pytest.approx(math.sqrt(student / teacher), abs=0.01)
