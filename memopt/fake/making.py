"""Fake tensors made directly, and how tensors lie."""

from functools import cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

Size = tuple[int, ...]


def make_fake(mode: FakeTensorMode, size: Size, stride: Size, dtype: torch.dtype, device: torch.device) -> FakeTensor:
    """A new fake tensor with a storage of its own, and no gradient."""
    with in_kernel_invocation_manager(mode):
        data = torch.empty_strided(size, stride, dtype=dtype, device="meta")
    return FakeTensor(mode, data, device)


@cache
def strides_of(size: Size, channels_last: bool = False) -> Size:
    """How a dense tensor lies; with channels last, if that is asked for."""
    order = (0, *range(2, len(size)), 1) if channels_last else range(len(size))
    strides, step = [0] * len(size), 1
    for dim in reversed(order):
        strides[dim] = step
        step *= max(size[dim], 1)
    return tuple(strides)


def is_channels_last(tensor: torch.Tensor) -> bool | None:
    """Whether channels lie last; None for a tensor that lies in neither of the two usual ways."""
    size, stride = tuple(tensor.shape), tensor.stride()
    if not all(type(extent) is int and extent > 0 for extent in size):
        return None
    if stride == strides_of(size):
        return False
    return True if len(size) in (4, 5) and stride == strides_of(size, True) else None


def are_alike(tensors: list[Any]) -> bool:
    """Whether all are fake tensors on one device."""
    return all(type(t) is FakeTensor and t.fake_device == tensors[0].fake_device for t in tensors)
