"""What the commonest operators of a forward make of fake tensors, by their shapes alone.

A rule is given what the operator is given and returns what torch's fake operator does, or None.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from memopt.fake.making import are_alike, is_channels_last, make_fake, strides_of

_aten = torch.ops.aten

_STATISTICS = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
"""In what a norm of these dtypes computes its statistics."""


def _batch_norm(
    x: Any, weight: Any, bias: Any, mean: Any, var: Any, training: bool, *_: Any
) -> tuple[torch.Tensor, ...] | None:
    given = [t for t in (weight, bias, mean, var) if t is not None]
    if not are_alike([x, *given]) or x.dim() < 2 or (not training and (mean is None or var is None)):
        return None
    size, channels_last = tuple(x.shape), is_channels_last(x)
    each = x.numel() // size[1] if channels_last is not None else 0
    dtype = _STATISTICS.get(x.dtype, x.dtype)
    if each < 2 or not dtype.is_floating_point or any(tuple(t.shape) != size[1:2] for t in given):
        return None
    on_cpu = x.fake_device.type == "cpu"
    count = size[1] if training or not on_cpu else 0

    def statistics() -> torch.Tensor:
        return make_fake(x.fake_mode, (count,), (1,), x.dtype if on_cpu else dtype, x.fake_device)

    output = make_fake(x.fake_mode, size, strides_of(size, bool(channels_last)), x.dtype, x.fake_device)
    return output, statistics(), statistics()


def _cudnn_batch_norm(*args: Any) -> tuple[torch.Tensor, ...] | None:
    made = _batch_norm(*args) if args[5] else None
    x = args[0]
    return None if made is None else (*made, make_fake(x.fake_mode, (0,), (1,), torch.uint8, x.fake_device))


def _convolution(
    x: Any,
    weight: Any,
    bias: Any,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    _: list[int],
    groups: int,
) -> torch.Tensor | None:
    """Where channels lie last, what a library is asked for decides how its result lies."""
    given = [x, weight] if bias is None else [x, weight, bias]
    if transposed or not are_alike(given) or x.fake_device.type not in ("cpu", "cuda") or x.dim() not in (4, 5):
        return None
    usual = is_channels_last(x) is False and is_channels_last(weight) is False and x.dtype.is_floating_point
    if not usual or x.dim() != weight.dim() or any(t.dtype != x.dtype for t in given):
        return None
    (count, channels, *extents), (made, read, *kernel) = x.shape, weight.shape
    if read * groups != channels or made % groups or (bias is not None and tuple(bias.shape) != (made,)):
        return None
    if not len(stride) == len(padding) == len(dilation) == len(extents):
        return None
    if min(*stride, *dilation) < 1 or min(padding) < 0:
        return None
    each = zip(extents, kernel, stride, padding, dilation, strict=True)
    size = (count, made, *((e + 2 * p - d * (k - 1) - 1) // s + 1 for e, k, s, p, d in each))
    return make_fake(x.fake_mode, size, strides_of(size), x.dtype, x.fake_device) if min(size) > 0 else None


def _concat(tensors: list[Any], dim: int = 0) -> torch.Tensor | None:
    if not tensors or not are_alike(tensors):
        return None
    first, rank = tensors[0], tensors[0].dim()
    channels_last, dtype = is_channels_last(first), first.dtype
    if channels_last is None or not -rank <= dim < rank:
        return None
    total, size = 0, list(first.shape)
    dim %= rank
    for tensor in tensors:
        extents = list(tensor.shape)
        if tensor.dtype != dtype or len(extents) != rank or is_channels_last(tensor) is not channels_last:
            return None
        total += extents[dim]
        extents[dim] = size[dim]
        if extents != size:
            return None
    size[dim] = total
    strides = strides_of(tuple(size), channels_last)
    return make_fake(first.fake_mode, tuple(size), strides, dtype, first.fake_device)


def _relu(x: Any) -> torch.Tensor | None:
    if _in_place(x) is None:
        return None
    size = tuple(x.shape)
    return make_fake(x.fake_mode, size, strides_of(size, bool(is_channels_last(x))), x.dtype, x.fake_device)


def _in_place(x: Any) -> torch.Tensor | None:
    ordinary = type(x) is FakeTensor and x.constant is None and is_channels_last(x) is not None
    return x if ordinary and x.dtype != torch.bool and not x.dtype.is_complex else None


def _add_in_place(x: Any, other: Any) -> torch.Tensor | None:
    """As a norm counts its batches."""
    return _in_place(x) if type(other) is int else None


_RULES: dict[Any, Callable[..., Any]] = {
    _aten.native_batch_norm.default: _batch_norm,
    _aten.cudnn_batch_norm.default: _cudnn_batch_norm,
    _aten.convolution.default: _convolution,
    _aten.cat.default: _concat,
    _aten.relu.default: _relu,
    _aten.relu_.default: _in_place,
    _aten.add_.Tensor: _add_in_place,
}


def shape_rule(func: Any) -> Callable[..., Any] | None:
    """The rule for an operator: given the same arguments, it returns what torch's fake operator does, or None."""
    return _RULES.get(func)
