"""The most memory that training took."""

import resource
import sys

import torch


class HighWater:
    """Peak memory of this process since it began.

    Args:
        device: on "cuda" what the caching allocator gave is meant, else what the process occupied.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @property
    def kind(self) -> str:
        """What is measured, as it is printed."""
        return "peak allocated" if self._device.type == "cuda" else "peak resident"

    def peak_bytes(self) -> int:
        """So far."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # Linux says kibibytes
