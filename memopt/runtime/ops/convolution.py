"""Convolution: forward as eager's, backward by the same `convolution_backward` without running it again."""

from collections.abc import Sequence

import torch
from torch import nn

from memopt.runtime.autocast import cast_parameter
from memopt.runtime.ops.base import Bound, Params, Stash

_aten = torch.ops.aten


class Convolution:
    """conv(x, weight, bias), with autocast's cast of x made explicit so that backward repeats it."""

    def __init__(
        self,
        dimensions: int,
        stride: Sequence[int],
        padding: str | Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> None:
        self.stride = tuple(stride)
        self.padding = padding
        self.dilation = tuple(dilation)
        self.groups = groups
        self._function = (torch.conv1d, torch.conv2d, torch.conv3d)[dimensions - 1]
        self._cast: torch.dtype | None = None

    def forward(self, x: torch.Tensor, params: Params, out: torch.Tensor | None) -> tuple[torch.Tensor, Stash]:
        device = x.device.type
        self._cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return self._run(x, params), ()

    def recompute(self, x: torch.Tensor, params: Params, stash: Stash, out: torch.Tensor | None) -> torch.Tensor:
        return self._run(x, params)

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
        assert x is not None
        weight, bias = params
        assert weight is not None
        x_grad, *gradients = _aten.convolution_backward(
            grad,
            self._casted(x),
            weight,
            None if bias is None else list(bias.shape),
            self.stride,
            self._padding_of(weight),
            self.dilation,
            False,
            [0] * len(self.stride),
            self.groups,
            needs,
        )
        return (None if x_grad is None else x_grad.to(x.dtype), *gradients)

    def _run(self, x: torch.Tensor, params: Params) -> torch.Tensor:
        weight, bias = params
        assert weight is not None
        y: torch.Tensor = self._function(
            self._casted(x), weight, bias, self.stride, self.padding, self.dilation, self.groups
        )
        return y

    def _casted(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._cast is None or tensor.dtype == torch.float64 or not tensor.is_floating_point():
            return tensor
        return tensor.to(self._cast)

    def _padding_of(self, weight: torch.Tensor) -> tuple[int, ...]:
        if self.padding == "valid":
            return (0,) * len(self.stride)
        if self.padding == "same":  # symmetric: an even total, checked when the node was classified
            return tuple(d * (k - 1) // 2 for d, k in zip(self.dilation, weight.shape[2:], strict=True))
        assert not isinstance(self.padding, str)
        return tuple(self.padding)


def bind_module(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Bound:
    """As the module's forward reads it (zero padding only)."""
    op = Convolution(len(conv.stride), conv.stride, conv.padding, conv.dilation, conv.groups)
    return Bound(op, (cast_parameter(conv.weight), cast_parameter(conv.bias)))


def bind_function(
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Bound:
    """As `torch.nn.functional.conv{1,2,3}d` reads its arguments."""
    dimensions = weight.dim() - 2

    def each(value: int | Sequence[int]) -> tuple[int, ...]:
        return (value,) * dimensions if isinstance(value, int) else tuple(value) * (dimensions // len(tuple(value)))

    pads = padding if isinstance(padding, str) else each(padding)
    op = Convolution(dimensions, each(stride), pads, each(dilation), groups)
    return Bound(op, (cast_parameter(weight), cast_parameter(bias)))
