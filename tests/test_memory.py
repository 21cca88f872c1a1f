"""The promise itself: memory of BC-100 at each level, and its growth with depth, from steps on fake tensors."""

import math
from functools import partial

import pytest
import torch
from torch import nn

import memopt
from densenet_models import bc
from memopt.measure.memory import leave
from memopt.measure.predict import predict_step

INPUTS = (torch.empty(64, 3, 32, 32),)


def _activation_peak(level: str | None, depth: int = 100) -> int:
    def apply(model: nn.Module) -> nn.Module:
        return leave(model) if level is None else memopt.apply(model, config=memopt.Config(recompute=level))

    peak = predict_step(partial(bc.DenseNet, depth=depth), INPUTS, apply=apply).activation_peak_bytes
    assert peak is not None
    return peak


@pytest.fixture(scope="module")
def naive_100() -> int:
    return _activation_peak(None)


@pytest.mark.parametrize(("level", "ratio"), [("concat", 0.37), ("layer", 0.15)])
def test_activation_peak_of_bc_100(naive_100: int, level: str, ratio: float) -> None:
    assert _activation_peak(level) <= ratio * naive_100


def test_growth_with_depth_is_linear(naive_100: int) -> None:
    depths = (40, 100, 196, 400)
    ours = [_activation_peak("layer", depth) for depth in depths]

    assert _slope(depths, ours) <= 1.0
    assert _slope((40, 100), [_activation_peak(None, 40), naive_100]) > 1.4


def _slope(depths: tuple[int, ...], peaks: list[int]) -> float:
    """Least-squares slope of log peak over log depth."""
    xs, ys = [math.log(d) for d in depths], [math.log(p) for p in peaks]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    covariance = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    return covariance / sum((x - mean_x) ** 2 for x in xs)
