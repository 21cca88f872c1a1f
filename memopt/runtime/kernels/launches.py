"""What a Triton kernel's launch comes to: a compiled function, a grid and parameters, to be started again.

Triton works out at every launch which compiled variant fits its arguments. Where sizes and the alignment of addresses
are known to be the same again, only the addresses differ.
"""

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch

from memopt.runtime.kernels.driver import packed, size_of
from memopt.runtime.kernels.language import triton

_local = threading.local()


@dataclass(frozen=True, slots=True)
class Launched:
    """One launch: what Triton compiled, on which grid it ran, and every argument in the order of the parameters."""

    compiled: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]


@contextmanager
def observed() -> Iterator[list[Launched]]:
    """Collects this thread's launches."""
    launches: list[Launched] = []
    _local.launches = launches
    try:
        yield launches
    finally:
        _local.launches = None


class Outline:
    """What a launch asks of a tensor, without its data: kernels are chosen by that alone.

    Args:
        dtype, shape, stride: of the tensor.
        offset_bytes: how far into its buffer it begins.
    """

    __slots__ = ("_offset_bytes", "_stride", "dtype", "shape")

    device = torch.device("meta")

    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...], offset_bytes: int) -> None:
        self.dtype, self.shape, self._stride, self._offset_bytes = dtype, shape, stride, offset_bytes

    def __len__(self) -> int:
        return self.shape[0]

    def stride(self, dim: int | None = None) -> Any:
        """Elements from one to the next."""
        return self._stride if dim is None else self._stride[dim]

    def storage_offset(self) -> int:
        """Elements."""
        return self._offset_bytes // self.dtype.itemsize

    def data_ptr(self) -> int:
        """Aligned as the address will be."""
        return self._offset_bytes

    def dim(self) -> int:
        """How many dimensions."""
        return len(self.shape)

    def numel(self) -> int:
        """How many elements."""
        return math.prod(self.shape)

    def element_size(self) -> int:
        """Bytes."""
        return self.dtype.itemsize

    def tensor(self) -> torch.Tensor:
        """A meta tensor that lies like that."""
        base = torch.empty(0, dtype=self.dtype, device=self.device)
        return base.as_strided(self.shape, self._stride, self.storage_offset())


class Kernel:
    """A kernel in Triton's language, launched as Triton launches it: `kernel[grid](*arguments, **constants)`."""

    def __init__(self, jit: Any) -> None:
        self.jit = jit

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **constants: Any) -> None:
            compiling: dict[Any, Any] | None = getattr(_local, "compiling", None)
            if compiling is not None:
                variant = self, *map(_kind, arguments), *constants.items()
                if variant not in compiling:
                    tensors = [a.tensor() if isinstance(a, Outline) else a for a in arguments]
                    compiling[variant] = self.jit.warmup(*tensors, grid=grid, **constants)
                return
            compiled = self.jit[grid](*arguments, **constants)
            launches = getattr(_local, "launches", None)
            if launches is not None:
                names = self.jit.arg_names[len(arguments) :]
                every = (*arguments, *(constants[name] for name in names))
                launches.append(Launched(compiled, (*grid, 1, 1)[:3], every))

        return launch


def kernel(function: Any = None, **options: Any) -> Any:
    """`triton.jit`, for kernels that Python launches."""
    if function is None:
        return lambda f: Kernel(triton.jit(f, **options))
    return Kernel(triton.jit(function, **options))


def _kind(argument: Any) -> Any:
    """All of an argument that Triton chooses a compiled variant by, and maybe more."""
    if hasattr(argument, "data_ptr"):
        return argument.dtype, argument.data_ptr() % 16
    if type(argument) is int:
        return argument == 1, argument % 16 == 0, argument.bit_length() > 31, argument.bit_length() > 63
    return argument


