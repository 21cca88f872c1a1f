"""3-D DenseNet: shapes, size, structure, smallest input."""

import pytest
import torch
from torch import fx, nn

from densenet_models import volumetric


def test_default() -> None:
    model = volumetric.DenseNet()
    assert sum(parameter.numel() for parameter in model.parameters()) == 106_546
    assert f"{106_546:,}" in (volumetric.DenseNet.__doc__ or "")
    assert model(torch.randn(2, 1, 32, 32, 32)).shape == (2, 2)


def test_is_three_dimensional() -> None:
    kinds = {type(module) for module in volumetric.DenseNet().modules()}
    assert {nn.Conv3d, nn.BatchNorm3d, nn.AvgPool3d, nn.MaxPool3d} <= kinds
    assert not {nn.Conv2d, nn.BatchNorm2d} & kinds


def test_every_layer_concatenates_a_pair() -> None:
    graph = fx.symbolic_trace(volumetric.DenseNet()).graph
    concats = [node for node in graph.nodes if node.target is torch.cat]
    assert [len(node.args[0]) for node in concats] == [2] * 12
    assert all(node.kwargs == {"dim": 1} for node in concats)


@pytest.mark.parametrize(("drop_rate", "modules"), [(0.0, 0), (0.2, 4)])
def test_dropout_modules(drop_rate: float, modules: int) -> None:
    model = volumetric.DenseNet(3, (2, 2), drop_rate=drop_rate)
    assert sum(isinstance(module, nn.Dropout) for module in model.modules()) == modules


def test_smallest_input_is_as_documented() -> None:
    model = volumetric.DenseNet(3, (2, 2, 2)).eval()
    assert model(torch.randn(1, 1, 13, 14, 15)).shape == (1, 2)
    with pytest.raises(RuntimeError, match="smaller than kernel size"):
        model(torch.randn(1, 1, 12, 14, 15))


def test_densenet121_as_documented() -> None:
    with torch.device("meta"):
        model = volumetric.DenseNet(32, (6, 12, 24, 16), num_init_features=64)
    # The 2-D network's count with 58 convolutions of 27 instead of 9 taps, a stem of 7³ taps on one
    # channel, and two classes.
    taps = 58 * 128 * 32 * (27 - 9) + 64 * (7**3 - 3 * 7**2)
    classifier = (1024 + 1) * (2 - 1000)
    assert sum(parameter.numel() for parameter in model.parameters()) == 7_978_856 + taps + classifier
