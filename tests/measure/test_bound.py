"""Judging numbers that are not bit-identical: by their distance from float64 beside eager's own."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from memopt.measure.bound import (
    ONE_BY_ONE,
    SHAKES,
    Distance,
    check_bound,
    judged,
    measure_distance,
    measuring_distance,
    without_tf32,
)


class Rounded(nn.Module):
    """A model whose weights are used with a relative error."""

    def __init__(self, model: nn.Module, error: float) -> None:
        super().__init__()
        self.model, self.error = model, error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sign = torch.where(torch.arange(x.numel(), device=x.device).view(x.shape) % 2 == 0, 1.0, -1.0)
        return self.model(x * (1.0 + self.error * sign))


def pair(make: Callable[..., nn.Module], error: float) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    naive = Rounded(make(), 0.0)
    other = copy.deepcopy(naive)
    other.error = error
    return naive, other


@pytest.mark.parametrize("newer", [False, True])
def test_full_float32_for_a_while(newer: bool) -> None:
    cudnn: Any = torch.backends.cudnn
    before = cudnn.conv.fp32_precision
    if newer:
        cudnn.rnn.fp32_precision = "ieee"  # from now on `allow_tf32` is an error
    try:
        with without_tf32():
            assert cudnn.conv.fp32_precision != "tf32"
        assert cudnn.conv.fp32_precision == before
    finally:
        cudnn.allow_tf32 = True
    assert cudnn.rnn.fp32_precision == before == "tf32"


def test_the_same_model_is_as_far_as_eager(make_tiny, images) -> None:
    naive, same = pair(make_tiny, 0.0)
    assert measure_distance(naive, same, images) == Distance(1.0, 1.0, 1.0, 1.0, 1.0, 0.0, on_cpu=True)


@pytest.mark.parametrize(("error", "passed"), [(1e-8, True), (1e-5, False), (1e-2, False)])
def test_a_larger_error_than_eagers_is_seen(make_tiny, images, error: float, passed: bool) -> None:
    naive, other = pair(make_tiny, error)
    result = check_bound(naive, other, images)
    assert result.numerics == "fast"
    assert result.passed is passed
    assert bool(result.differing) is not passed


def test_under_autocast_eagers_own_error_is_larger(make_tiny, images) -> None:
    naive, other = pair(make_tiny, 1e-4)
    assert not check_bound(naive, other, images).passed
    assert check_bound(naive, other, images, amp=torch.bfloat16).passed


def test_models_made_apart_are_compared_with_the_same_weights(make_tiny, images) -> None:
    naive, other = make_tiny(), make_tiny()
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    assert check_bound(naive, other, images).passed
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    assert all(parameter.grad is None for parameter in (*naive.parameters(), *other.parameters()))


@pytest.mark.parametrize("dropout", [nn.Dropout, nn.Dropout2d])
def test_dropout_draws_the_same_in_float64(images, dropout: type[nn.Module]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), dropout(0.5), nn.Conv2d(8, 2, 3))
    distance = measure_distance(model, copy.deepcopy(model), images)
    assert distance.outputs == 1.0
    torch.manual_seed(0)
    wrong = copy.deepcopy(model)
    wrong[1].p = 0.4
    assert measure_distance(model, wrong, images).outputs > 100


class Watched(nn.Module):
    """Notes how many dispatch modes its forwards and backwards run under."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.conv, self.dropout, self.modes = nn.Conv2d(3, 2, 3), nn.Dropout(share), list[int]()

    def __deepcopy__(self, memo: Any) -> "Watched":
        other = Watched(self.dropout.p).to(self.conv.weight.dtype)
        other.load_state_dict(self.state_dict())
        other.modes = self.modes
        return other

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.modes.append(torch._C._len_torch_dispatch_stack())
        y: torch.Tensor = self.conv(x)
        y.register_hook(lambda _: self.modes.append(torch._C._len_torch_dispatch_stack()))
        return self.dropout(y) if self.dropout.p else y