def compile_soon(launches: Iterable[Callable[[], None]], device: torch.device) -> Future[None]:
    """As `compile_ahead`, in the background; the result is there when all is compiled."""

    def compile_there() -> None:
        with torch.cuda.device(device):  # of a thread of its own
            compile_ahead(launches)

    pool = ThreadPoolExecutor(1)
    compiling = pool.submit(compile_there)
    pool.shutdown(wait=False)
    return compiling


def compile_ahead(launches: Iterable[Callable[[], None]]) -> None:
    """Compile what launches need, several kernels at a time, and launch nothing.

    Args:
        launches: they may be given an `Outline` for a tensor. What cannot be compiled is left for the launch to say.
    """
    mode = getattr(triton, "AsyncCompileMode", None)
    if mode is None:
        return
    compiling: dict[Any, Any] = {}
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        with mode(pool, ignore_errors=True):
            _local.compiling = compiling
            try:
                for launch in launches:
                    launch()
            finally:
                _local.compiling = None
        # Triton has a C function compiled for each signature, which it would do as each is first launched.
        new = [one.kernel for one in compiling.values() if hasattr(one, "future") and one.kernel is not None]
        deque(pool.map(_build_launcher, {tuple(k.src.signature.values()): k for k in new}.values()), maxlen=0)


def _build_launcher(compiled: Any) -> None:
    with suppress(Exception):  # the launch will say what is wrong
        triton.runtime.driver.active.launcher_cls(compiled.src, compiled.metadata)


@dataclass(frozen=True, slots=True)
class Address:
    """Of a tensor: so many bytes into a buffer."""

    buffer: int
    offset_bytes: int


class Relaunch:
    """A launch with an address in the place of each tensor.

    Args:
        launched: the launch as it was; of it nothing is kept that holds memory.
        arguments: the same arguments in the same order, tensors as `Address`.
    """

    def __init__(self, launched: Launched, arguments: list[Any]) -> None:
        self.compiled, self.grid, self.arguments = launched.compiled, launched.grid, arguments
        self._runner = launched.compiled[launched.grid]

    def start(self, stream: int, addresses: Sequence[int]) -> None:
        """Through Triton, given the addresses of all buffers."""
        filled = [addresses[a.buffer] + a.offset_bytes if isinstance(a, Address) else a for a in self.arguments]
        self._runner(*filled, stream=stream)


@dataclass(frozen=True, slots=True)
class Packed:
    """A launch as the driver takes it; parameters are addresses, or other values as eight bytes."""

    function: int
    grid: tuple[int, ...]
    threads: int
    shared_bytes: int
    parameters: tuple[Address | int, ...]


def pack(launch: Relaunch, sizes: list[int] | None) -> Packed | None:
    """The launch for the driver; None where the compiled function is not as this expects.

    Args:
        launch: through Triton.
        sizes: bytes of each parameter, as the driver says; None where it does not.
    """
    compiled, metadata = launch.compiled, launch.compiled.metadata
    extras = ("launch_cooperative_grid", "launch_pdl", "global_scratch_size", "profile_scratch_size")
    if metadata.num_ctas != 1 or any(getattr(metadata, name, 0) for name in extras):
        return None
    kinds = list(compiled.src.signature.values())
    pairs = [(k, a) for k, a in zip(kinds, launch.arguments, strict=True) if k != "constexpr"]
    parameters = [a if isinstance(a, Address) else packed(k, a) for k, a in pairs]
    expected = [size_of(kind) for kind, _ in pairs]
    # Behind its parameters Triton has two addresses of its own, of scratch that these kernels do not use.
    if sizes is None or sizes[: len(expected)] != expected or set(sizes[len(expected) :]) - {8}:
        return None
    whole = [p for p in parameters if p is not None]
    if len(whole) < len(parameters):
        return None
    own = (0,) * (len(sizes) - len(expected))
    return Packed(compiled.function, launch.grid, 32 * metadata.num_warps, metadata.shared, (*whole, *own))
