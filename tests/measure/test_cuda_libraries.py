"""What CUDA's kernels ask for beside results, as `ATen/native/cudnn/ConvShared.cpp` has it for convolutions."""

from collections.abc import Callable

import pytest
import torch

from memopt.measure.cuda_libraries import CudaLibraries
from memopt.measure.target import GPU
from memopt.measure.trace import SimulatedDevice

BACKWARD = torch.ops.aten.convolution_backward.default
X = torch.randn(2, 8, 6, 6)
GRAD_BYTES = 2 * 4 * 6 * 6 * 4


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _sliced(make: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    return make(torch.randn(2, 12, 6, 6))[:, 4:8]


@pytest.mark.parametrize(
    ("grad", "x", "at_once", "of_each_pass"),
    [
        (torch.randn(2, 4, 6, 6), X, 0, 0),
        (_channels_last(torch.randn(2, 4, 6, 6)), _channels_last(X), 0, 0),
        (torch.randn(2, 4, 6, 6), _channels_last(X), 1, 0),
        (_channels_last(torch.randn(2, 4, 6, 6)), X, 1, 0),
        (_sliced(torch.Tensor.contiguous), X, 0, 1),
        (_sliced(_channels_last), _channels_last(X), 0, 1),
        (_sliced(torch.Tensor.contiguous), _channels_last(X), 1, 0),
    ],
    ids=["alike", "channels-last", "rows for channels-last", "channels-last for rows", "slice", "its slice", "other"],
)
def test_copies_of_gradients(grad: torch.Tensor, x: torch.Tensor, at_once: int, of_each_pass: int) -> None:
    device = SimulatedDevice()
    libraries = CudaLibraries(device, GPU)
    none, one = (0, 0), (1, 1)
    args = (grad, x, torch.randn(4, 8, 1, 1), None, one, none, one, False, none, 1, (True, True, False))

    def copies() -> int:
        return sum(str(origin).startswith("gradient copied") for origin in device.trace.origins)

    held = libraries.before(BACKWARD, args)
    assert (len(held), copies()) == (at_once, at_once)
    for index in (0, 1):
        before = copies()
        libraries.result(BACKWARD, args, index)
        assert copies() - before == of_each_pass
    libraries.after(held)
    assert device.current_bytes == 0
    sizes = [e.size_bytes for e in device.trace.events if e.size_bytes and not e.is_bound]
    assert sizes.count(GRAD_BYTES) >= at_once + 2 * of_each_pass


@pytest.mark.parametrize("innermost", [False, True])
def test_one_dimensional_convolutions_copy_an_input_whose_channels_lie_innermost(innermost: bool) -> None:
    x, weight = torch.randn(2, 8, 30), torch.randn(4, 8, 3)
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if innermost else x
    device = SimulatedDevice()
    libraries = CudaLibraries(device, GPU)
    settings = (None, (1,), (1,), (1,), False, (0,), 1)
    forward = torch.ops.aten.convolution.default, (x, weight, *settings)
    backward = BACKWARD, (torch.randn(2, 4, 30), x, weight, *settings, (True, True, False))
    for number, (func, args) in enumerate((forward, backward), 1):
        held = libraries.before(func, args)
        copies = [origin for origin in device.trace.origins if str(origin).startswith("input copied")]
        assert (len(held), len(copies)) == ((1, number) if innermost else (0, 0))
        assert device.current_bytes == (x.numel() * 4 + 511) // 512 * 512 * innermost
        libraries.after(held)
