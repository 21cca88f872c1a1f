"""Starting compiled kernels through CUDA's driver itself: a tenth of what a launch through Triton takes."""

import ctypes
import struct
from functools import cache
from typing import Any, Protocol

_SIGNED = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8}
_FORMATS = {"fp32": "<f4x", "fp64": "<d"} | {
    name: f"<{'bhiq'[size.bit_length() - 1]}{8 - size}x" for name, size in _SIGNED.items()
}
"""How `struct` packs a parameter of a type into eight bytes."""


class Driver(Protocol):
    """What starting a kernel takes of a driver."""

    def parameter_sizes(self, function: int) -> list[int] | None:
        """Bytes of each parameter of a compiled function; None where the driver does not say."""
        ...

    def launch(self, *arguments: Any) -> int:
        """`cuLaunchKernel`: function, grid, block, shared memory, stream, parameters, extra. 0 if it went well.

        Pointers are `ctypes.c_void_p`, which an int would not be taken for.
        """
        ...

    def enter(self, device: int) -> None:
        """Make a device's context current in this thread, if none is."""
        ...

    def describe(self, code: int) -> str:
        """An error in words."""
        ...


class _Cuda:
    def __init__(self) -> None:
        library = ctypes.CDLL("libcuda.so.1")
        self._library = library
        # Without argtypes: converting what lies ready as C types already would take longer than the call.
        self.launch: Any = library.cuLaunchKernel

    def parameter_sizes(self, function: int) -> list[int] | None:
        describe = getattr(self._library, "cuFuncGetParamInfo", None)
        if describe is None:  # drivers before CUDA 12.4
            return None
        sizes: list[int] = []
        offset, size = ctypes.c_size_t(), ctypes.c_size_t()
        place = ctypes.byref(offset), ctypes.byref(size)
        while describe(ctypes.c_void_p(function), ctypes.c_size_t(len(sizes)), *place) == 0:
            sizes.append(size.value)
        return sizes

    def enter(self, device: int) -> None:
        context = ctypes.c_void_p()
        self._library.cuCtxGetCurrent(ctypes.byref(context))
        if context.value is None:
            handle = ctypes.c_int()
            self._library.cuDeviceGet(ctypes.byref(handle), device)
            self._library.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle)
            self._library.cuCtxSetCurrent(context)

    def describe(self, code: int) -> str:
        text = ctypes.c_char_p()
        self._library.cuGetErrorString(code, ctypes.byref(text))
        return (text.value or b"unknown error").decode()


@cache
def cuda_driver() -> Driver | None:
    """The driver of this machine; None where its library is not found."""
    try:
        return _Cuda()
    except (OSError, AttributeError):
        return None


def packed(kind: str, value: Any) -> int | None:
    """A parameter of one of Triton's types as eight bytes; None for a type that no kernel of ours has."""
    if kind not in _FORMATS:
        return None
    (word,) = struct.unpack("<q", struct.pack(_FORMATS[kind], value))
    return int(word)


def size_of(kind: str) -> int:
    """Bytes of a parameter of one of Triton's types."""
    return 8 if kind.startswith("*") else _SIGNED.get(kind, 4 if kind == "fp32" else 8)
