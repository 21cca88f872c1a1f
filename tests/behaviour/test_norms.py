"""Running statistics change exactly once a step, whatever the norm's settings."""

import copy
import inspect
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import memopt
from tests.helpers import (
    LEVELS,
    assert_exact,
    assert_rewritten,
    assert_same,
    assert_trains_alike,
    dense_net,
    images,
    plain,
    reasons,
    rewritten_copy,
    state_of,
    train_step,
)


def norms_of(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def replace_norms(model: nn.Module, make: Callable[[int], nn.Module]) -> nn.Module:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, make(child.num_features))
    return model


def test_running_statistics_change_once_a_step() -> None:
    assert_exact(dense_net(), images(), steps=3, at_least=7)


@pytest.mark.parametrize("level", LEVELS)
def test_the_batch_counter_counts_one_a_step(level: str) -> None:
    model = rewritten_copy(dense_net(), level)
    for expected in (1, 2, 3):
        train_step(model, (images(),))
        assert {norm.num_batches_tracked.item() for norm in norms_of(model)} == {expected}
    assert_rewritten(model)


@pytest.mark.parametrize(
    "settings",
    [
        {"momentum": None},
        {"track_running_stats": False},
        {"affine": False},
        {"affine": False, "track_running_stats": False},
        {"momentum": None, "affine": False},
        {"momentum": 1.0},
        {"momentum": 0.0},
        {"eps": 0.3},
        # New in torch 2.12.
        *([{"bias": False}] if "bias" in inspect.signature(nn.BatchNorm2d).parameters else []),
    ],
    ids=str,
)
def test_settings_of_batch_norm(settings: dict[str, object]) -> None:
    model = replace_norms(dense_net(), lambda channels: nn.BatchNorm2d(channels, **settings))
    assert_exact(model, images(), steps=3, at_least=7)


def test_running_statistics_switched_off_on_the_instance() -> None:
    model = dense_net()
    for norm in norms_of(model)[::2]:
        norm.track_running_stats = False
    assert_exact(model, images(), at_least=7)


def test_running_statistics_removed_from_the_instance() -> None:
    model = dense_net()
    for norm in norms_of(model)[::2]:
        norm.running_mean = norm.running_var = None
    assert_exact(model, images(), at_least=7)


def test_frozen_norms() -> None:
    model = dense_net()
    for norm in norms_of(model)[1::2]:
        norm.eval()
    assert_exact(model, images(), at_least=7, steps=3)


def test_model_in_eval_mode_with_gradients() -> None:
    assert_exact(dense_net().eval(), images(), at_least=7, input_gradients=True)


