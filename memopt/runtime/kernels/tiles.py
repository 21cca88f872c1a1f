"""Tile sizes: how many positions and channels a program takes at a time.

Chosen by rule, not by timing on the user's machine, so that the first step compiles each kernel once, and results are
the same on every machine of a kind. Every choice fits the 99 KiB of shared memory of sm_86 and sm_89,
but for some of sm_90. Measured on an H200 by `tests/bench/search_tiles.py`.
"""

from dataclasses import dataclass, replace
from functools import cache
from math import gcd

import torch


@dataclass(frozen=True, slots=True)
class Tiles:
    """Constants of one launch.

    Attributes:
        positions: rows a program takes at a time.
        inner: input channels at a time.
        outer: output channels at a time (of a matmul).
        warps: warps of a program.
        stages: loads in flight.
        programs: how many share the positions, of a kernel that also sums over them.
        hopper: warps and stages instead on sm_90, whose matmuls read their operands from shared memory and leave more
            registers.
        sums_by_row: threads meet for the sums over positions once at the end, not at every tile, for more registers.
    """

    positions: int
    inner: int
    outer: int
    warps: int
    stages: int
    programs: int = 0
    hopper: tuple[int, int] | None = None
    sums_by_row: bool = False


PROGRAMS = 1056
"""Programs that a reduction is split into: a few for each multiprocessor of a large card."""
VECTOR = 16
"""Triton loads several channels at once where it knows that 16 divides their number, and the distance of rows."""


def padded(channels: int) -> int:
    """Channels rounded up to what is loaded at once: how far apart the rows of an arena are."""
    return cdiv(channels, VECTOR) * VECTOR


def readable(*matrices: torch.Tensor) -> int:
    """How many channels of intervals (P, C) of arenas a kernel may touch: up to 15 more than there are.

    It ignores the values that it reads there, and writes back what it read. The rows must go on so far, every one.
    """
    channels = matrices[0].shape[1]
    wanted = padded(channels)
    for matrix in matrices:
        distance = matrix.stride(0)
        if distance % VECTOR or matrix.storage_offset() % distance + wanted > distance:
            return channels
    return wanted


def unit(*sizes: int) -> int:
    """The largest power of two, up to 16, that divides all sizes: a kernel that is handed multiples of it knows that it
    may move so many channels at once."""
    return gcd(VECTOR, *sizes)


def power_of_two(n: int) -> int:
    """The next power of two."""
    return 1 << (n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    """Quotient, rounded up."""
    return -(-a // b)


def matmul_forward(channels: int, out_channels: int, item_bytes: int) -> Tiles:
    """norm_act_matmul: rows × out_channels accumulators, the rows' channels normalised as they pass."""
    outer = max(16, min(128, power_of_two(out_channels)))
    inner = max(16, min(32, power_of_two(channels)))
    rows = 256 if item_bytes == 2 and outer <= 64 else 128
    return Tiles(rows, inner, outer, 8 if outer > 64 else 4, 3, hopper=(4, 3))


def matmul_backward(channels: int, out_channels: int, item_bytes: int) -> Tiles:
    """norm_act_matmul_backward: inner × out_channels accumulators of the weight gradient."""
    outer = max(16, power_of_two(out_channels))
    if item_bytes == 2:
        inner = max(16, min(64, power_of_two(channels)))
        return Tiles(32, inner, outer, 8 if outer * inner >= 1024 else 4, 2, PROGRAMS // 4, hopper=(4, 3))
    inner = max(16, min(32, power_of_two(channels)))
    hopper = (8, 3) if outer > 64 else (4, 3)
    return Tiles(64, inner, outer, 8 if outer * inner >= 1024 else 4, 2, PROGRAMS // 2, hopper)


def conv_forward(channels: int, item_bytes: int, allow_tf32: bool) -> Tiles:
    """norm_act_conv: rows × out_channels accumulators, three times."""
    if item_bytes == 4 and not allow_tf32:  # a thread holds whole rows
        return Tiles(64, 16, 0, 8, 1)
    return Tiles(256, max(16, min(32, power_of_two(channels))), 0, 4, 1)


def conv_backward(channels: int, item_bytes: int) -> Tiles:
    """norm_act_conv_backward: inner × 4 · out_channels accumulators of the weight gradient, three times."""
    if item_bytes == 2 and channels > 32:
        return Tiles(32, 64, 0, 8, 2, PROGRAMS // 4, hopper=(4, 2))
    return Tiles(32, 32, 0, 4, 2, PROGRAMS // 4)


def conv_weight(channels: int, outer: int, item_bytes: int) -> Tiles:
    """norm_act_conv_weight: inner × outer accumulators, three times."""
    inner = max(16, min(128 if outer <= 32 else 64, power_of_two(channels)))
    return Tiles(32 if item_bytes == 4 else 64, inner, outer, 8 if inner >= 64 else 4, 2, PROGRAMS // 4)


def for_device(chosen: Tiles, device: torch.device) -> Tiles:
    """The same tiles with the warps and stages that suit a GPU."""
    if chosen.hopper is None or capability(device)[0] != 9:
        return chosen
    warps, stages = chosen.hopper
    return replace(chosen, warps=warps, stages=stages)


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Of a CUDA device, of the current one for tensors without data; (0, 0) of anything else."""
    if device.type == "meta" and torch.cuda.is_available():
        return torch.cuda.get_device_capability()
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def elementwise(channels: int) -> Tiles:
    """Kernels that read and write rows: about 4096 elements a program."""
    inner = min(128, power_of_two(channels))
    return Tiles(max(16, 4096 // inner), inner, 0, 4, 2)


def partial_sums() -> Tiles:
    """finish_norm: parts of the weight gradient, and elements of it, at a time."""
    return Tiles(32, 128, 0, 4, 1)


def pooling(channels: int) -> Tiles:
    """norm_act_pool: about 1024 results a program, each of several rows, which are all loaded at once."""
    inner = min(128, power_of_two(channels))
    return Tiles(max(8, 1024 // inner), inner, 0, 4, 1)


def reduction(channels: int, positions: int) -> tuple[Tiles, int]:
    """Kernels that also sum over positions: the tiles, and how many of them one program takes one after another.

    The number of programs depends on the shape alone, never on the machine: so does the order of the sums.
    """
    chosen = reduction_tiles(channels)
    rows = cdiv(positions, chosen.positions)
    programs = max(1, chosen.programs // cdiv(channels, chosen.inner))
    return chosen, max(1, cdiv(rows, programs))


def reduction_tiles(channels: int) -> Tiles:
    """Half as many elements as of other kernels: each has two sums in registers, and so more programs fit."""
    inner = min(64, power_of_two(channels))
    return Tiles(max(16, 2048 // inner), inner, 0, 4, 1, PROGRAMS)
