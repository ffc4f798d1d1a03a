"""Layers that must not notice how a batch was divided: BatchNorm and drop path."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from timm.layers.drop import DropPath
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from kdscale.core.catalog import STUDENTS
from kdscale.core.config import TowerSpec
from kdscale.core.types import ConfigError, MissingInput
from kdscale.models.batchnorm import (
    GroupedBatchNorm2d,
    collecting,
    commit_running_stats,
    group_batchnorm,
)
from kdscale.models.droppath import SampledDropPath, sampled_drop_path, set_draws
from kdscale.models.towers import build_clip

TEXT = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}


def small_net() -> nn.Module:
    """Convolutions with both kinds of BatchNorm, reproducible."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 3), BatchNormAct2d(4)
    )
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.5)
    return net


def images(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def step(net: nn.Module, parts: list[Tensor], **kwargs: object) -> list[Tensor]:
    """One counted pass over the parts, and the commit."""
    collecting(net, True)
    outputs = [net(part) for part in parts]
    collecting(net, False)
    commit_running_stats(net, **kwargs)  # type: ignore[arg-type]
    return outputs


def test_one_group_is_ordinary_batchnorm() -> None:
    plain, grouped = small_net(), small_net()
    assert len(group_batchnorm(grouped, 8)) == 2
    for seed in range(3):
        x = images(8, seed)
        expected = plain(x)
        (found,) = step(grouped, [x])
        assert torch.equal(found, expected)
        expected.square().sum().backward()
        found.square().sum().backward()
    for (name, a), (other, b) in zip(
        plain.named_parameters(), grouped.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]
    assert list(plain.state_dict()) == list(grouped.state_dict())
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(grouped.state_dict()[name], value, rtol=1e-6, atol=1e-7)
    plain.eval()
    grouped.eval()
    grouped.load_state_dict(plain.state_dict())
    assert torch.equal(grouped(images(5)), plain(images(5)))


def test_groups_are_normalised_apart() -> None:
    plain, grouped = small_net(), small_net()
    group_batchnorm(grouped, 4)
    x = images(12)
    expected = torch.cat([plain(part) for part in x.split(4)])
    torch.testing.assert_close(grouped(x), expected)


@pytest.mark.parametrize("micro", [4, 8, 16])
@pytest.mark.parametrize("workers", [1, 2])
def test_division_does_not_matter(micro: int, workers: int) -> None:
    """Outputs, gradients and running statistics for several workers and micro-batches."""
    whole, divided = small_net(), small_net()
    x = images(16)
    for net in (whole, divided):
        group_batchnorm(net, 4)
    (expected,) = step(whole, [x])
    expected.square().sum().backward()
    shares = x.chunk(workers)
    nets = [divided] + [copy.deepcopy(divided) for _ in shares[1:]]
    outputs = []
    sums: list[Tensor] = []
    for net, share in zip(nets, shares, strict=True):
        collecting(net, True)
        outputs += [net(part) for part in share.split(min(micro, len(share)))]
        collecting(net, False)
    for net in nets:
        sums.append(
            torch.cat(
                [layer.sums() for layer in net.modules() if isinstance(layer, GroupedBatchNorm2d)]
            )
        )
    for net in nets:
        commit_running_stats(net, lambda flat: torch.stack(sums).sum(0))
    found = torch.cat(outputs)
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    for place, parameter in enumerate(whole.parameters()):
        total = sum(list(net.parameters())[place].grad for net in nets)  # type: ignore[misc]
        torch.testing.assert_close(total, parameter.grad, rtol=1e-4, atol=1e-4)
    for net in nets:
        for name, value in whole.state_dict().items():
            torch.testing.assert_close(net.state_dict()[name], value)


def test_replays_do_not_count() -> None:
    once, replayed = small_net(), small_net()
    for net in (once, replayed):
        group_batchnorm(net, 4)
    x = images(8)
    before = {key: value.clone() for key, value in replayed.state_dict().items()}
    replayed(x)
    assert all(torch.equal(before[key], value) for key, value in replayed.state_dict().items())
    step(once, [x])
    collecting(replayed, True)
    with torch.no_grad():
        replayed(x)
    collecting(replayed, False)
    replayed(x)
    commit_running_stats(replayed)
    for name, value in once.state_dict().items():
        assert torch.equal(replayed.state_dict()[name], value)
    assert int(once.state_dict()["1.num_batches_tracked"]) == 1
    with pytest.raises(MissingInput, match="no BatchNorm statistics"):
        commit_running_stats(replayed)


def test_cumulative_momentum() -> None:
    plain, grouped = (
        nn.BatchNorm2d(3, momentum=None),
        nn.Sequential(nn.BatchNorm2d(3, momentum=None)),
    )
    group_batchnorm(grouped, 8)
    for seed in range(3):
        plain(images(8, seed))
        step(grouped, [images(8, seed)])
    torch.testing.assert_close(grouped.state_dict()["0.running_var"], plain.running_var)


def test_bad_groups_are_named() -> None:
    net = small_net()
    group_batchnorm(net, 4)
    with pytest.raises(ConfigError, match="6 samples is not a multiple of bn_group=4"):
        net(images(6))
    net.eval()
    net(images(6))
    with pytest.raises(ConfigError, match="at least 2"):
        group_batchnorm(small_net(), 1)
    with pytest.raises(ConfigError, match="BatchNorm1d"):
        group_batchnorm(nn.Sequential(nn.BatchNorm1d(3)), 4)


@pytest.mark.parametrize(
    ("name", "expected"), [("mobilevit_s", True), ("resnet18", True), ("vit_t16", False)]
)
def test_students_are_converted(name: str, expected: bool) -> None:
    """Real towers keep their checkpoint names; towers without BatchNorm are left alone."""
    with torch.device("meta"):
        model = build_clip(STUDENTS[name])
    before = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    layers = group_batchnorm(model, 4)
    assert len(layers) == len(norms)
    assert bool(layers) == expected
    after = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert after == before
    if not expected:
        commit_running_stats(model)


def tower(model_name: str, width: int, drop_path: float) -> Any:
    """A small pair with drop path."""
    spec = TowerSpec(
        name="small",
        clip_config={
            "embed_dim": 24,
            "vision_cfg": {
                "image_size": 32,
                "timm_model_name": model_name,
                "timm_pool": "",
                "timm_proj": "linear",
            },
            "text_cfg": TEXT,
        },
        image_px=32,
        context_length=8,
        embed_dim=24,
        width=width,
    )
    return build_clip(spec, drop_path=drop_path)


@pytest.mark.parametrize(("model_name", "width"), [("convnext_atto", 320), ("mobilevit_xxs", 320)])
def test_drop_path_ignores_division(model_name: str, width: int) -> None:
    model = tower(model_name, width, 0.5)
    layers = sampled_drop_path(model)
    assert layers
    assert [layer.layer for layer in layers] == list(range(len(layers)))
    group_batchnorm(model, 2)
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            nn.init.ones_(parameter)  # ConvNeXt's 1e-6 would hide its branches
    pixels = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def run(parts: list[slice], seed: int = 3, number: int = 7) -> Tensor:
        outputs: list[Tensor] = []
        with torch.no_grad():
            for part in parts:
                set_draws(model, seed, number, part, 8)
                outputs.append(model.encode_image(pixels[part]))
        return torch.cat(outputs)

    whole = run([slice(0, 8)])
    close: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(run([slice(0, 4), slice(4, 8)]), whole, **close)
    torch.testing.assert_close(run([slice(i, i + 2) for i in range(0, 8, 2)]), whole, **close)
    rows = torch.tensor([6, 7, 0, 1])
    set_draws(model, 3, 7, rows, 8)
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(pixels[rows]), whole[rows], **close)
    assert not torch.allclose(run([slice(0, 8)], seed=4), whole, **close)
    assert not torch.allclose(run([slice(0, 8)], number=8), whole, **close)


