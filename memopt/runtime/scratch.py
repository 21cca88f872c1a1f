"""The scratch of one forward or one backward call of a region: a few buffers in which passing values lie."""

from functools import lru_cache

import torch

from memopt.ir import Slot
from memopt.runtime.memory_format import dense_strides


class Scratch:
    """Buffers for one call alone, sized for their largest moment: growing concats would fragment the allocator.

    Args:
        lanes_bytes: their sizes.
        like: on the device where they are wanted.
    """

    def __init__(self, lanes_bytes: tuple[int, ...], like: torch.Tensor) -> None:
        device = like.device
        self._lanes = [torch.empty(size, dtype=torch.uint8, device=device) for size in lanes_bytes]
        self._typed: dict[tuple[int, torch.dtype], torch.Tensor] = {}

    def view(self, slot: Slot, dtype: torch.dtype, memory_format: torch.memory_format) -> torch.Tensor:
        """The tensor at a place, lying densely in a format."""
        key = (slot.lane, dtype)
        lane = self._typed.get(key)
        if lane is None:
            whole = self._lanes[slot.lane]
            elements_bytes = whole.numel() // dtype.itemsize * dtype.itemsize
            lane = self._typed[key] = whole[:elements_bytes].view(dtype)
        return lane.as_strided(slot.size, _strides(slot.size, memory_format))


_strides = lru_cache(maxsize=4096)(dense_strides)
