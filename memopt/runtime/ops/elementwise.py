"""ReLU, dropout and average pooling: operations whose gradients need less than autograd saves for them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from memopt.runtime.memory_format import has_odd_strides
from memopt.runtime.ops.base import Bound, Params, Stash

_aten = torch.ops.aten


class Relu:
    """max(x, 0). `out` is x itself where x may be overwritten; `in_place`: eager overwrites it."""

    def __init__(self, in_place: bool) -> None:
        self.in_place = in_place

    def forward(self, x: torch.Tensor, params: Params, out: torch.Tensor | None) -> tuple[torch.Tensor, Stash]:
        return self.recompute(x, params, (), out), ()

    def recompute(self, x: torch.Tensor, params: Params, stash: Stash, out: torch.Tensor | None) -> torch.Tensor:
        if has_odd_strides(x):
            return torch.relu_(x.clone()) if self.in_place else torch.relu(x)
        return torch.relu(x) if out is None else torch.relu_(out)

    def backward(
        self,
        grad: torch.Tensor,
        x: torch.Tensor | None,
        y: torch.Tensor | None,
        params: Params,
        stash: Stash,
        needs: tuple[bool, ...],
        grad_owned: bool,
    ) -> tuple[torch.Tensor | None, ...]:
        assert y is not None
        # Elementwise, so safe in place, which saves a tensor of the concat's size. Eager's result has the layout of
        # y: where grad has another, the next reduction would run in another order.
        if grad_owned and grad.stride() == y.stride() and not has_odd_strides(y):
            return (_aten.threshold_backward.grad_input(grad, y, 0, grad_input=grad),)
        return (_aten.threshold_backward(grad, y, 0),)


class Dropout:
    """Dropout that keeps its mask: rewinding the generator would not survive CUDA graphs.

    Draws exactly what eager draws: `native_dropout` on CUDA, `bernoulli_` noise elsewhere, in place and for whole
    channels.
    """

    def __init__(self, p: float, training: bool, channels: bool, in_place: bool) -> None:
        self.p = p
        self.training = training
        self.channels = channels
        self.in_place = in_place
        self._fused = False

    def forward(self, x: torch.Tensor, params: Params, out: torch.Tensor | None) -> tuple[torch.Tensor, Stash]:
        if not self.training or self.p == 0.0:
            return x, ()
        self._fused = x.is_cuda and not self.channels and not self.in_place and self.p < 1.0
        if self._fused:
            y, mask = torch.native_dropout(x, self.p, True)
            return y, (mask,)
        noise = x.new_empty(*x.shape[:2], *[1] * (x.dim() - 2)) if self.channels else torch.empty_like(x)
        if self.p == 1.0:
            noise = torch.zeros_like(noise)
        else:
            noise.bernoulli_(1 - self.p)
            noise.div_(1 - self.p)
        return self.recompute(x, params, (noise,), None), (noise,)

    def recompute(self, x: torch.Tensor, params: Params, stash: Stash, out: torch.Tensor | None) -> torch.Tensor:
        if not stash:
            return x
        if self._fused:
            # native_dropout's own arithmetic: x · mask · scale, scale rounded to the accumulation type.
            y: torch.Tensor = _aten.native_dropout_backward(x, stash[0], 1.0 / (1.0 - self.p))
            return y
        if self.in_place:
            return torch.mul(x, stash[0], out=torch.empty_like(x))  # it keeps the strides of x
        return x * stash[0]

    def backward(
        self,
        grad: torch.Tensor,
        x: torch.Tensor | None,
        y: torch.Tensor | None,
        params: Params,
        stash: Stash,
        needs: tuple[bool, ...],
        grad_owned: bool,
    ) -> tuple[torch.Tensor | None, ...]:
        if not stash or self._fused:
            return (self.recompute(grad, params, stash, None),)
        return (grad * stash[0],)


class AvgPool:
    """Average pooling in two or three dimensions: its gradient reads nothing of the input but its shape."""

    def __init__(self, dimensions: int, arguments: tuple[Any, ...]) -> None:
        self._name = f"avg_pool{dimensions}d"
        self._arguments = arguments
        self._input: tuple[tuple[int, ...], tuple[int, ...], torch.dtype] | None = None
        self._dtype: torch.dtype | None = None

    def forward(self, x: torch.Tensor, params: Params, out: torch.Tensor | None) -> tuple[torch.Tensor, Stash]:
        self._input = (tuple(x.shape), x.stride(), x.dtype)
        y = self._run(x)
        self._dtype = y.dtype  # autocast may have run it in another dtype than x's
        return y, ()

    def recompute(self, x: torch.Tensor, params: Params, stash: Stash, out: torch.Tensor | None) -> torch.Tensor:
        return self._run(x.to(self._dtype))

    def _run(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = getattr(_aten, self._name)(x, *self._arguments)
        return y

    def backward(
        self,
        grad: torch.Tensor,
        x: torch.Tensor | None,
        y: torch.Tensor | None,
        params: Params,
        stash: Stash,
        needs: tuple[bool, ...],
        grad_owned: bool,
    ) -> tuple[torch.Tensor | None, ...]:
        assert self._input is not None
        size, stride, dtype = self._input
        # Never read: ATen takes the sizes and the layout of the result from it.
        like = torch.empty_strided(size, stride, dtype=self._dtype, device=grad.device)
        return (getattr(_aten, f"{self._name}_backward")(grad, like, *self._arguments).to(dtype),)


def bind_relu_module(relu: nn.ReLU) -> Bound:
    """nn.ReLU."""
    return Bound(Relu(relu.inplace), ())


def bind_relu_function(target: Any, inplace: bool = False) -> Bound:
    """F.relu, torch.relu, Tensor.relu and their in-place forms."""
    name = target if isinstance(target, str) else target.__name__
    return Bound(Relu(inplace or name.endswith("_")), ())


def bind_dropout_module(dropout: nn.Dropout | nn.Dropout2d | nn.Dropout3d) -> Bound:
    """nn.Dropout, nn.Dropout2d and nn.Dropout3d."""
    channels = not isinstance(dropout, nn.Dropout)
    return Bound(Dropout(dropout.p, dropout.training, channels, dropout.inplace), ())


def bind_dropout_function(target: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Bound:
    """F.dropout, F.dropout2d and F.dropout3d."""
    return Bound(Dropout(p, training, target in (F.dropout2d, F.dropout3d), inplace), ())


def bind_pool_module(pool: nn.AvgPool2d | nn.AvgPool3d) -> Bound:
    """nn.AvgPool2d and nn.AvgPool3d."""
    dimensions = 2 if isinstance(pool, nn.AvgPool2d) else 3
    return bind_pool_function(
        dimensions,
        pool.kernel_size,
        pool.stride,
        pool.padding,
        pool.ceil_mode,
        pool.count_include_pad,
        pool.divisor_override,
    )


def bind_pool_function(
    dimensions: int,
    kernel_size: int | tuple[int, ...],
    stride: int | tuple[int, ...] | None = None,
    padding: int | tuple[int, ...] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Bound:
    """F.avg_pool2d and F.avg_pool3d."""
    kernel, pads = _each(kernel_size, dimensions), _each(padding, dimensions)
    steps = kernel if stride is None else _each(stride, dimensions)
    return Bound(AvgPool(dimensions, (kernel, steps, pads, ceil_mode, count_include_pad, divisor_override)), ())


def _each(value: int | tuple[int, ...], dimensions: int) -> tuple[int, ...]:
    return (value,) * dimensions if isinstance(value, int) else tuple(value)
