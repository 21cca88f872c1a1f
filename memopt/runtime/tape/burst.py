"""Many launches one after another, with next to no Python for each."""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from memopt.runtime.kernels.driver import Driver
from memopt.runtime.kernels.launches import Address, Packed


class Burst:
    """Launches whose parameters lie ready in memory, but for the addresses, which are filled in all at once.

    Not for two threads at a time: they would share that memory.

    Args:
        launches: in order.
        driver: starts them.
    """

    def __init__(self, launches: Sequence[Packed], driver: Driver) -> None:
        self._driver = driver
        addresses = [p for launch in launches for p in launch.parameters if isinstance(p, Address)]
        values = [p for launch in launches for p in launch.parameters if not isinstance(p, Address)]
        self._buffers = torch.tensor([a.buffer for a in addresses], dtype=torch.int64, device="cpu")
        self._offsets = torch.tensor([a.offset_bytes for a in addresses], dtype=torch.int64, device="cpu")
        # Every parameter in eight bytes of its own, the addresses first.
        self._memory = torch.tensor([0] * len(addresses) + values, dtype=torch.int64, device="cpu")
        self._filled = self._memory[: len(addresses)]
        self._stream = ctypes.c_void_p()  # one for all calls, set as they are started
        self._calls: list[tuple[Any, ...]] = []
        self._arrays: list[object] = []  # what the calls point at
        next_address, next_value = 0, len(addresses)
        for launch in launches:
            places = []
            for parameter in launch.parameters:
                if isinstance(parameter, Address):
                    places.append(next_address)
                    next_address += 1
                else:
                    places.append(next_value)
                    next_value += 1
            array = (ctypes.c_void_p * len(places))(*(self._memory.data_ptr() + 8 * place for place in places))
            self._arrays.append(array)
            size = (*launch.grid, launch.threads, 1, 1, launch.shared_bytes)
            array_at = ctypes.c_void_p(ctypes.addressof(array))
            self._calls.append((ctypes.c_void_p(launch.function), *size, self._stream, array_at, None))

    def run(self, stream: int, addresses: torch.Tensor) -> None:
        """Start them all, given the addresses of the buffers (int64, on the CPU).

        Raises:
            RuntimeError: CUDA refuses a launch.
        """
        torch.index_select(addresses, 0, self._buffers, out=self._filled).add_(self._offsets)
        self._stream.value = stream
        launch = self._driver.launch
        for call in self._calls:
            code = launch(*call)
            if code:
                raise RuntimeError(f"CUDA refused to start a kernel: {self._driver.describe(code)}")
