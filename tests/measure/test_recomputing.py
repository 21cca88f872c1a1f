"""Eager whose backward computes again: eager's bits, and memory that is linear in the depth of a dense network."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from densenet_models import bc, growing
from memopt.measure.recomputing import recomputing
from memopt.measure.tracker import StorageTracker
from tests.helpers import Observed, assert_same, images, train_step
from tests.wild.models import FORMS, Overwritten


class Recomputed(nn.Module):
    """Runs a network's forward in little memory."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with recomputing():
            return self.network(x)


class Plain(Recomputed):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x)


def trained(network: nn.Module, x: torch.Tensor) -> tuple[Observed, Observed]:
    torch.manual_seed(0)
    plain, small = Plain(copy.deepcopy(network)), Recomputed(copy.deepcopy(network))
    return train_step(plain, (x,), input_gradients=True), train_step(small, (x,), input_gradients=True)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_bits_are_those_of_eager(name: str, training: bool) -> None:
    torch.manual_seed(0)
    assert_same(*trained(FORMS[name][0]().train(training), images(size=12)))


class WritesLater(nn.Module):
    """Writes into what a norm has read through a concat, and into a view of a concat."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(6, 3, 3, padding=1) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        feature = self.stem(x)
        new = self.convs[0](F.relu(self.norms[0](torch.cat([x, feature], 1))))
        feature.mul_(3)
        joined = torch.cat([feature, new], 1)
        joined[:, 1:3] += 1
        return self.convs[1](F.relu(self.norms[1](joined))) * feature


@pytest.mark.parametrize("make", [Overwritten, WritesLater])
def test_what_is_written_to_later_is_computed_again_as_it_was(make: Callable[[], nn.Module]) -> None:
    assert_same(*trained(make(), images(size=12)))


def test_strides_are_those_of_eager() -> None:
    x = images(size=4).requires_grad_()
    with recomputing():
        every_second = torch.cat([x, x], 1)[:, ::2]
        every_second.relu_()
        square = every_second * every_second

    saved = square.grad_fn._saved_self
    assert saved.untyped_storage().data_ptr() != every_second.untyped_storage().data_ptr()
    assert saved.stride() == every_second.stride()
    assert torch.equal(saved, every_second)


def _peak_bytes(network: nn.Module, recomputed: bool) -> int:
    network = Recomputed(network) if recomputed else network
    x = images(size=32)
    with StorageTracker() as tracker:
        tracker.track(network, x)
        before_bytes = tracker.current_bytes
        network(x).square().mean().backward()
    gradients_bytes = sum(p.grad.nbytes for p in network.parameters() if p.grad is not None)
    return tracker.peak_bytes - before_bytes - gradients_bytes


@pytest.mark.parametrize("family", [bc.DenseNet, growing.DenseNet])
def test_memory_is_linear_in_the_depth(family: Callable[..., nn.Module]) -> None:
    small = [_peak_bytes(family(depth=depth), recomputed=True) for depth in (40, 76, 148)]
    large = [_peak_bytes(family(depth=depth), recomputed=False) for depth in (40, 76)]

    assert small[1] < 2.0 * small[0]
    assert small[2] < 2.0 * small[1]
    assert large[1] > 2.3 * large[0]
    assert small[1] < 0.35 * large[1]


class Sums(nn.Module):
    """A sum that runs through the network, as in a residual one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(200):
            x = x + torch.sigmoid(x)
        return x


def test_long_sums_are_not_computed_from_their_beginning_each_time() -> None:
    x = images(size=4).requires_grad_()
    with recomputing():
        result = Sums()(x)
    calls: list[object] = []

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: object, types: object, args: tuple = (), kwargs: dict | None = None
        ) -> object:
            calls.append(func)
            return func(*args, **(kwargs or {}))

    with Counting():
        result.sum().backward()
    assert len(calls) < 200 * 12
