"""One process equals many: global losses and gradients for 1, 2 and 4 ranks."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

from kdscale.losses import TERMS, DistillHeads, LossFlags
from kdscale.stages.exchange import exchange, gather_rows

WORLDS = (4, 2, 1)
NUM_ROWS, STUDENT, TEACHER = 8, 6, 9
CASES = {
    "corrected": LossFlags(),
    "detached": LossFlags(detached_gather=True),
    "unsynced": LossFlags(unsynced_heads=True),
}
Result = dict[str, Tensor]


class Student(nn.Module):
    """Two small encoders and a logit scale."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = (
            nn.Sequential(nn.Linear(5, 12), nn.GELU(), nn.Linear(12, STUDENT)) for _ in range(2)
        )
        self.log_scale = nn.Parameter(torch.tensor(1.3))


def make_batch() -> list[Tensor]:
    """Draws images, texts, masked images and unit teacher features of the global batch."""
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(NUM_ROWS, 5, generator=generator).double() for _ in range(3)]
    teacher = [torch.randn(NUM_ROWS, TEACHER, generator=generator).double() for _ in range(2)]
    return inputs + [F.normalize(x, dim=1) for x in teacher]


def make_student() -> Student:
    torch.manual_seed(0)
    return Student().double()


def make_heads(flags: LossFlags, rank: int) -> DistillHeads:
    weights = dict.fromkeys(TERMS, 1.0) | {"gd": 50.0}
    return DistillHeads(STUDENT, TEACHER, weights, flags, seed=2, rank=rank).double()


def replicated_step(flags: LossFlags, rank: int, world: int) -> Result:
    """Takes one rank's step and averages all gradients over ranks."""
    student, heads = make_student(), make_heads(flags, rank)
    part = NUM_ROWS // world
    own = [x[rank * part : (rank + 1) * part] for x in make_batch()]
    local = [student.image(own[0]), student.text(own[1]), student.image(own[2])]
    teacher = [gather_rows(x) for x in own[3:]]

    def loss(image: Tensor, text: Tensor, masked: Tensor) -> Result:
        scale = student.log_scale.exp()
        return heads(
            image, text, *teacher, scale, 7.0, logit_bias=-1.0, masked_student_image=masked
        )

    synced = not flags.unsynced_heads
    terms, gradients = exchange(local, loss, detached=flags.detached_gather, synced=synced)
    torch.autograd.backward(local, gradients)
    found = {f"term.{name}": term for name, term in terms.items()}
    for prefix, module in (("student", student), ("heads", heads)):
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None
            if world > 1:
                dist.all_reduce(parameter.grad)
            found[f"{prefix}.{name}"] = parameter.grad / world
    return found


def whole_step(flags: LossFlags, head_ranks: int = 1) -> Result:
    """Differentiates the global loss, averaged over several ranks' heads, in one graph."""
    student = make_student()
    all_heads = [make_heads(flags, rank) for rank in range(head_ranks)]
    image, text, masked, p, q = make_batch()
    features = student.image(image), student.text(text), p, q, student.log_scale.exp(), 7.0
    results = [
        heads(*features, logit_bias=-1.0, masked_student_image=student.image(masked))
        for heads in all_heads
    ]
    (sum(terms["total"] for terms in results) / head_ranks).backward()
    found = {f"term.{name}": term.detach() for name, term in results[0].items()}
    grads = {f"student.{n}": p.grad for n, p in student.named_parameters()}
    for heads in all_heads:
        for name, parameter in heads.named_parameters():
            known = grads.get(f"heads.{name}", 0.0)
            grads[f"heads.{name}"] = known + parameter.grad
    return found | {name: grad for name, grad in grads.items() if grad is not None}


def run_worlds(rank: int, folder: str) -> None:
    """Runs all cases in worlds of shrinking size; ranks beyond a world's size sit it out."""
    torch.set_num_threads(1)
    for world in WORLDS:
        if rank >= world:
            return
        store = f"file://{folder}/store_{world}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
        found = {name: replicated_step(flags, rank, world) for name, flags in CASES.items()}
        torch.save(found, f"{folder}/world_{world}_rank_{rank}.pt")
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], dict[str, Result]]:
    """Runs the processes once; results by world size and rank."""
    folder: Path = tmp_path_factory.mktemp("worlds")
    # A server that has imported torch once forks the ranks: one import in place of four. The
    # second module is what backward with given gradients imports, by way of sympy.
    slow_imports = ["torch", "torch.fx.experimental.symbolic_shapes", "pytest"]
    multiprocessing.set_forkserver_preload(slow_imports)
    arguments = {"args": (str(folder),), "nprocs": max(WORLDS), "start_method": "forkserver"}
    mp.start_processes(run_worlds, **arguments)
    ranks = [(world, rank) for world in WORLDS for rank in range(world)]
    return {(w, r): torch.load(folder / f"world_{w}_rank_{r}.pt") for w, r in ranks}


def assert_same(found: Result, expected: Result, factors: dict[str, float] | None = None) -> None:
    """Compares to 1e-9 of each tensor's largest entry."""
    assert set(found) == set(expected)
    for name, value in expected.items():
        factor = next((f for prefix, f in (factors or {}).items() if name.startswith(prefix)), 1.0)
        error = (found[name] - factor * value).abs().max()
        assert error <= 1e-9 * (factor * value).abs().max(), name


def test_without_process_group():
    found = replicated_step(LossFlags(), rank=0, world=1)
    assert_same(found, whole_step(LossFlags()))
    assert all(value.abs().max() > 0 for value in found.values())


@pytest.mark.parametrize("world", WORLDS)
def test_corrected_is_exact(results: dict[tuple[int, int], dict[str, Result]], world: int):
    expected = whole_step(LossFlags())
    for rank in range(world):
        assert_same(results[world, rank]["corrected"], expected)


@pytest.mark.parametrize("world", WORLDS)
def test_detached_gather_shrinks_encoder_gradients(
    results: dict[tuple[int, int], dict[str, Result]], world: int
):
    factors = {"student.image": 1 / world, "student.text": 1 / world}
    for rank in range(world):
        assert_same(results[world, rank]["detached"], whole_step(LossFlags()), factors)


@pytest.mark.parametrize("world", WORLDS)
def test_unsynced_heads_minimise_the_mean_loss(
    results: dict[tuple[int, int], dict[str, Result]], world: int
):
    expected = whole_step(CASES["unsynced"], head_ranks=world)
    # Sums over ranks, of heads that differ; their mean gradient is compared.
    found = results[world, 0]["unsynced"]
    assert_same(found, expected)
    if world > 1:
        other = results[world, 1]["unsynced"]
        assert other["term.total"] != found["term.total"]
        assert_same(
            {name: x for name, x in other.items() if name.startswith("student")},
            {name: x for name, x in expected.items() if name.startswith("student")},
        )
