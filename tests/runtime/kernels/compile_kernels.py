"""Compile every kernel as its `launch` would have it compiled on a GPU, without one; print what came of it as JSON.

A program of its own: where TRITON_INTERPRET is set as a kernel's file is imported, the kernel cannot be compiled.
"""

import contextlib
import importlib
import io
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from memopt.ir import MAX_CONV_CHANNELS, MAX_MATMUL_CHANNELS
from memopt.runtime.kernels import tiles
from tests.runtime.kernels.cases import ACTIVATIONS, CASES, Maker, Shape

FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16
MATMULS = (
    "norm_act_matmul",
    "norm_act_matmul_backward",
    "norm_act_conv",
    "norm_act_conv_backward",
    "norm_act_conv_weight",
)
POSITIONS = 128 * 32 * 32
"""So many that every loop over tiles of positions stays a loop."""
SIZES = tuple(1 << power for power in range(11))
"""Channels and partial results to choose tiles for. Tiles follow the next power of two, and powers of two, where 16
divides them, let Triton load through shared memory: they need the most of it."""
PARTS = {"merge_moments": "moments"}
"""Kernels whose tile follows the number of partial results, and the argument that holds these."""

OPTIONS = {"norm_act_sums": "pooled", "finish_norm": "taps"}
"""Other ways to use a kernel, by the option of its case."""


@dataclass(frozen=True)
class Choice:
    """What decides how `launch` has its kernel compiled."""

    name: str
    dtype: torch.dtype
    shape: Shape
    tf32: bool = True
    activation: str = "relu"
    parts: int | None = None
    everything: bool = True
    """Whether arguments that may be None are given."""
    option: str | None = None
    """Of the kernel's case in `cases`."""


@dataclass
class Result:
    """What came of one compilation; `shared` and `spilled` in bytes, the latter for each thread."""

    kernel: str
    dtype: str
    target: int
    shape: str
    tiles: dict[str, Any]
    error: str | None = None
    shared: int | None = None
    registers: int | None = None
    spilled: int | None = None


SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that a program may have."""


class Sizes(Maker):
    """Tensors without data: a launch is decided by their sizes and types."""

    def normal(self, *size: int) -> torch.Tensor:
        return torch.empty(size, device="meta")


class Recorder:
    """In the place of a kernel: keeps what `launch` would launch."""

    def __getitem__(self, grid: tuple[int, ...]) -> "Recorder":
        self.grid = grid
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs


class Driver:
    """What Triton asks of a driver in order to compile."""

    def __init__(self, target: int) -> None:
        self.target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.target, 32)


def record(choice: Choice) -> tuple[Any, Recorder]:
    """The kernel, and what `launch` would launch."""
    module = importlib.import_module(f"memopt.runtime.kernels.{choice.name}")
    case: Any = CASES[choice.name]
    options = {} if choice.option is None else {choice.option: True}
    sizes = Sizes(choice.shape, choice.dtype, "meta", allow_tf32=choice.tf32)
    arguments = case(sizes, ACTIVATIONS[choice.activation], **options)
    if choice.parts is not None:
        arguments[PARTS[choice.name]] = torch.empty(2, choice.shape.channels, choice.parts, device="meta")
    if not choice.everything:
        schema = getattr(torch.ops.memopt, choice.name).default._schema
        arguments |= {each.name: None for each in schema.arguments if isinstance(each.type, torch.OptionalType)}
    kernel, recorder = module._kernel, Recorder()
    module._kernel = recorder
    try:
        module.launch(*arguments.values())
    finally:
        module._kernel = kernel
    return kernel.jit, recorder


def compile_for(choice: Choice, target: int) -> Result:
    """Compile what a launch would: `warmup` does all of it but load and run."""
    tiles.capability = lambda device: divmod(target, 10)
    kernel, recorder = record(choice)
    result = Result(choice.name, str(choice.dtype), target, str(choice.shape), recorder.kwargs)
    triton.runtime.driver.set_active(Driver(target))
    triton.knobs.compilation.disable_line_info = True  # a sixth of the time
    # ptxas tells of registers, once: nothing may come from a cache.
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True
    kernel.device_caches.clear()
    # Should the compiler take the process with it, this is the last word.
    print("compiling", result, file=sys.stderr, flush=True)
    log = io.StringIO()
    try:
        with contextlib.redirect_stdout(log):
            compiled = kernel.warmup(*recorder.args, grid=recorder.grid, **recorder.kwargs)
    except Exception as error:
        result.error = f"{type(error).__name__}: {error}"
        return result
    result.shared = compiled.metadata.shared
    if used := re.search(r"Used (\d+) registers", log.getvalue()):
        result.registers = int(used[1])
    if stored := re.search(r"(\d+) bytes spill stores", log.getvalue()):
        result.spilled = int(stored[1])
    return result


def distinct(choices: Iterable[Choice]) -> list[Choice]:
    """Of choices that differ in sizes alone, not in tiles, the last: small sizes are the ones Triton specialises on."""
    found: dict[str, Choice] = {}
    for choice in choices:
        _, recorder = record(choice)
        types = [value.dtype if isinstance(value, torch.Tensor) else type(value) for value in recorder.args]
        tile = {key: value for key, value in recorder.kwargs.items() if key != "UNIT"}
        found[repr((choice.name, types, tile))] = choice
    return list(found.values())


def tile_choices(name: str, dtype: torch.dtype, tf32: bool = True) -> list[Choice]:
    """Every choice of tiles there is for one kernel and type."""
    if name in PARTS:
        return distinct(Choice(name, dtype, Shape(POSITIONS, 64, 64, 1), parts=parts) for parts in SIZES)
    most = 64 if "weight" in name else MAX_CONV_CHANNELS if "conv" in name else MAX_MATMUL_CHANNELS
    outs = [out for out in SIZES if name == "norm_act_matmul" or out <= most]
    pairs = product(SIZES, outs if name in MATMULS else [1])
    return distinct(Choice(name, dtype, Shape(POSITIONS, channels, 2 * channels, out), tf32) for channels, out in pairs)


def jobs() -> list[tuple[Choice, int]]:
    """Every compilation; test_compilation.py says which these are."""
    found: dict[tuple[Choice, int], None] = {}

    def add(target: int, choices: Iterable[Choice]) -> None:
        found.update(dict.fromkeys((choice, target) for choice in choices))

    wide = Shape(POSITIONS, 640, 1280, 128)
    odd = (Shape(POSITIONS - 1, 639, 1279, 127), Shape(POSITIONS - 1, 119, 239, 47))
    for name in CASES:
        # Partial results are float32 whatever they are of.
        half, bfloat = (FLOAT, FLOAT) if name in PARTS else (HALF, BFLOAT)
        add(86, tile_choices(name, FLOAT))
        add(90, tile_choices(name, bfloat))
        add(80, [Choice(name, FLOAT, wide), Choice(name, FLOAT, wide, everything=False), Choice(name, half, odd[0])])
        add(89, [Choice(name, bfloat, wide)])
        if name in MATMULS:
            add(86, [*tile_choices(name, FLOAT, tf32=False), *tile_choices(name, HALF)])
            add(90, [*tile_choices(name, FLOAT), Choice(name, FLOAT, wide, tf32=False)])
            add(80, [Choice(name, FLOAT, shape, tf32) for shape in odd for tf32 in (True, False)])
        if name in OPTIONS:
            add(86, [Choice(name, FLOAT, wide, option=OPTIONS[name])])
            add(90, [Choice(name, BFLOAT, wide, option=OPTIONS[name])])
        if name in ("norm_act", "norm_act_backward"):
            add(80, [Choice(name, FLOAT, wide, activation=activation) for activation in ACTIVATIONS])
    # The longest first, so that no process waits for another at the end.
    return sorted(found, key=lambda pair: pair[0].name not in MATMULS)


def main() -> None:
    pending = jobs()
    processes = min(8, len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("fork")) as pool:
        results = pool.map(compile_for, *zip(*pending, strict=True))
        json.dump([asdict(result) for result in results], sys.stdout)


if __name__ == "__main__":
    main()