def test_drop_path_keeps_its_rate_and_mean() -> None:
    net = nn.Sequential(DropPath(0.25), DropPath(0.0), DropPath(0.25))
    layers = sampled_drop_path(net)
    assert [type(module) for module in net] == [SampledDropPath, DropPath, SampledDropPath]
    set_draws(net, 0, 0, slice(0, 20_000), 20_000)
    x = torch.ones(20_000, 2, 3)
    out = layers[0](x)
    assert out.mean().item() == pytest.approx(1.0, abs=0.02)
    assert torch.equal(out.flatten(1).amax(1), out.flatten(1).amin(1))
    assert not torch.equal(out, layers[1](x))
    state = torch.random.get_rng_state()
    layers[0](x)
    assert torch.equal(torch.random.get_rng_state(), state)
    net.eval()
    assert torch.equal(net(x), x)


def test_drop_path_misuse_is_named() -> None:
    net = nn.Sequential(DropPath(0.5))
    (layer,) = sampled_drop_path(net)
    with pytest.raises(MissingInput, match="set_draws"):
        layer(torch.ones(2, 3))
    set_draws(net, 0, 0, slice(0, 4), 8)
    with pytest.raises(ConfigError, match="saw 3 rows for 4 samples"):
        layer(torch.ones(3, 3))
    with pytest.raises(ConfigError, match=r"dropout with p=0\.1"):
        sampled_drop_path(nn.Sequential(nn.Dropout(0.1)))