@pytest.mark.parametrize(("share", "modes"), [(0.0, [1, 0, 0, 0, 0, 0]), (0.5, [1] * 6)])
def test_a_mode_is_in_force_only_where_something_is_drawn(images, share: float, modes: list[int]) -> None:
    model = Watched(share)
    distance = measure_distance(model, copy.deepcopy(model), images, seeds=2)
    assert model.modes == modes * 2
    assert (distance.outputs, distance.gradients) == (1.0, 1.0)


def test_only_seeds_that_are_new_are_run(images) -> None:
    naive, other = Watched(0.0), Watched(0.0)
    with measuring_distance(naive, other) as of:
        distance = of(images)
        first, all_three = distance(1, 0), distance(3, 0)
        assert len(naive.modes) == 2 * 2 * 3
        assert len(other.modes) == 2 * 3
        assert distance(3, 0) == all_three
        assert len(other.modes) == 2 * 3
    assert first == measure_distance(naive, other, images, seeds=1)
    assert all_three == measure_distance(naive, other, images, seeds=3)


def test_what_is_not_finite_must_be_so_in_the_same_places(images) -> None:
    class Overflowing(nn.Conv2d):
        broken = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x) * 1e39
            return F.pad(y[:, :, :, 1:], (1, 0)) if self.broken else y

    naive = Overflowing(3, 2, 3)
    assert check_bound(naive, copy.deepcopy(naive), images).passed
    other = copy.deepcopy(naive)
    other.broken = True
    assert not check_bound(naive, other, images).passed


@pytest.mark.parametrize(
    ("figures", "on_cpu", "within"),
    [
        ((1.25, 1.25, 1.25, 2.0, 9.0, 1e-6), False, True),
        ((1.0, 1.3, 1.0, 1.0, 1.0, 0.0), False, False),
        ((1.0, 1.3, 1.0, 1.0, 1.0, 0.0), True, True),
        ((1.0, 1.0, 1.0, 2.1, 1.0, 0.0), False, False),
        ((1.0, 1.0, 1.0, 1.0, 1.3, 1e-4), False, False),
        ((2.1, 1.0, 1.0, 1.0, 1.0, 0.0), True, False),
    ],
)
def test_limits(figures: tuple[float, ...], on_cpu: bool, within: bool) -> None:
    assert Distance(*figures, on_cpu=on_cpu).within_bound is within


class Kinked(nn.Module):
    """A thousand activations that are one rounding away from a kink, `moved` of them to its other side."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1000,), 1.0).nextafter(torch.tensor(2.0)))
        self.moved, self.scale = 0, 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        moves = torch.where(torch.arange(1000) < self.moved, 1.0 - 1e-7, 1.0).to(self.weight.dtype)
        return F.relu(self.weight * moves - 1.0) * self.scale + x.mean() * self.weight


def test_kinks_move_eager_as_much_where_its_weights_are_rounded_otherwise(images) -> None:
    naive, other = Kinked(), Kinked()
    other.moved = 100
    assert not measure_distance(naive, other, images).within_bound
    assert check_bound(naive, other, images).passed
    before = naive.weight.detach().clone()
    with measuring_distance(naive, other) as of:
        assert judged(of(images), (1, 0), (1, 4)).within_bound
    assert torch.equal(naive.weight, before)
    other.scale = 10.0
    assert not check_bound(naive, other, images).passed


def test_shakes_one_by_one_are_those_of_all_at_once(images) -> None:
    naive, other = Kinked(), Kinked()
    other.moved = 100
    with measuring_distance(naive, other) as of:
        at_once, by_itself = of(images)(1, SHAKES), of(images)
        one_by_one = [by_itself(*effort) for effort in ONE_BY_ONE]
    assert one_by_one[-1] == at_once
    ratios = [distance.gradients for distance in one_by_one]
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[0] > ratios[-1]


def test_no_more_shakes_than_it_takes(images) -> None:
    naive, other = Kinked(), Kinked()
    other.moved = 100
    tried: list[tuple[int, int]] = []
    with measuring_distance(naive, other) as of:
        over = of(images)
        judged(lambda *effort: tried.append(effort) or over(*effort), *ONE_BY_ONE)
        passing = next(number for number, effort in enumerate(ONE_BY_ONE) if over(*effort).within_bound)
    assert tried == list(ONE_BY_ONE[: passing + 1])
    assert 0 < passing < SHAKES
