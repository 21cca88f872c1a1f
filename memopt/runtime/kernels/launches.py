"""What a Triton kernel's launch comes to: a compiled function, a grid and arguments, to be started again.

Triton works out at every launch which compiled variant fits its arguments. Where sizes and the alignment of addresses
are known to be the same again, only the addresses differ.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

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


class Kernel:
    """A kernel in Triton's language, launched as Triton launches it: `kernel[grid](*arguments, **constants)`."""

    def __init__(self, compiled_by: Any) -> None:
        self.jit = compiled_by

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **constants: Any) -> None:
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


Argument = tuple[int, Any]
"""Of a launch: the number of a buffer and an offset in bytes, or -1 and a value."""


def starter(launched: Launched, arguments: list[Argument]) -> Callable[[int, list[int]], None]:
    """The same launch again, given a stream and the addresses of the buffers."""
    lead = 0
    while lead < len(arguments) and arguments[lead][0] >= 0:
        lead += 1
    pointers, rest = tuple(arguments[:lead]), arguments[lead:]
    run = _runner(launched)
    if all(number < 0 for number, _ in rest):
        values = tuple(value for _, value in rest)

        def start(stream: int, addresses: list[int]) -> None:
            run(stream, *[addresses[number] + offset for number, offset in pointers], *values)

        return start

    def start_mixed(stream: int, addresses: list[int]) -> None:
        run(stream, *[addresses[number] + value if number >= 0 else value for number, value in arguments])

    return start_mixed


def _runner(launched: Launched) -> Callable[..., None]:
    compiled, grid = launched.compiled, launched.grid
    if triton.__version__.startswith("3.6."):
        # What `compiled[grid]` does at every call, without looking for observers of launches.
        run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata

        def direct(stream: int, *arguments: Any) -> None:
            run(*grid, stream, function, metadata, None, None, None, *arguments)

        return direct
    runner = compiled[grid]
    return lambda stream, *arguments: runner(*arguments, stream=stream)
