"""Casts, mixed dtypes, memory formats, and numbers that are not finite."""

import copy
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from memopt.measure.bits import same_bits
from tests.helpers import (
    LEVELS,
    DenseLayer,
    DenseNet,
    assert_exact,
    assert_rewritten,
    assert_same,
    assert_trains_alike,
    dense_net,
    images,
    plain,
    rewritten_copy,
    state_of,
    total,
)


def autocast(dtype: torch.dtype = torch.bfloat16, cache: bool = True) -> torch.autocast:
    return torch.autocast("cpu", dtype=dtype, cache_enabled=cache)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cache", [True, False])
def test_autocast(dtype: torch.dtype, cache: bool) -> None:
    assert_exact(dense_net(), images(), context=lambda: autocast(dtype, cache), input_gradients=True, at_least=7)


def test_autocast_in_eval_mode() -> None:
    assert_exact(dense_net().eval(), images(), context=autocast, at_least=7)


def test_autocast_switched_on_and_off_after_apply() -> None:
    naive = dense_net()
    rewritten = rewritten_copy(naive)
    for context in (autocast, nullcontext, lambda: autocast(torch.float16), autocast):
        assert_trains_alike(naive, rewritten, images(), context=context, steps=1)


def test_backward_inside_autocast() -> None:
    naive = dense_net()
    rewritten = rewritten_copy(naive)
    for model in (naive, rewritten):
        with autocast():
            total(model(images())).backward()
    assert_same(state_of(naive), state_of(rewritten))
    assert_rewritten(rewritten)


@pytest.mark.parametrize("level", LEVELS)
def test_two_forwards_in_one_autocast_context(level: str) -> None:
    """Autocast casts a weight once for both: their gradients are added before the cast, as in eager."""
    naive = dense_net()
    rewritten = rewritten_copy(naive, level)
    for model in (naive, rewritten):
        with autocast():
            loss = total(model(images())) + total(model(images(seed=2)))
        loss.backward()
    assert_same(state_of(naive), state_of(rewritten))
    assert_rewritten(rewritten)


CONVOLUTIONS: dict[str, Callable[[nn.Module, torch.Tensor], torch.Tensor]] = {
    "grouped": lambda self, x: self.grouped(x),
    "circular": lambda self, x: self.circular(x),
    "functional": lambda self, x: F.conv2d(x, self.grouped.weight, self.grouped.bias, padding=1, groups=2),
    "padding by name": lambda self, x: F.conv2d(x, self.grouped.weight, self.grouped.bias, 1, "same", 1, 2),
    "masked": lambda self, x: F.conv2d(x, self.grouped.weight * self.mask, padding=1, groups=2),
    "frozen": lambda self, x: F.conv2d(x, self.grouped.weight.detach(), self.grouped.bias, padding=1, groups=2),
}


