"""DistributedDataParallel in two processes: eager's bits, every parameter once, memory still saved."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import memopt
from memopt.measure.tracker import StorageTracker
from tests.composition.ranks import Ranks
from tests.helpers import LEVELS, assert_rewritten, assert_same, dense_net, images, rewritten_copy, state_of, train_step

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "unused parameters": {"find_unused_parameters": True},
    "static graph": {"static_graph": True},
    "gradients as views of buckets": {"gradient_as_bucket_view": True},
    "tiny buckets": {"bucket_cap_mb": 0.0005},
    "own buffers": {"broadcast_buffers": False},
}


def trained(rank: int, options: str, level: str, first: str) -> None:
    """Three steps on different images in each rank, naive and rewritten."""
    naive = dense_net()
    model = copy.deepcopy(naive)
    config = memopt.Config(recompute=level)
    if first == "apply":
        memopt.apply(model, config=config)
    pair = [DistributedDataParallel(m, **OPTIONS[options]) for m in (naive, model)]
    if first == "wrap":
        memopt.apply(pair[1], config=config)
    for step in range(3):
        x = images(seed=10 * step + rank)
        assert_same(*(train_step(each, (x,)) for each in pair))
    assert_rewritten(model, 7)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("options", OPTIONS)
def test_trains_as_eager_does(options: str, level: str, ranks: Ranks) -> None:
    ranks.run(trained, options, level, "apply")


def test_applied_to_the_wrapper(ranks: Ranks) -> None:
    ranks.run(trained, "default", "layer", "wrap")


def shared_and_unused(rank: int) -> None:
    """A weight at two places of a block, a part of the model that no output depends on, frozen norms."""
    naive = dense_net()
    naive.block1.layers[1].norm2.weight = naive.block1.layers[0].norm2.weight
    naive.extra = nn.Linear(3, 3)
    naive.block2.layers[0].norm1.requires_grad_(False)
    model = rewritten_copy(naive)
    assert model.block1.layers[1].norm2.weight is model.block1.layers[0].norm2.weight
    pair = [DistributedDataParallel(m, find_unused_parameters=True) for m in (naive, model)]
    for step in range(2):
        x = images(seed=10 * step + rank)
        assert_same(*(train_step(each, (x,)) for each in pair))
    assert_rewritten(model, 7)


def test_shared_weights_frozen_norms_and_unused_parameters(ranks: Ranks) -> None:
    ranks.run(shared_and_unused)


def accumulated(rank: int) -> None:
    """Two micro-batches before one reduction."""
    naive = dense_net()
    model = rewritten_copy(naive)
    observed = []
    for each in (naive, model):
        parallel = DistributedDataParallel(each)
        with parallel.no_sync():
            parallel(images(seed=rank)).square().mean().backward()
        parallel(images(seed=2 + rank)).square().mean().backward()
        observed.append(state_of(each))
    assert_same(*observed)
    assert_rewritten(model, 7)


def test_gradient_accumulation_without_reduction(ranks: Ranks) -> None:
    ranks.run(accumulated)


def uneven(rank: int) -> None:
    """Rank 1 runs out of batches first and shadows the collectives of the other."""
    naive = dense_net()
    model = rewritten_copy(naive)
    observed = []
    for each in (naive, model):
        parallel = DistributedDataParallel(each)
        with parallel.join():
            for step in range(2 - rank):
                parallel(images(seed=step + rank)).square().mean().backward()
        observed.append(state_of(each))
    assert_same(*observed)


def test_uneven_inputs(ranks: Ranks) -> None:
    ranks.run(uneven)


def new_shape(rank: int) -> None:
    """The last batch is smaller, in one rank alone: recorded anew there, and the ranks stay in step."""
    naive = dense_net()
    model = rewritten_copy(naive)
    pair = [DistributedDataParallel(m) for m in (naive, model)]
    for size in (3, 2 if rank else 3, 3):
        assert_same(*(train_step(each, (images(size, seed=rank),)) for each in pair))
    assert_rewritten(model, 7)


def test_one_rank_with_another_batch_size(ranks: Ranks) -> None:
    ranks.run(new_shape)


def activation_peak(rank: int) -> list[int]:
    peaks = []
    for model in (dense_net(growth=8), rewritten_copy(dense_net(growth=8))):
        x = images(4, 12)
        with StorageTracker() as tracker:
            parallel = DistributedDataParallel(model)
            train_step(parallel, (x,), loss=mean_square)
            tracker.track(parallel, x)
            before = tracker.current_bytes
            tracker.reset_peak()
            mean_square(parallel(x)).backward()
            peaks.append(tracker.peak_bytes - before)
            parallel.zero_grad()
    return peaks


def mean_square(output: torch.Tensor) -> torch.Tensor:
    return output.square().mean()


def test_memory_is_still_saved(ranks: Ranks) -> None:
    for naive, ours in ranks.run(activation_peak):
        assert ours < 0.6 * naive


def around(rank: int, what: str) -> None:
    """Something between DDP and the model, or around both."""
    naive = dense_net()
    model = rewritten_copy(naive)
    pair = [AROUND[what](m) for m in (naive, model)]
    for step in range(3):
        x = images(seed=10 * step + rank)
        one, two = (train_step(each, (x,)) for each in pair)
        assert_same(one, two)
    assert_rewritten(model, 7)


class Checkpointed(nn.Module):
    """The whole model under a checkpoint."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


def with_comm_hook(model: nn.Module) -> nn.Module:
    parallel = DistributedDataParallel(model)
    parallel.register_comm_hook(None, default_hooks.fp16_compress_hook)
    return parallel


def compiled(model: nn.Module) -> nn.Module:
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor")  # Dynamo means to hide it
    return torch.compile(DistributedDataParallel(model), backend="aot_eager")


AROUND: dict[str, Callable[[nn.Module], nn.Module]] = {
    "checkpoint": lambda model: DistributedDataParallel(Checkpointed(model)),
    "compressed gradients": with_comm_hook,
}


@pytest.mark.parametrize("what", AROUND)
def test_with_something_around(what: str, ranks: Ranks) -> None:
    ranks.run(around, what)


def compiled_after_wrapping(rank: int) -> None:
    """Naive is not compiled: what Inductor's neighbours make of it need not have eager's bits."""
    naive = dense_net()
    model = rewritten_copy(naive)
    pair = (DistributedDataParallel(naive), compiled(model))
    for step in range(3):
        x = images(seed=10 * step + rank)
        expected, actual = (train_step(each, (x,)) for each in pair)
        assert_same(expected, {name.replace("_orig_mod.", ""): value for name, value in actual.items()})
    assert_rewritten(model, 7)


def test_compiled_after_wrapping(ranks: Ranks) -> None:
    ranks.run(compiled_after_wrapping)
