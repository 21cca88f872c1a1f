"""What CUDA's kernels ask the caching allocator for beside an operator's results: nothing on a CPU shows it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch._prims_common import suggest_memory_format

from memopt.measure.target import Target
from memopt.measure.trace import Origin, SimulatedDevice
from memopt.measure.workspaces import ConvolutionCall, convolution_calls, estimated, lies_channels_last, measured

_aten = torch.ops.aten

_MATMULS = frozenset({_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default})

# Backward operators whose CUDA kernels read the gradient (argument 0) from a copy that lies as the input (argument 1)
# does, where it lies otherwise: `gradOutput.contiguous(…)` in ATen/native/cudnn/BatchNorm.cpp and ATen/native/cuda.
_READ_ALIKE = frozenset(
    {
        _aten.native_batch_norm_backward.default,
        _aten.cudnn_batch_norm_backward.default,
        _aten.avg_pool2d_backward.default,
        _aten.avg_pool3d_backward.default,
        _aten.max_pool2d_with_indices_backward.default,
    }
)

# Place of the tensor that one-dimensional convolutions copy where its channels lie innermost: `input =
# input.contiguous()` in ATen/native/Convolution.cpp, before it becomes an image of one row.
_CONVOLVED = {_aten.convolution.default: 0, _aten.convolution_backward.default: 1}


class CudaLibraries:
    """Adds to a simulated device what cuBLAS keeps and what kernels take for the time of an operator.

    Args:
        device: that the requests go to.
        target: says how large they are.

    Attributes:
        unmeasured: convolutions whose workspace was not measured.
    """

    def __init__(self, device: SimulatedDevice, target: Target) -> None:
        self._device = device
        self._target = target
        self._has_workspace: set[tuple[bool, str]] = set()
        self.unmeasured: set[ConvolutionCall] = set()

    def before(self, func: Any, args: Sequence[Any]) -> list[int]:
        """Ask for what an operator holds from its beginning to its end; returns the requests."""
        if func in _MATMULS:
            self._keep_workspace("cuBLAS", self._target.blas_workspace_bytes)
        if func is _aten.addmm.default and args[0].dim() == 1:  # a bias, which cuBLASLt adds as it stores
            self._keep_workspace("cuBLASLt", self._target.blas_lt_workspace_bytes)
        if func is _aten.convolution_backward.default:
            copies = _suggested(args[0]) != _suggested(args[1])  # `grad_output.to(input.suggest_memory_format())`
        else:
            copies = func in _READ_ALIKE and not _lie_alike(args[0], args[1])
        held = [self._copy(func, args[0], "gradient")] if copies else []
        place = _CONVOLVED.get(func)
        if place is not None and args[place].dim() == 3 and not args[place].is_contiguous():
            held.append(self._copy(func, args[place], "input"))
        return held

    def result(self, func: Any, args: Sequence[Any], index: int) -> None:
        """Ask for, and give back, what an operator takes once its result with this index has been allocated."""
        for place, call in enumerate(convolution_calls(func, args)):
            if place != index:
                continue
            held = [self._copy(func, args[0], "gradient")] if _is_read_in_pieces(func, args) else []
            size_bytes, origin = measured(self._target.gpu).get(call), Origin(f"workspace of {call.operation}")
            if size_bytes is None:
                size_bytes = estimated(call, self._target.gpu)
                self.unmeasured.add(call)
                self._device.might_allocate(call.bound_bytes, origin)
            if size_bytes:
                held.append(self._device.allocate(size_bytes, origin))
            self.after(held[::-1])

    def _copy(self, func: Any, tensor: torch.Tensor, what: str) -> int:
        return self._device.allocate(tensor.numel() * tensor.element_size(), Origin(f"{what} copied by {func}"))

    def after(self, held: list[int]) -> None:
        """Give back what `before` asked for."""
        for number in held:
            self._device.free(number)

    def _keep_workspace(self, library: str, size_bytes: int) -> None:
        """One for the thread that runs forward and one for the thread that runs backward, kept from then on."""
        in_backward = torch._C._current_graph_task_id() != -1
        if (in_backward, library) not in self._has_workspace and size_bytes:
            self._has_workspace.add((in_backward, library))
            self._device.allocate(size_bytes, Origin(f"workspace of {library}"))


def _lie_alike(grad: torch.Tensor, x: torch.Tensor) -> bool:
    if lies_channels_last(x):
        return grad.is_contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    return grad.is_contiguous()


def _is_read_in_pieces(func: Any, args: Sequence[Any]) -> bool:
    """Whether each pass of a convolution's backward copies the gradient for itself: a slice that lies as the input does
    (`contiguous` in ATen/native/cudnn/ConvShared.cpp)."""
    if func is not _aten.convolution_backward.default or _suggested(args[0]) != _suggested(args[1]):
        return False
    return not args[0].is_contiguous(memory_format=_suggested(args[0]))


def _suggested(x: torch.Tensor) -> torch.memory_format:
    chosen: torch.memory_format = suggest_memory_format(x) if x.dim() > 3 else torch.contiguous_format
    return chosen
