"""Shape rules: the results of the commonest operators, beside those of torch's own fake operators."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from memopt.fake import make_fake, shape_rule, strides_of
from tests.fake.described import described

aten = torch.ops.aten
DEVICES = [torch.device("cpu"), torch.device("cuda:0")]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def _images(mode: FakeTensorMode, dtype: torch.dtype, device: torch.device) -> Iterator[FakeTensor]:
    """Also of extents of 1, where a layout can be read in two ways."""
    for size in product((1, 2), (1, 3), (1, 4), (1, 5)):
        for channels_last in (False, True):
            yield make_fake(mode, size, strides_of(size, channels_last), dtype, device)
    for other in ((2, 3), (2, 3, 4), (2, 3, 4, 2, 2)):
        yield make_fake(mode, other, strides_of(other), dtype, device)


def _assert_as_torch(mode: FakeTensorMode, func: Any, *args: Any) -> bool:
    """Whether there is a rule for such arguments; then it makes what torch makes."""
    rule = shape_rule(func)
    assert rule is not None
    made = rule(*args)
    if made is None:
        return False
    with mode:
        wanted = func(*args)
    made, wanted = (x if isinstance(x, tuple) else (x,) for x in (made, wanted))
    assert [*map(described, made)] == [*map(described, wanted)]
    return True


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_batch_norms_are_made_as_torch_makes_them(device: torch.device, dtype: torch.dtype) -> None:
    mode, ruled = FakeTensorMode(), 0
    for x in _images(mode, dtype, device):
        kind = dtype if device.type == "cpu" else torch.float32
        weight, bias, mean, var = (make_fake(mode, (x.shape[1],), (1,), kind, device) for _ in range(4))
        # A torch without CUDA writes to no running statistics that lie there.
        running = (mean, var) if device.type == "cpu" else (None, None)
        for func in (aten.native_batch_norm.default, aten.cudnn_batch_norm.default):
            ruled += _assert_as_torch(mode, func, x, weight, bias, *running, True, 0.1, 1e-5)
            ruled += _assert_as_torch(mode, func, x, weight, bias, None, None, True, 0.1, 1e-5)
        ruled += _assert_as_torch(mode, aten.native_batch_norm.default, x, weight, bias, mean, var, False, 0.1, 1e-5)
        ruled += _assert_as_torch(mode, aten.native_batch_norm.default, x, None, None, *running, True, 0.1, 1e-5)
        assert [t._version for t in (mean, var)] == [0, 0]

    assert ruled > 150


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_convolutions_are_made_as_torch_makes_them(device: torch.device, dtype: torch.dtype) -> None:
    mode, ruled = FakeTensorMode(), 0
    for x in _images(mode, dtype, device):
        rank = x.dim() - 2
        for made, kernel, stride, padding, dilation, groups in (
            (4, 1, 1, 0, 1, 1),
            (1, 1, 1, 0, 1, 1),
            (6, 3, 1, 1, 1, 1),
            (6, 3, 2, 1, 1, 3),
            (3, 3, 1, 1, 1, 3),
            (2, 2, 2, 0, 1, 1),
            (2, 3, 1, 2, 2, 1),
        ):
            size = (made, max(x.shape[1] // groups, 1), *[kernel] * rank)
            weight, bias = (
                make_fake(mode, size, strides_of(size), dtype, device),
                make_fake(mode, (made,), (1,), dtype, device),
            )
            settings = ([stride] * rank, [padding] * rank, [dilation] * rank, False, [0] * rank, groups)
            for given in (bias, None):
                ruled += _assert_as_torch(mode, aten.convolution.default, x, weight, given, *settings)
    assert ruled > 100


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_concats_and_activations_are_made_as_torch_makes_them(device: torch.device) -> None:
    mode, ruled = FakeTensorMode(), 0
    for x in _images(mode, torch.float32, device):
        for dim in range(-x.dim(), x.dim()):
            ruled += _assert_as_torch(mode, aten.cat.default, [x, x, x], dim)
        ruled += _assert_as_torch(mode, aten.relu.default, x)

    assert ruled > 250


def test_what_is_written_in_place_is_handed_back() -> None:
    mode = FakeTensorMode()
    x = make_fake(mode, (2, 3), (3, 1), torch.float32, DEVICES[0])
    for func, *rest in ((aten.relu_.default,), (aten.add_.Tensor, 1)):
        rule = shape_rule(func)
        assert rule is not None
        assert rule(x, *rest) is x


def test_torch_is_asked_about_whatever_is_unusual() -> None:
    mode, cpu = FakeTensorMode(), DEVICES[0]

    def fake(*size: int, dtype: torch.dtype = torch.float32, device: torch.device = cpu) -> FakeTensor:
        return make_fake(mode, size, strides_of(size), dtype, device)

    x, each = fake(2, 3, 4, 4), fake(3)
    with mode:
        turned = x.transpose(2, 3)
    concat, norm, convolution = (
        shape_rule(func) for func in (aten.cat.default, aten.native_batch_norm.default, aten.convolution.default)
    )
    assert concat is not None
    assert norm is not None
    assert convolution is not None

    for others in (
        [turned],
        [fake(2, 3, 5, 4)],
        [fake(2, 3, 4)],
        [fake(2, 3, 4, 4, dtype=torch.float64)],
        [fake(2, 3, 4, 4, device=DEVICES[1])],
        [torch.randn(2, 3, 4, 4)],
    ):
        assert concat([x, *others], 1) is None
    assert concat([x], 4) is None
    for image, weight, padding in (
        (turned, fake(2, 3, 1, 1), 0),
        (x, fake(2, 2, 1, 1), 0),
        (x, fake(2, 3, 5, 5), 0),
        (x, fake(2, 3, 1, 1), -1),
        (x, fake(2, 3, 1, 1, dtype=torch.float64), 0),
    ):
        assert convolution(image, weight, None, [1, 1], [padding] * 2, [1, 1], False, [0, 0], 1) is None
    for unusual in (turned, fake(2, dtype=torch.bool), fake(2, dtype=torch.complex64), fake(0)):
        for func, *rest in ((aten.relu.default,), (aten.relu_.default,), (aten.add_.Tensor, 1)):
            rule = shape_rule(func)
            assert rule is not None
            assert rule(unusual, *rest) is None
    assert norm(turned, each, each, each, each, True, 0.1, 1e-5) is None
    assert norm(x, fake(4), each, each, each, True, 0.1, 1e-5) is None
    assert norm(fake(1, 3, 1, 1), each, each, each, each, True, 0.1, 1e-5) is None
    assert norm(x, each, each, None, None, False, 0.1, 1e-5) is None
