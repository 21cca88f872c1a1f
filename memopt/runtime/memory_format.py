"""Memory formats as ATen decides them: scratch must lie as eager's own result would, or other kernels run."""

import torch

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def suggested_format(x: torch.Tensor) -> torch.memory_format:
    """What `Tensor.suggest_memory_format` says in C++: channels-last if the strides are ordered so."""
    channels_last = CHANNELS_LAST.get(x.dim())
    if channels_last is None:
        return torch.contiguous_format
    size = x.shape
    if 1 not in size and x.is_contiguous():  # nearly always, and this is asked at every operation
        return torch.contiguous_format
    stride = x.stride()
    if stride[1] == 0:
        return torch.contiguous_format
    smallest = 0
    # From the innermost dimension of that format outwards; strides may not decrease.
    for d in (1, *range(x.dim() - 1, 1, -1), 0):
        if size[d] == 0 or stride[d] < smallest:
            return torch.contiguous_format
        if d == 0 and smallest == stride[1]:  # (N, 1, 1, 1) is ambiguous: contiguous
            return torch.contiguous_format
        smallest = stride[d]
        if size[d] > 1:
            smallest *= size[d]
    return channels_last


def concat_format(parts: list[torch.Tensor]) -> torch.memory_format:
    """The format of `torch.cat(parts, 1)`: channels-last if all of them are."""
    chosen: torch.memory_format = torch.contiguous_format
    for part in parts:
        chosen = suggested_format(part)
        if chosen == torch.contiguous_format:
            return chosen
    return chosen


def dense_strides(size: tuple[int, ...], memory_format: torch.memory_format) -> tuple[int, ...]:
    """Strides of a dense tensor of `size` in a format."""
    order = (0, *range(2, len(size)), 1) if memory_format != torch.contiguous_format else tuple(range(len(size)))
    strides = [0] * len(size)
    step = 1
    for d in reversed(order):
        strides[d] = step
        step *= size[d]
    return tuple(strides)


def with_strides_of_ones(x: torch.Tensor, stride: tuple[int, ...]) -> torch.Tensor:
    """The same tensor with other strides where a size is 1, which say nothing but are seen by who looks at strides."""
    wanted = tuple(new if extent == 1 else old for extent, old, new in zip(x.shape, x.stride(), stride, strict=True))
    return x if wanted == x.stride() else x.as_strided(x.size(), wanted)


def has_odd_strides(x: torch.Tensor) -> bool:
    """Whether a contiguous tensor has strides of its own where a size is 1: (16, 1, 4, 1) for (N, 1, 4, 4).

    It then lies in both formats at once. Operations that make a new tensor normalise such strides, those that work in
    place keep them, and later kernels choose by them.
    """
    if 1 not in x.shape or not x.is_contiguous():
        return False
    return x.stride() != dense_strides(tuple(x.shape), torch.contiguous_format)
