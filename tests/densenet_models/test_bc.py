"""DenseNet-BC: published sizes, structure, errors."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from densenet_models import bc


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def concats(model: nn.Module) -> list[fx.Node]:
    return [node for node in fx.symbolic_trace(model).graph.nodes if node.target is torch.cat]


@pytest.mark.parametrize(
    ("build", "parameters"),
    [
        (bc.densenet121, 7_978_856),
        (bc.densenet169, 14_149_480),
        (bc.densenet201, 20_013_928),
        (bc.densenet161, 28_681_000),
        (bc.densenet264, 33_337_704),
        (bc.DenseNet, 769_162),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_parameter_count_is_the_published_one(build: Callable[[], bc.DenseNet], parameters: int) -> None:
    with torch.device("meta"):
        assert count_parameters(build()) == parameters


def test_default_is_bc_100() -> None:
    model = bc.DenseNet()
    layers = [module for module in model.modules() if isinstance(module, bc.DenseLayer)]
    transitions = [module for module in model.modules() if isinstance(module, bc.Transition)]
    weighted = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len(layers) == 48
    assert len(transitions) == 2
    assert len(weighted) == 100
    assert {layer.conv2.out_channels for layer in layers} == {12}
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 10)


def test_concats_of_the_default() -> None:
    # One in front of each of 48 layers, one at the end of each of 3 blocks, over lists that grow by one.
    lengths = [len(node.args[0]) for node in concats(bc.DenseNet())]
    assert lengths == [*range(1, 18)] * 3


def test_depth_overrides_block_config() -> None:
    with torch.device("meta"):
        model = bc.DenseNet(block_config=(1,), depth=22)
    blocks = [module for module in model.modules() if isinstance(module, bc.DenseBlock)]
    assert [len(list(block.children())) for block in blocks] == [3, 3, 3]


@pytest.mark.parametrize("depth", [4, 9, 41, -2])
def test_refuses_depth(depth: int) -> None:
    with pytest.raises(ValueError, match=f"depth is {depth}, not 6n"):
        bc.DenseNet(depth=depth)


def test_refuses_compression_to_nothing() -> None:
    with pytest.raises(ValueError, match="leaves none of a transition's 4 channels"):
        bc.DenseNet(2, (1, 1), num_init_features=2, compression=0.1)


@pytest.mark.parametrize(("small_inputs", "side"), [(True, 8), (False, 2)])
def test_stem(small_inputs: bool, side: int) -> None:
    # The second block sees half of the stem's sides: 16 → 8, or 16 → 4 → 2.
    model = bc.DenseNet(3, (2, 2), num_init_features=4, small_inputs=small_inputs)
    features: Tensor = model.features(torch.randn(2, 3, 16, 16))
    assert features.shape == (2, 5 + 6, side, side)


def test_one_block_has_no_transition() -> None:
    model = bc.DenseNet(3, [2], num_init_features=4, num_classes=7, in_channels=1)
    assert not [module for module in model.modules() if isinstance(module, bc.Transition)]
    assert model(torch.randn(2, 1, 9, 9)).shape == (2, 7)


def test_parameter_names_are_torchvisions() -> None:
    with torch.device("meta"):
        state = bc.densenet121().state_dict()
    assert len(state) == 727
    shapes = {
        "features.conv0.weight": (64, 3, 7, 7),
        "features.norm0.running_var": (64,),
        "features.denseblock1.denselayer1.norm1.weight": (64,),
        "features.denseblock4.denselayer16.conv1.weight": (128, 992, 1, 1),
        "features.denseblock4.denselayer16.conv2.weight": (32, 128, 3, 3),
        "features.transition3.conv.weight": (512, 1024, 1, 1),
        "features.norm5.bias": (1024,),
        "classifier.weight": (1000, 1024),
    }
    assert {key: tuple(state[key].shape) for key in shapes} == shapes


def test_variants_take_options() -> None:
    model = bc.densenet121(growth_rate=3, block_config=(1, 1), num_init_features=4, num_classes=2, in_channels=1)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 2)


def test_layer_adds_to_what_it_is_given() -> None:
    layer = bc.DenseLayer(7, 3, bn_size=2, drop_rate=0.0)
    features = [torch.randn(2, 4, 5, 5), torch.randn(2, 3, 5, 5)]
    kept = [feature.clone() for feature in features]
    assert layer(features).shape == (2, 3, 5, 5)
    # The in-place ReLU works on the norm's output, never on a feature.
    assert all(torch.equal(a, b) for a, b in zip(features, kept, strict=True))