class FrozenNorms(nn.Module):
    """Fine-tuning: `train()` leaves the norms in eval mode, and returns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.net = dense_net()
        self.train()

    def train(self, mode: bool = True) -> None:  # as people write it
        super().train(mode)
        for norm in norms_of(self):
            norm.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def test_train_override_that_freezes_norms_and_returns_nothing() -> None:
    model = FrozenNorms()
    assert_exact(model, images(), at_least=7)
    rewritten = rewritten_copy(model)
    rewritten.train()
    before = state_of(rewritten)
    train_step(rewritten, (images(),))
    after = state_of(rewritten)
    assert_same(*({k: v for k, v in s.items() if k.startswith("buffer")} for s in (before, after)))


def test_statistics_of_a_frozen_norm_that_move_before_backward() -> None:
    """Backward uses the running statistics of its own forward, as if they had been kept."""
    model = dense_net().eval()
    rewritten = rewritten_copy(model)
    reference = train_step(model, (images(),))
    output = rewritten(images())
    for norm in norms_of(rewritten):
        norm.running_mean.add_(1.0)
        norm.running_var.mul_(2.0)
    (output * torch.linspace(0.5, 1.5, output.numel()).view(output.shape)).sum().double().backward()
    gradients = {k: v for k, v in state_of(rewritten).items() if k.startswith("gradient")}
    assert_same({k: reference[k] for k in gradients}, gradients)
    assert_rewritten(rewritten)


@pytest.mark.parametrize("frozen", ["weight", "bias", "both"])
def test_frozen_parameters_of_norms(frozen: str) -> None:
    model = dense_net()
    for norm in norms_of(model):
        norm.weight.requires_grad_(frozen == "bias")
        norm.bias.requires_grad_(frozen == "weight")
    assert_exact(model, images(), at_least=7)


def test_two_norms_on_one_concat() -> None:
    def body(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = torch.cat([x, self.second(x)], 1)
        one = self.conv1(F.relu(self.norm1(y)))
        two = self.conv2(F.relu(self.norm2(y)))
        return torch.cat([y, one, two], 1)

    model = plain(
        body,
        stem=lambda: nn.Conv2d(3, 4, 3, padding=1),
        second=lambda: nn.Conv2d(4, 4, 3, padding=1),
        norm1=lambda: nn.BatchNorm2d(8),
        norm2=lambda: nn.BatchNorm2d(8, momentum=0.3),
        conv1=lambda: nn.Conv2d(8, 4, 3, padding=1),
        conv2=lambda: nn.Conv2d(8, 4, 1),
    )
    assert_exact(model, images(), at_least=2, input_gradients=True)


def shared_in_one_block(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """One norm and one convolution at two (three) places that see eight channels each."""
    a = self.stem(x)
    b = self.other(x)
    c = self.conv(F.relu(self.norm(torch.cat([a, b], 1))))
    d = self.conv(F.relu(self.norm(torch.cat([b, c], 1))))
    e = self.conv(F.relu(self.norm(torch.cat([c, d], 1))))
    return torch.cat([a, b, c, d, e][: 3 + self.uses], 1)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("uses", [1, 2])
def test_one_norm_at_several_places_of_a_block(uses: int, momentum: float | None) -> None:
    model = plain(
        shared_in_one_block,
        stem=lambda: nn.Conv2d(3, 4, 3, padding=1),
        other=lambda: nn.Conv2d(3, 4, 1),
        norm=lambda: nn.BatchNorm2d(8, momentum=momentum),
        conv=lambda: nn.Conv2d(8, 4, 3, padding=1),
    )
    model.uses = uses
    assert_exact(model, images(), steps=3, at_least=2)


def block_of(prefix: nn.Module, x: torch.Tensor, norm: nn.Module, conv: nn.Module, uses: int) -> torch.Tensor:
    features = [x, prefix(x)]
    for _ in range(uses):
        features.append(conv(F.relu(norm(torch.cat(features[-2:], 1)))))
    return torch.cat(features, 1)


def test_one_norm_in_two_blocks() -> None:
    """Three uses, two of them in the second block: eager adds the gradients one by one."""

    def body(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = block_of(self.prefix, self.stem(x), self.norm, self.conv, 1)
        x = F.avg_pool2d(self.squeeze(F.relu(self.between(x))), 2)
        return block_of(self.prefix, x, self.norm, self.conv, 2)

    model = plain(
        body,
        stem=lambda: nn.Conv2d(3, 4, 3, padding=1),
        prefix=lambda: nn.Conv2d(4, 4, 1),
        norm=lambda: nn.BatchNorm2d(8),
        conv=lambda: nn.Conv2d(8, 4, 3, padding=1),
        between=lambda: nn.BatchNorm2d(12),
        squeeze=lambda: nn.Conv2d(12, 4, 1),
    )
    assert_exact(model, images(), steps=3, at_least=0)


def test_weights_tied_across_modules_of_two_blocks() -> None:
    model = dense_net()
    first, second = model.block1.layers, model.block2.layers
    for layer in (first[1], first[2], second[0]):
        layer.conv2.weight = first[0].conv2.weight
        layer.norm2.weight = first[0].norm2.weight
    assert_exact(model, images(), steps=3)


def test_a_weight_used_inside_a_block_and_in_the_loss() -> None:
    model = dense_net()
    layers = model.block1.layers
    layers[1].conv2.weight = layers[0].conv2.weight
    for level in LEVELS:
        naive, rewritten = copy.deepcopy(model), rewritten_copy(model, level)
        for each in (naive, rewritten):
            output = each(images())
            (output.square().sum() + each.block1.layers[0].conv2.weight.abs().sum() * 0.37).backward()
        assert_same(state_of(naive), state_of(rewritten))
        assert_rewritten(rewritten)


def test_functional_norm_with_own_buffers() -> None:
    def body(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = torch.cat([x, self.stem2(x)], 1)
        n = self.norm
        z = F.batch_norm(y, n.running_mean, n.running_var, n.weight, n.bias, self.training, 0.2, 1e-3)
        return torch.cat([y, self.conv(torch.relu(z))], 1)

    model = plain(
        body,
        stem=lambda: nn.Conv2d(3, 4, 3, padding=1),
        stem2=lambda: nn.Conv2d(4, 4, 3, padding=1),
        norm=lambda: nn.BatchNorm2d(8),
        conv=lambda: nn.Conv2d(8, 4, 3, padding=1),
    )
    assert_exact(model, images(), steps=3)
    assert_exact(model.eval(), images())


@pytest.mark.parametrize(
    "make",
    [
        lambda channels: nn.GroupNorm(2, channels),
        nn.InstanceNorm2d,
        lambda channels: nn.InstanceNorm2d(channels, affine=True),
        lambda channels: nn.GroupNorm(1, channels, affine=False),
    ],
)
def test_norms_without_running_statistics(make: Callable[[int], nn.Module]) -> None:
    # The final block is 3x3: instance norm needs more than one position.
    assert_exact(replace_norms(dense_net(), make), images(), at_least=6)


def test_instance_norm_with_running_statistics_is_refused_with_a_reason() -> None:
    model = replace_norms(dense_net(), lambda channels: nn.InstanceNorm2d(channels, track_running_stats=True))
    assert_exact(model, images(), at_least=0)
    rewritten = rewritten_copy(model)
    rewritten(images())
    assert "InstanceNorm" in reasons(rewritten)


class HalvingNorm(nn.BatchNorm2d):
    """A norm of the user's own: not what its base class computes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / 2


def test_a_norm_subclass_with_its_own_forward() -> None:
    assert_exact(replace_norms(dense_net(), HalvingNorm), images(), at_least=0)


def test_frozen_norms_unfreeze_after_apply() -> None:
    naive = dense_net()
    rewritten = rewritten_copy(naive)
    for toggle in (True, False, True):
        for model in (naive, rewritten):
            for norm in norms_of(model)[:4]:
                norm.train(toggle)
        assert_trains_alike(naive, rewritten, images(), at_least=7)


def test_no_gradient_forward_in_training_mode_updates_the_statistics() -> None:
    naive = dense_net()
    rewritten = rewritten_copy(naive)
    for model in (naive, rewritten):
        with torch.no_grad():
            model(images())
            model(images(seed=2))
    assert_same(state_of(naive), state_of(rewritten))
    assert not memopt.explain(rewritten).ran
