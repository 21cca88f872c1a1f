"""1-D DenseNet: shapes, size, structure, errors."""

import pytest
import torch
from torch import fx, nn

from densenet_models import signal


def test_default_takes_twelve_leads() -> None:
    model = signal.DenseNet()
    assert sum(parameter.numel() for parameter in model.parameters()) == 160_429
    assert model(torch.randn(2, 12, 1000)).shape == (2, 5)


def test_is_one_dimensional() -> None:
    kinds = {type(module) for module in signal.DenseNet().modules()}
    assert {nn.Conv1d, nn.BatchNorm1d, nn.AvgPool1d, nn.MaxPool1d} <= kinds
    assert not {nn.Conv2d, nn.BatchNorm2d} & kinds


def test_every_layer_concatenates_all_earlier_features() -> None:
    graph = fx.symbolic_trace(signal.DenseNet()).graph
    lengths = [len(node.args[0]) for node in graph.nodes if node.target is torch.concat]
    # Four layers and the block's end, three times.
    assert lengths == [1, 2, 3, 4, 5] * 3


@pytest.mark.parametrize("samples", [64, 65, 71])
def test_any_length(samples: int) -> None:
    model = signal.DenseNet(3, (2, 2), num_init_features=4, kernel_size=5)
    assert model(torch.randn(2, 12, samples)).shape == (2, 5)


def test_block_keeps_the_length() -> None:
    block = signal.DenseBlock(2, 4, 3, bn_size=2, kernel_size=7, drop_rate=0.0)
    assert block(torch.randn(2, 4, 33)).shape == (2, 10, 33)


@pytest.mark.parametrize("kernel_size", [0, 4, -3])
def test_refuses_even_kernels(kernel_size: int) -> None:
    with pytest.raises(ValueError, match=f"kernel_size is {kernel_size}"):
        signal.DenseNet(kernel_size=kernel_size)
