"""Tensors of a block that others read, keep, write to or observe."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import memopt
from memopt.measure.bits import same_bits
from tests.helpers import (
    LEVELS,
    DenseBlock,
    DenseLayer,
    assert_exact,
    assert_rewritten,
    assert_trains_alike,
    dense_net,
    images,
    plain,
    reasons,
    rewritten_copy,
    total,
)

PARTS: dict[str, Callable[[], nn.Module]] = {
    "stem": lambda: nn.Conv2d(3, 4, 3, padding=1),
    "layer1": lambda: DenseLayer(4, 4),
    "layer2": lambda: DenseLayer(8, 4),
    "layer3": lambda: DenseLayer(12, 4),
    "norm": lambda: nn.BatchNorm2d(8),
    "conv": lambda: nn.Conv2d(8, 4, 3, padding=1),
    "head": lambda: nn.Conv2d(12, 3, 1),
}


def model_of(body: Callable[..., Any]) -> nn.Module:
    return plain(body, **PARTS)


def start(self: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = self.stem(x)
    return [x, self.layer1([x])]


def finish(self: nn.Module, features: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([*features, self.layer3(features)], 1)


ACTIVATIONS = {
    "relu": F.relu,
    "relu_": F.relu_,
    "inplace=True": lambda x: F.relu(x, inplace=True),
    "method": lambda x: x.relu(),
    "method_": lambda x: x.relu_(),
    "leaky_relu_": lambda x: F.leaky_relu_(x, 0.2),
    "elu_": F.elu_,
    "hardtanh_": lambda x: F.hardtanh_(x),
    "silu in place": lambda x: F.silu(x, inplace=True),
    "gelu": F.gelu,
    "swish": lambda x: x * torch.sigmoid(1.3 * x),
    "sigmoid_": lambda x: x.sigmoid_(),
    "none": lambda x: x,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str) -> None:
    def body(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        features = start(self, x)
        features.append(self.conv(ACTIVATIONS[name](self.norm(torch.cat(features, 1)))))
        return finish(self, features)

    assert_exact(model_of(body), images(), input_gradients=True, at_least=2)


@pytest.mark.parametrize("name", ["relu", "relu_", "swish", "elu_"])
def test_activated_tensor_returned_as_a_skip(name: str) -> None:
    def body(self: nn.Module, x: torch.Tensor) -> Any:
        features = start(self, x)
        activated = ACTIVATIONS[name](self.norm(torch.cat(features, 1)))
        features.append(self.conv(activated))
        return finish(self, features), activated

    assert_exact(model_of(body), images(), at_least=2)


def test_activated_tensor_read_again() -> None:
    def body(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        features = start(self, x)
        activated = F.relu(self.norm(torch.cat(features, 1)))
        features.append(self.conv(activated) + activated[:, :4])
        return finish(self, features)

    assert_exact(model_of(body), images(), at_least=2)


def test_normalised_tensor_kept_beside_its_activation() -> None:
    def body(self: nn.Module, x: torch.Tensor) -> Any:
        features = start(self, x)
        normalised = self.norm(torch.cat(features, 1))
        features.append(self.conv(F.relu(normalised)))
        return finish(self, features), normalised

    assert_exact(model_of(body), images(), at_least=2)


def test_concat_with_other_readers() -> None:
    def body(self: nn.Module, x: torch.Tensor) -> Any:
        features = start(self, x)
        together = torch.cat(features, 1)
        features.append(self.conv(F.relu(self.norm(together))))
        return finish(self, features), together.mean((2, 3)), together[:, 2:5]

    assert_exact(model_of(body), images(), at_least=2)


def test_concat_returned() -> None:
    def body(self: nn.Module, x: torch.Tensor) -> Any:
        features = start(self, x)
        together = torch.cat(features, 1)
        features.append(self.conv(F.relu(self.norm(together))))
        return finish(self, features), together

    assert_exact(model_of(body), images(), at_least=2)


def test_features_returned() -> None:
    def body(self: nn.Module, x: torch.Tensor) -> Any:
        features = start(self, x)
        features.append(self.layer2(features))
        return {"features": list(features), "out": finish(self, features)}

    assert_exact(model_of(body), images(), at_least=2)


def pyramid(self: nn.Module, x: torch.Tensor) -> Any:
    features = start(self, x)
    features.append(self.layer2(features))
    together = torch.cat(features, 1)
    return features, together, self.head(F.relu(together))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("index", [0, 1, 2])
def test_gradient_of_a_returned_feature(index: int, level: str) -> None:
    """It counts every reader inside the block, too, as it does in eager."""
    observed = []
    naive = model_of(pyramid)
    for model in (naive, rewritten_copy(naive, level)):
        features, together, out = model(images())
        features[index].retain_grad()
        together.retain_grad()
        total([out, together]).backward()
        observed.append((features[index].grad, together.grad))
    assert same_bits(observed[0][0], observed[1][0])
    assert same_bits(observed[0][1], observed[1][1])
    assert_rewritten(model)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_autograd_grad_of_a_returned_feature(index: int) -> None:
    observed = []
    naive = model_of(pyramid)
    for model in (naive, rewritten_copy(naive)):
        features, _, out = model(images())
        observed.append(torch.autograd.grad(total(out), features[index])[0])
    assert same_bits(*observed)


def test_returned_features_can_be_changed_as_in_eager() -> None:
    """A feature that nothing in the block needs for its gradient may be overwritten by the caller."""

    def body(self: nn.Module, x: torch.Tensor) -> Any:
        features = start(self, x)
        return torch.cat([*features, self.layer2(features)], 1), features[0] * 2

    naive = model_of(body)
    rewritten = rewritten_copy(naive)

    def loss(outputs: Any) -> torch.Tensor:
        return total([outputs[0].mul_(2.0), outputs[1].add_(1.0)])

    assert_trains_alike(naive, rewritten, images(), loss=loss)


def test_block_input_read_again_after_the_block() -> None:
    def body(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        features = start(self, x)
        features.append(self.layer2(features))
        out = finish(self, features)
        return self.head(out[:, :12] * features[0].repeat(1, 3, 1, 1)) + features[0].mean()

    assert_exact(model_of(body), images(), at_least=3)


def test_block_input_returned() -> None:
    def body(self: nn.Module, x: torch.Tensor) -> Any:
        features = start(self, x)
        features.append(self.layer2(features))
        return features[0], finish(self, features)

    assert_exact(model_of(body), images(), at_least=3)


def test_model_input_is_the_block_input_and_returned() -> None:
    def body(self: nn.Module, x: torch.Tensor) -> Any:
        y = self.conv(F.relu(self.norm(torch.cat([x, self.stem(x)], 1))))
        return torch.cat([x, y], 1), x

    model = plain(
        body,
        stem=lambda: nn.Conv2d(3, 5, 3, padding=1),
        norm=lambda: nn.BatchNorm2d(8),
        conv=lambda: nn.Conv2d(8, 4, 1),
    )
    assert_exact(model, images(), input_gradients=True)
    rewritten = rewritten_copy(model)
    x = images()
    assert rewritten(x)[1] is x


@pytest.mark.parametrize("times", [2, 3])
def test_one_tensor_several_times_in_a_concat(times: int) -> None:
    def body(self: nn.Module, x: torch.Tensor) -> Any:
        x = self.stem(x)
        y = self.conv(F.relu(self.norm(torch.cat([*[x] * times, self.layer1([x])], 1))))
        return torch.cat([y, x, y], 1), x.mean()

    parts = PARTS | {
        "norm": lambda: nn.BatchNorm2d(4 * times + 4),
        "conv": lambda: nn.Conv2d(4 * times + 4, 4, 3, padding=1),
    }
    assert_exact(plain(body, **parts), images(), at_least=2)


def test_in_place_operation_on_a_feature_that_was_concatenated() -> None:
    """Eager keeps the concat, so the feature may change; recomputing would read the new values."""

    def body(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        features = start(self, x)
        features.append(self.conv(F.relu(self.norm(torch.cat(features, 1)))))
        F.relu_(features[1])
        return finish(self, features)

    model = model_of(body)
    assert_exact(model, images(), at_least=0)
    rewritten = rewritten_copy(model)
    total(rewritten(images())).backward()
    assert "overwrites" in reasons(rewritten)


def test_in_place_operation_on_a_view_of_a_feature() -> None:
    def body(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        features = start(self, x)
        features.append(self.conv(F.relu(self.norm(torch.cat(features, 1)))))
        features[0][:, 1:2].mul_(0.5)
        return finish(self, features)

    assert_exact(model_of(body), images(), at_least=0)


def test_in_place_operation_on_a_feature_before_it_is_concatenated() -> None:
    def body(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        features = start(self, x)
        F.relu_(features[1])
        features.append(self.conv(F.relu(self.norm(torch.cat(features, 1)))))
        return finish(self, features)

    assert_exact(model_of(body), images(), at_least=2)


def test_in_place_activation_of_a_concat() -> None:
    def body(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        features = start(self, x)
        together = torch.cat(features, 1)
        features.append(self.conv(self.norm(F.relu_(together))))
        return finish(self, features)

    assert_exact(model_of(body), images())


def test_buffers_written_in_place_by_forward() -> None:
    def body(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        features = start(self, x)
        self.seen.add_(1)
        features.append(self.layer2(features) * self.seen)
        return finish(self, features)

    model = model_of(body)
    model.register_buffer("seen", torch.zeros(()))
    assert_exact(model, images(), steps=3)


@pytest.mark.parametrize("index", [0, 1])
def test_gradient_hooks_on_tensors_inside_forward(index: int) -> None:
    def body(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        features = start(self, x)
        features[index].register_hook(lambda grad: grad * 1.5)
        features.append(self.layer2(features))
        return finish(self, features)

    assert_exact(model_of(body), images(), at_least=0)


def test_hook_that_clips_the_gradient_of_a_concat() -> None:
    def body(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        features = start(self, x)
        together = torch.cat(features, 1)
        together.register_hook(lambda grad: grad.clamp(-0.1, 0.1))
        features.append(self.conv(F.relu(self.norm(together))))
        return finish(self, features)

    assert_exact(model_of(body), images(), at_least=0)


def test_detached_features() -> None:
    def body(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        features = start(self, x)
        features.append(self.layer2([feature.detach() for feature in features]))
        return finish(self, features)

    assert_exact(model_of(body), images())


def test_growing_and_prepending() -> None:
    def body(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.layer1([x])], 1)
        x = torch.cat([self.layer2([x]), x], 1)
        x = torch.cat([x, self.layer3([x])], 1)
        return x * torch.sigmoid(x)

    assert_exact(model_of(body), images(), input_gradients=True, at_least=2)


def test_growing_with_every_stage_returned() -> None:
    def body(self: nn.Module, x: torch.Tensor) -> Any:
        stages = [self.stem(x)]
        for layer in (self.layer1, self.layer2, self.layer3):
            stages.append(torch.cat([stages[-1], layer([stages[-1]])], 1))
        return stages

    assert_exact(model_of(body), images(), at_least=2)


@pytest.mark.parametrize("level", LEVELS)
def test_gradients_of_every_returned_stage(level: str) -> None:
    def body(self: nn.Module, x: torch.Tensor) -> Any:
        stages = [self.stem(x)]
        for layer in (self.layer1, self.layer2, self.layer3):
            stages.append(torch.cat([stages[-1], layer([stages[-1]])], 1))
        return stages

    observed = []
    naive = model_of(body)
    for model in (naive, rewritten_copy(naive, level)):
        stages = model(images())
        for stage in stages:
            stage.retain_grad()
        total(stages).backward()
        observed.append([stage.grad for stage in stages])
    for expected, actual in zip(*observed, strict=True):
        assert same_bits(expected, actual)


def test_two_blocks_reading_one_input() -> None:
    def body(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return torch.cat([self.one(x), self.two(x), x], 1)

    model = plain(body, stem=PARTS["stem"], one=lambda: DenseBlock(4, 4, 3), two=lambda: DenseBlock(4, 4, 2))
    assert_exact(model, images(), at_least=5, input_gradients=True)


def test_hidden_state_of_tensors_is_not_shared_between_models() -> None:
    first, second = rewritten_copy(dense_net(0)), rewritten_copy(dense_net(1))
    alone = total(rewritten_copy(dense_net(0))(images()))
    out = first(images())
    second(images()).sum().backward()
    assert same_bits(total(out), alone)


def test_the_same_tensor_given_twice_then_two_tensors() -> None:
    def body(self: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        features = [self.stem(x), self.layer1([self.stem(y)])]
        return finish(self, [*features, self.layer2(features)])

    naive = model_of(body)
    rewritten = rewritten_copy(naive)
    for x, y in ((images(), None), (images(), images(seed=2))):
        assert_trains_alike(naive, rewritten, x, x if y is None else y)


def test_explain_names_the_reason_for_every_chain_left_alone() -> None:
    model = dense_net()
    model.block1.layers[1].norm1.register_forward_hook(lambda *_: None)
    rewritten = rewritten_copy(model)
    rewritten(images())
    (rejected,) = memopt.explain(rewritten).rejected
    assert rejected.module == "block1.layers.1.norm1"
    assert "hooks" in (rejected.reason or "")


def test_hook_that_reads_a_tensor_of_forward_is_not_recorded() -> None:
    def body(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        features = start(self, x)
        scale = features[0].detach().mean()
        features[1].register_hook(lambda grad: grad * scale)
        features.append(self.layer2(features))
        return finish(self, features)

    naive = model_of(body)
    rewritten = rewritten_copy(naive)
    with pytest.warns(UserWarning, match="tensor inside a function"):
        assert_trains_alike(naive, rewritten, images(), at_least=0)


def test_objects_among_the_arguments_of_a_call() -> None:
    def body(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        features = start(self, x)
        features.append(self.layer2(features) * torch.rand(4, 1, 1, generator=self.generator))
        features[2] = features[2].mul(self.scale)
        return finish(self, features)

    model = model_of(body)
    model.generator = torch.Generator()
    model.scale = np.float64(0.5)
    assert_exact(model, images(), at_least=3)


def test_hook_of_the_models_own_sees_each_step() -> None:
    def body(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        features = start(self, x)
        features[1].register_hook(self.seen.append)
        features.append(self.layer2(features))
        return finish(self, features)

    seen = []
    naive = model_of(body)
    for model in (naive, rewritten_copy(naive)):
        model.seen = []
        for step in range(2):
            total(model(images(seed=step))).backward()
        seen.append(model.seen)
        assert len(model.seen) == 2
    assert all(same_bits(*pair) for pair in zip(*seen, strict=True))
    assert_rewritten(model, 3)
