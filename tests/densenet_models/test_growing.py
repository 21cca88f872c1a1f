"""DenseNet with a growing tensor: structure, order of channels, errors."""

import pytest
import torch
from torch import fx, nn

from densenet_models import bc, growing


def tiny(**arguments: bool) -> growing.DenseNet:
    return growing.DenseNet(3, (2, 2), num_init_features=4, **arguments)


def test_default_is_depth_40() -> None:
    model = growing.DenseNet()
    weighted = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len(weighted) == 40
    assert sum(parameter.numel() for parameter in model.parameters()) == 176_122
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("prepend", [False, True])
def test_every_layer_concatenates_a_pair(prepend: bool) -> None:
    model = tiny(prepend=prepend)
    pairs = [node.args[0] for node in fx.symbolic_trace(model).graph.nodes if node.target is torch.cat]
    assert len(pairs) == 4
    new = [pair[0 if prepend else 1] for pair in pairs]
    assert all(len(pair) == 2 for pair in pairs)
    assert all(node.name.endswith("conv2") for node in new)


@pytest.mark.parametrize("prepend", [False, True])
def test_old_channels_pass_through(prepend: bool) -> None:
    layer = growing.Bottleneck(5, 3, bn_size=2, drop_rate=0.0, prepend=prepend)
    x = torch.randn(2, 5, 4, 4)
    grown = layer(x)
    old = grown[:, 3:] if prepend else grown[:, :5]
    assert grown.shape == (2, 8, 4, 4)
    assert torch.equal(old, x)


def test_is_the_same_network_as_bc() -> None:
    torch.manual_seed(0)
    ours, theirs = tiny(), bc.DenseNet(3, (2, 2), num_init_features=4)
    with torch.no_grad():
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            other.copy_(mine)
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(ours(x), theirs(x))


def test_depth() -> None:
    with torch.device("meta"):
        model = growing.DenseNet(depth=16)
    assert sum(isinstance(module, growing.Bottleneck) for module in model.modules()) == 6


@pytest.mark.parametrize("depth", [4, 39])
def test_refuses_depth(depth: int) -> None:
    with pytest.raises(ValueError, match=f"depth is {depth}, not 6n"):
        growing.DenseNet(depth=depth)
