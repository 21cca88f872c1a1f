"""Several processes with memopt train as several without, and as one process that does all their work."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from memopt.measure.bits import same_bits
from tests.distributed.launch import ROOT, run
from tests.distributed.steps import STEPS, Step, micro_batch, observed, optimizer_of
from tests.helpers import dense_net

TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=[2, 4])
def ddp(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """Number of processes, and the folder in which their steps are."""
    folder = tmp_path_factory.mktemp(f"ddp{request.param}")
    run(request.param, [str(ROOT / "tests" / "distributed" / "steps.py"), "ddp", str(folder)], folder)
    return request.param, folder


def load(folder: Path, variant: str, rank: int) -> list[Step]:
    return torch.load(folder / f"{variant}{rank}.pt", weights_only=True)


def assert_every_bit_is_the_same(folder: Path, ranks: int) -> None:
    for rank in range(ranks):
        naive, exact = load(folder, "naive", rank), load(folder, "exact", rank)
        assert len(naive) == len(exact) == STEPS
        for number, (one, other) in enumerate(zip(naive, exact, strict=True)):
            assert one.keys() == other.keys()
            differing = [name for name in one if not same_bits(one[name], other[name])]
            assert not differing, f"rank {rank}, step {number}: {differing}"


def test_exact_processes_equal_naive_ones_bit_for_bit(ddp: tuple[int, Path]) -> None:
    ranks, folder = ddp
    assert_every_bit_is_the_same(folder, ranks)


def test_sharded_exact_processes_equal_naive_ones_bit_for_bit(tmp_path: Path) -> None:
    run(2, [str(ROOT / "tests" / "distributed" / "steps.py"), "fsdp", str(tmp_path)], tmp_path)
    assert_every_bit_is_the_same(tmp_path, 2)


def test_one_process_with_its_own_copies_of_the_norms_does_the_same(ddp: tuple[int, Path]) -> None:
    ranks, folder = ddp
    alone = train_alone(ranks)
    for rank in range(ranks):
        for number, (one, other) in enumerate(zip(alone[rank], load(folder, "exact", rank), strict=True)):
            for kind in ("parameter", "gradient", "buffer"):
                error = relative_error(one, other, kind)
                assert error < TOLERANCE, f"rank {rank}, step {number}: {kind}s differ by {error}"


def train_alone(ranks: int) -> list[list[Step]]:
    """Each rank's micro-batches through a copy of its own; gradients averaged, buffers of the first copy taken."""
    copies = [dense_net() for _ in range(ranks)]
    optimizers = [optimizer_of(model) for model in copies]
    steps: list[list[Step]] = [[] for _ in copies]
    for step in range(STEPS):
        buffers = [buffer.clone() for buffer in copies[0].buffers()]
        losses = []
        for rank, model in enumerate(copies):
            for buffer, first in zip(model.buffers(), buffers, strict=True):
                buffer.copy_(first)
            images, labels = micro_batch(step, rank)
            model.zero_grad()
            losses.append(nn.functional.cross_entropy(model(images), labels))
            losses[-1].backward()
        average(copies)
        for rank, (model, optimizer) in enumerate(zip(copies, optimizers, strict=True)):
            optimizer.step()
            steps[rank].append(copy.deepcopy(observed(model, losses[rank])))
    return steps


def average(copies: list[nn.Module]) -> None:
    for parameters in zip(*(model.parameters() for model in copies), strict=True):
        mean = torch.stack([parameter.grad for parameter in parameters]).mean(0)
        for parameter in parameters:
            parameter.grad.copy_(mean)


def relative_error(one: Step, other: Step, kind: str) -> float:
    names = [name for name in one if name.startswith(kind)]
    joined = [torch.cat([step[name].double().flatten() for name in names]) for step in (one, other)]
    return float((joined[1] - joined[0]).norm() / joined[0].norm())
