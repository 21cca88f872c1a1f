"""DenseNet without bottlenecks: published size, structure, dropout, errors."""

import math

import pytest
import torch
from torch import fx, nn

from densenet_models import plain


def test_default_is_depth_40() -> None:
    model = plain.DenseNet()
    weighted = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len(weighted) == 40
    # "1.0M" in table 2 of the paper.
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_019_722
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_every_layer_concatenates_a_pair() -> None:
    graph = fx.symbolic_trace(plain.DenseNet(3, (2, 2))).graph
    pairs = [node.args[0] for node in graph.nodes if node.target is torch.cat]
    assert [len(pair) for pair in pairs] == [2] * 4


def test_transitions_keep_all_channels() -> None:
    model = plain.DenseNet(3, (2, 2), num_init_features=4)
    assert model.get_submodule("transition1")(torch.randn(2, 10, 8, 8)).shape == (2, 10, 4, 4)
    assert model.get_submodule("classifier").in_features == 16


@pytest.mark.parametrize(("drop_rate", "modules"), [(0.0, 0), (0.2, 4 + 1)])
def test_dropout_modules(drop_rate: float, modules: int) -> None:
    model = plain.DenseNet(3, (2, 2), drop_rate=drop_rate)
    assert sum(isinstance(module, nn.Dropout) for module in model.modules()) == modules


def test_depth() -> None:
    with torch.device("meta"):
        model = plain.DenseNet(depth=10)
    assert sum(isinstance(module, plain.DenseLayer) for module in model.modules()) == 6


@pytest.mark.parametrize("depth", [4, 8, 41])
def test_refuses_depth(depth: int) -> None:
    with pytest.raises(ValueError, match=f"depth is {depth}, not 3n"):
        plain.DenseNet(depth=depth)


def test_convolutions_start_with_the_lua_deviation() -> None:
    torch.manual_seed(0)
    weight = plain.DenseNet(48, (1,), num_init_features=64).get_submodule("block1.0.2").weight
    assert isinstance(weight, torch.Tensor)
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 48)), rel=0.02)