@pytest.mark.parametrize("form", CONVOLUTIONS)
def test_forms_of_convolution_that_share_autocasts_casts(form: str) -> None:
    def body(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        a, b = self.stem(x), self.stem(x)
        for _ in range(2):
            a, b = b, CONVOLUTIONS[form](self, F.relu(self.norm(torch.cat([a, b], 1))))
        return torch.cat([a, b], 1)

    model = plain(
        body,
        stem=lambda: nn.Conv2d(3, 4, 3, padding=1),
        norm=lambda: nn.BatchNorm2d(8),
        grouped=lambda: nn.Conv2d(8, 4, 3, padding=1, groups=2),
        circular=lambda: nn.Conv2d(8, 4, 3, padding=1, padding_mode="circular"),
    )
    model.register_buffer("mask", torch.ones(4, 4, 3, 3).triu())
    assert_exact(model, images(), context=autocast)
    assert_exact(model, images())


def shared_weight(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """One convolution inside a chain and in ordinary code, before and after it."""
    x = self.conv(self.stem(x))
    y = self.conv(F.relu(self.norm(torch.cat([x, self.other(x)], 1))[:, :4])) if self.sliced else None
    z = torch.cat([x, self.other(x)], 1)
    z = self.squeeze(F.relu(self.norm(z)))
    w = self.conv(F.relu(self.norm4(torch.cat([z[:, :2], x[:, :2]], 1))))
    w = self.conv(torch.tanh(w))
    return torch.cat([w, z] if y is None else [w, y, z], 1)


def weight_sharer() -> nn.Module:
    return plain(
        shared_weight,
        stem=lambda: nn.Conv2d(3, 4, 3, padding=1),
        conv=lambda: nn.Conv2d(4, 4, 3, padding=1, bias=False),
        other=lambda: nn.Conv2d(4, 4, 1),
        norm=lambda: nn.BatchNorm2d(8),
        norm4=lambda: nn.BatchNorm2d(4),
        squeeze=lambda: nn.Conv2d(8, 4, 1),
    )


@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize("cache", [True, False])
def test_weight_shared_with_ordinary_code_under_autocast(cache: bool, sliced: bool) -> None:
    model = weight_sharer()
    model.sliced = sliced
    assert_exact(model, images(), context=lambda: autocast(cache=cache), at_least=0)


def test_autocast_cache_keeps_gradients_of_code_that_runs_later() -> None:
    """Casts made inside a region must not be found by others in the cache: they have no history."""
    naive = dense_net()
    rewritten = rewritten_copy(naive)
    observed = []
    for model in (naive, rewritten):
        conv = model.block1.layers[0].conv2
        with autocast():
            model(images())
            conv(torch.ones(1, 8, 4, 4)).sum().backward()
        observed.append(conv.weight.grad)
    assert same_bits(*observed)


def mixed(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    a = self.stem(x)
    b = self.layer1([a]).to(self.other_dtype)
    c = self.layer2([a, b])
    d = self.conv(F.relu(self.norm(torch.cat([b, c, a], 1))))
    return torch.cat([a, b, c, d], 1)


@pytest.mark.parametrize("context", [nullcontext, autocast])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_mixed_dtypes_in_one_concat(dtype: torch.dtype, context: Callable[[], nullcontext[None]]) -> None:
    """A concat promotes; what follows is cast back to what the parameters have."""

    class Cast(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x.float())

    model = plain(
        mixed,
        stem=lambda: nn.Conv2d(3, 4, 3, padding=1),
        layer1=lambda: DenseLayer(4, 4),
        layer2=lambda: DenseLayer(8, 4),
        norm=lambda: Cast(nn.BatchNorm2d(12)),
        conv=lambda: nn.Conv2d(12, 4, 3, padding=1),
    )
    model.layer2.norm1 = Cast(model.layer2.norm1)
    model.other_dtype = dtype
    if context is autocast and dtype is torch.float16:
        pytest.skip("autocast itself refuses float16 beside bfloat16")
    assert_exact(model, images(), context=context)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_features_and_float_parameters_of_norms(dtype: torch.dtype) -> None:
    """As `model.half()` with norms kept in float32: batch norm takes inputs of a narrower dtype."""

    def body(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        a = self.stem(x)
        b = self.conv1(F.relu(self.norm1(a)))
        c = self.conv2(F.relu(self.norm2(torch.cat([a, b], 1))))
        return torch.cat([a, b, c], 1)

    model = plain(
        body,
        stem=lambda: nn.Conv2d(3, 4, 3, padding=1),
        norm1=lambda: nn.BatchNorm2d(4),
        conv1=lambda: nn.Conv2d(4, 4, 3, padding=1),
        norm2=lambda: nn.BatchNorm2d(8),
        conv2=lambda: nn.Conv2d(8, 4, 3, padding=1),
    ).to(dtype)
    model.norm1.float()
    model.norm2.float()
    assert_exact(model, images(dtype=dtype), at_least=2, input_gradients=True)
    model.norm1.affine = model.norm2.affine = False
    model.norm1.weight = model.norm1.bias = model.norm2.weight = model.norm2.bias = None
    assert_exact(model, images(dtype=dtype), at_least=2, input_gradients=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_of_the_whole_model(dtype: torch.dtype) -> None:
    assert_exact(dense_net().to(dtype), images(dtype=dtype), at_least=7, input_gradients=True)


def test_float64_under_autocast() -> None:
    assert_exact(dense_net().double(), images(dtype=torch.float64), context=autocast, at_least=7)


@pytest.mark.parametrize("context", [nullcontext, autocast])
@pytest.mark.parametrize("training", [True, False])
def test_channels_last(training: bool, context: Callable[[], nullcontext[None]]) -> None:
    model = dense_net().to(memory_format=torch.channels_last).train(training)
    x = images().to(memory_format=torch.channels_last)
    assert_exact(model, x, context=context, at_least=7, input_gradients=True)


@pytest.mark.parametrize("last", ["model", "input"])
def test_channels_last_of_one_only(last: str) -> None:
    model, x = dense_net(), images()
    if last == "model":
        model = model.to(memory_format=torch.channels_last)
    else:
        x = x.to(memory_format=torch.channels_last)
    assert_exact(model, x, at_least=7)


def test_one_part_of_a_concat_in_another_format() -> None:
    def body(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        a = self.stem(x)
        b = self.layer1([a]).contiguous(memory_format=torch.channels_last)
        c = self.layer2([a, b])
        return torch.cat([c, self.layer3([b, c])], 1)

    model = plain(
        body,
        stem=lambda: nn.Conv2d(3, 4, 3, padding=1),
        layer1=lambda: DenseLayer(4, 4),
        layer2=lambda: DenseLayer(8, 4),
        layer3=lambda: DenseLayer(8, 4),
    )
    assert_exact(model, images(), at_least=2)


def test_format_changed_after_apply() -> None:
    naive = dense_net()
    rewritten = rewritten_copy(naive)
    for memory_format in (torch.contiguous_format, torch.channels_last, torch.contiguous_format):
        naive.to(memory_format=memory_format)
        rewritten.to(memory_format=memory_format)
        assert_trains_alike(naive, rewritten, images().to(memory_format=memory_format), steps=1)


@pytest.mark.parametrize("size", [(1, 6), (2, 2), (1, 2), (3, 7)], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_awkward_sizes(size: tuple[int, int], memory_format: torch.memory_format) -> None:
    batch, extent = size
    model = dense_net()
    model.transition[3] = nn.AvgPool2d(2, ceil_mode=True)
    model.final[0].track_running_stats = True
    if batch == 1 and extent == 2:  # one value per channel behind the pool
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.eval()
    assert_exact(model, images(batch, extent).to(memory_format=memory_format), input_gradients=True)


def test_input_that_is_a_view_with_gaps() -> None:
    assert_exact(dense_net(), images(4, 12)[::2, :, ::2, ::2])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["image", "weight", "gradient"])
def test_numbers_that_are_not_finite(where: str, value: float) -> None:
    model, x = dense_net(), images()

    def loss(outputs: torch.Tensor) -> torch.Tensor:
        return total(outputs * value) if where == "gradient" else total(outputs)

    if where == "image":
        x[0, 1, 2, 3] = value
    if where == "weight":
        with torch.no_grad():
            model.block1.layers[1].conv2.weight[1, 2, 0, 0] = value
    assert_exact(model, x, loss=loss, input_gradients=True, at_least=7)


def test_average_pooling_in_three_dimensions_under_autocast() -> None:
    """Autocast runs this pooling in float32 on the CPU, in the recomputation too."""

    def body(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        a = self.stem(x)
        b = self.conv(F.relu(self.norm(torch.cat([a, self.stem(x)], 1))))
        c = torch.cat([a, b], 1)
        return self.down(c)

    model = plain(
        body,
        stem=lambda: nn.Conv3d(3, 4, 3, padding=1),
        norm=lambda: nn.BatchNorm3d(8),
        conv=lambda: nn.Conv3d(8, 4, 3, padding=1),
        down=lambda: nn.Sequential(nn.BatchNorm3d(8), nn.ReLU(), nn.Conv3d(8, 4, 1), nn.AvgPool3d(2), nn.ReLU()),
    )
    x = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    assert_exact(model, x, at_least=2)
    assert_exact(model, x, at_least=2, context=autocast)


def test_one_dimension_under_autocast() -> None:
    def body(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        a = self.stem(x)
        b = self.conv(F.relu(self.norm(torch.cat([a, self.stem(x)], 1))))
        return self.down(torch.cat([a, b], 1))

    model = plain(
        body,
        stem=lambda: nn.Conv1d(3, 4, 3, padding=1),
        norm=lambda: nn.BatchNorm1d(8),
        conv=lambda: nn.Conv1d(8, 4, 3, padding=1),
        down=lambda: nn.Sequential(nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 4, 1), nn.AvgPool1d(2)),
    )
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    assert_exact(model, x, at_least=2)
    assert_exact(model, x, at_least=2, context=autocast)


@pytest.mark.parametrize("make", [lambda c: nn.GroupNorm(2, c), lambda c: nn.InstanceNorm2d(c, affine=True)])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.PReLU, nn.GELU, nn.Softplus])
def test_other_norms_and_activations_under_autocast(
    make: Callable[[int], nn.Module], activation: Callable[[], nn.Module]
) -> None:
    model: DenseNet = copy.deepcopy(dense_net())
    for block in (model.block1, model.block2):
        for layer in block.layers:
            layer.norm1, layer.relu1 = make(layer.norm1.num_features), activation()
            layer.norm2, layer.relu2 = make(layer.norm2.num_features), activation()
    assert_exact(model, images(), context=autocast, at_least=5)
