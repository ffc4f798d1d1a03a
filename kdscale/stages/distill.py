"""The distillation stage: train a student CLIP, with a frozen teacher or without one.

Runs on every worker of a process group. Pretraining a miniature teacher is the same stage with
no teacher. Shape suffixes: B rows of one worker, H W image sides, D width, T tokens.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from kdscale.core.config import TowerSpec
from kdscale.core.scale import default_bn_group
from kdscale.core.storage import Storage
from kdscale.core.types import CacheMissing, CheckpointError, ConfigError
from kdscale.data.samples import Batch
from kdscale.data.sidecars import read_summary
from kdscale.losses.heads import MAX_LOG_SCALE, DistillHeads
from kdscale.losses.recipes import LossFlags, active_terms, weights_for
from kdscale.models.batchnorm import collecting, commit_running_stats, group_batchnorm
from kdscale.models.droppath import mask_patches, sampled_drop_path, set_draws
from kdscale.models.towers import freeze, load_tower, normalise
from kdscale.stages.evaluate import Tower
from kdscale.stages.exchange import gather_rows
from kdscale.stages.jobs import DistillJob
from kdscale.stages.loop import (
    ExchangeOptions,
    World,
    adam_options,
    autocast,
    average_gradients,
    backward_step,
    check_precision,
    gradient_scaler,
    learning_rate,
    micro_batches,
    parameter_groups,
    to_device,
)
from kdscale.stages.shares import rows_at_once

SIGMOID_BIAS = -10.0


class Encoder(nn.Module):
    """Both towers of a student in one forward, so that DDP sees one module."""

    def __init__(self, clip: nn.Module, masked: bool = False) -> None:
        super().__init__()
        self.clip = clip
        self.mask = mask_patches(clip) if masked else None

    def forward(self, pixels_BCHW: Tensor, tokens_BT: Tensor) -> tuple[Tensor, ...]:
        """Returns raw image, text and, for `mfd`, masked image features, (B, D) each."""
        clip: Any = self.clip
        features = (clip.encode_image(pixels_BCHW), clip.encode_text(tokens_BT))
        if self.mask is None:
            return features
        self.mask.active = True
        masked = clip.encode_image(pixels_BCHW)
        self.mask.active = False
        return (*features, masked)


class DistillTask:
    """Student, teacher, heads and optimizer of one run, and one optimizer step of it."""

    def __init__(self, job: DistillJob, world: World) -> None:
        recipe = job.recipe
        check_precision(recipe.precision or "fp32", world.device.type)
        self.job, self.recipe, self.world = job, recipe, world
        self.flags = LossFlags.for_mode(recipe.mode, **recipe.flags)
        if self.flags.unsynced_heads and not self.flags.drop_heads_on_resume:
            raise ConfigError(
                "unsynced_heads needs drop_heads_on_resume: a checkpoint holds one set of heads"
            )
        storage = Storage(job.storage_root)
        self.student = self._build_student(storage)
        self.cached_scale = _cached_scale(job)
        self.teacher = None if self.cached_scale else self._build_teacher(storage)
        teacher_dim = getattr(recipe.teacher, "embed_dim", None)
        loss = recipe.loss
        weights = loss if callable(loss) else weights_for(loss, self.flags)
        self.heads = DistillHeads(
            self.student.spec.embed_dim, teacher_dim, weights, self.flags, recipe.seed, world.rank
        ).to(world.device)
        self.encoder = self._wrap()
        self.optimizer = self._build_optimizer()
        self.scaler = gradient_scaler(recipe.precision or "fp32", world.device)
        rows = recipe.global_batch_size // world.size
        self.parts = micro_batches(rows, rows_at_once(recipe, world.size))

    def _build_student(self, storage: Storage) -> Tower:
        """Builds the student as it trains: grouped BatchNorm, drawn paths."""
        spec = self.recipe.student
        assert isinstance(spec, TowerSpec)
        options: dict[str, Any] = {"drop_path": self.recipe.drop_path}
        loss = self.recipe.loss
        if not callable(loss) and "sigmoid" in active_terms(weights_for(loss, self.flags)):
            options["logit_bias"] = SIGMOID_BIAS  # SigLIP's start; a pair with its own keeps it
        model = load_tower(spec, storage, seed=self.recipe.seed, **options)
        group_batchnorm(
            model, self.recipe.bn_group or default_bn_group(self.recipe.global_batch_size)
        )
        sampled_drop_path(model)
        return Tower(model.to(self.world.device).train(), spec)

    def _build_teacher(self, storage: Storage) -> Tower | None:
        """Builds the frozen teacher, None without one."""
        spec = self.recipe.teacher
        if spec is None:
            return None
        assert isinstance(spec, TowerSpec)
        return Tower(freeze(load_tower(spec, storage).to(self.world.device)), spec)

    @property
    def scales(self) -> list[nn.Parameter]:
        """The student's logit scale and, if it has one, bias; they live outside DDP."""
        model: Any = self.student.model
        bias = getattr(model, "logit_bias", None)
        return [model.logit_scale] + ([bias] if isinstance(bias, nn.Parameter) else [])

    def _wrap(self) -> nn.Module:
        """Makes the module whose gradients the workers average; scales are averaged apart."""
        masked = "mfd" in self.heads.terms and not self.flags.mfd_noop
        encoder = Encoder(self.student.model, masked)
        if self.world.size == 1:
            return encoder
        outside = {id(parameter) for parameter in self.scales}
        names = [name for name, p in encoder.named_parameters() if id(p) in outside]
        buffers = [name for name, _ in encoder.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            encoder, names + buffers
        )
        return DistributedDataParallel(encoder, broadcast_buffers=False)

    def _build_optimizer(self) -> torch.optim.AdamW:
        """Makes AdamW over student, heads and scales."""
        groups = parameter_groups(self.student.model, self.recipe.weight_decay)
        groups += self.heads.weight_decay_groups(self.recipe.weight_decay)
        options: Any = adam_options(self.recipe, self.flags.betas_by_name)
        return torch.optim.AdamW(groups, lr=self.recipe.lr, **options)

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Runs one optimizer step and returns the terms of the global loss, unsynchronised."""
        lr = learning_rate(
            batch.step,
            lr=self.recipe.lr,
            warmup_steps=self.recipe.warmup_steps,
            total_steps=self.job.total_steps,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        options = ExchangeOptions(
            detached=self.flags.detached_gather,
            synced=not self.flags.unsynced_heads,
            scale=float(self.scaler.get_scale()),
        )
        terms = backward_step(
            self.encoder, self._encode_fn(batch), self._loss_fn(batch), self.parts, options
        )
        self._update(options.scale)
        return terms | {"lr": torch.tensor(lr), "logit_scale": self.scales[0].detach().exp()}

    def _update(self, scale: float) -> None:
        """Averages, clips, steps and clamps."""
        shared = [p for p in self.heads.parameters() if not self.flags.unsynced_heads]
        average_gradients(self.scales + shared, self.world)
        for parameter in [*self.scales, *self.heads.parameters()]:
            if parameter.grad is not None and scale != 1.0:
                parameter.grad.mul_(scale)  # the scaler divides every gradient again
        if self.recipe.grad_clip is not None:
            self.scaler.unscale_(self.optimizer)
            groups = [g for g in self.optimizer.param_groups if g["clip_grad"]]
            nn.utils.clip_grad_norm_(
                [p for g in groups for p in g["params"]], self.recipe.grad_clip
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        commit_running_stats(self.student.model, self.world.sum)
        with torch.no_grad():
            self.scales[0].clamp_(0.0, MAX_LOG_SCALE)
        self.heads.clamp_()

    def _encode_fn(self, batch: Batch) -> Callable[[slice, bool], tuple[Tensor, ...]]:
        """Returns what encodes a part of this worker's batch."""
        spec, device = self.student.spec, self.world.device
        images = to_device(batch.images[spec.image_px], device)
        tokens = to_device(batch.tokens[spec.tokens_name], device)
        rows = torch.as_tensor(batch.rows % self.recipe.global_batch_size)

        def encode(part: slice, replay: bool) -> tuple[Tensor, ...]:
            """Encodes a part; a replay repeats its draws and leaves statistics alone."""
            collecting(self.student.model, not replay)
            set_draws(
                self.student.model,
                self.recipe.seed,
                batch.step,
                rows[part],
                self.recipe.global_batch_size,
            )
            with autocast(self.recipe.precision or "fp32", device):
                module = self.encoder if torch.is_grad_enabled() else _bare(self.encoder)
                return module(normalise(images[part], spec), tokens[part])

        return encode

    def _loss_fn(self, batch: Batch) -> Callable[..., dict[str, Tensor]]:
        """Returns the loss of the global batch as a function of the student's features."""
        teacher_image, teacher_text, teacher_scale = self._teach(batch)
        scale = self.scales[0]
        bias: Any = self.scales[1] if len(self.scales) > 1 else 0.0

        def loss(
            image_ND: Tensor, text_ND: Tensor, masked_ND: Tensor | None = None
        ) -> dict[str, Tensor]:
            """Computes terms and total from gathered features."""
            return self.heads(
                image_ND,
                text_ND,
                teacher_image,
                teacher_text,
                scale.exp(),
                teacher_scale,
                logit_bias=bias,
                masked_student_image=masked_ND,
            )

        return loss

    @torch.no_grad()
    def _teach(self, batch: Batch) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Returns the teacher's unit features of the global batch and its scale."""
        if self.cached_scale is not None:
            image, text = batch.teacher_image, batch.teacher_text
            if image is None or text is None:
                raise CacheMissing(f"the batch of step {batch.step} has no teacher embeddings")
            moved = [to_device(half, self.world.device).float() for half in (image, text)]
            return gather_rows(moved[0]), gather_rows(moved[1]), self.cached_scale
        if self.teacher is None:
            return None, None, None
        model: Any = self.teacher.model
        spec, device = self.teacher.spec, self.world.device
        found: list[tuple[Tensor, Tensor]] = []
        for part in self.parts:
            pixels = normalise(to_device(batch.images[spec.image_px][part], device), spec)
            tokens = to_device(batch.tokens[spec.tokens_name][part], device)
            with autocast(self.recipe.precision or "fp32", device):
                found.append((model.encode_image(pixels), model.encode_text(tokens)))
        image, text = (torch.cat(column).float() for column in zip(*found, strict=True))
        return (
            gather_rows(normalize(image, dim=-1)),
            gather_rows(normalize(text, dim=-1)),
            model.logit_scale.exp(),
        )

    def state(self, step: int) -> bytes:
        """Serialises everything that the next step depends on."""
        state: dict[str, Any] = {
            "step": step,
            "manifest": self.job.data.hash,
            "student": self.student.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": torch.get_rng_state(),
        }
        if not self.flags.drop_heads_on_resume:
            state["heads"] = self.heads.state_dict()
        buffer = io.BytesIO()
        torch.save(state, buffer)
        return buffer.getvalue()

    def load_state(self, data: bytes) -> int:
        """Restores a state and returns its step.

        Raises:
            CheckpointError: If it belongs to other data.
        """
        # On the CPU: AdamW's step counters must stay there, else each one stalls the GPU.
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if state["manifest"] != self.job.data.hash:
            raise CheckpointError(
                f"the checkpoint was made on data {state['manifest']}, the manifest now says "
                f"{self.job.data.hash}: the shards have changed; use a new storage"
            )
        self.student.model.load_state_dict(state["student"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"])
        if not self.flags.drop_heads_on_resume:
            self.heads.load_state_dict(state["heads"])
        return int(state["step"])


def _bare(module: nn.Module) -> nn.Module:
    """Returns the module under DDP."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def _cached_scale(job: DistillJob) -> Tensor | None:
    """Reads the logit scale of a cached teacher; None where the teacher runs along."""
    cache = job.cache
    if cache is None:
        return None
    return torch.tensor(float(read_summary(cache)["logit_scale"]))
