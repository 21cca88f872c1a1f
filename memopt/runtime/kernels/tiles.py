"""Tile sizes: how many positions and channels a program takes at a time.

Chosen by rule, not by timing on the user's machine, so that the first step compiles each kernel once, and results are
the same on every machine of a kind. Every choice fits the 99 KiB of shared memory of sm_86 and sm_89.
"""

from dataclasses import dataclass
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
    """

    positions: int
    inner: int
    outer: int
    warps: int
    stages: int


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
    # The matrix waits in shared memory as it is stored, in float32 also where the rows are half as wide.
    inner = 64 if item_bytes == 2 and outer <= 32 else 32
    inner = max(16, min(inner, power_of_two(channels)))
    return Tiles(128, inner, outer, 8 if outer > 64 else 4, 3 if item_bytes == 4 else 4)


def matmul_backward(channels: int, out_channels: int, item_bytes: int) -> Tiles:
    """norm_act_matmul_backward: inner × out_channels accumulators of the weight gradient."""
    outer = max(16, power_of_two(out_channels))
    inner = max(16, min(64 if item_bytes == 2 else 32, power_of_two(channels)))
    # Fewer warps would keep more than 255 numbers a thread, and the rest in memory.
    return Tiles(64, inner, outer, 8 if outer * inner >= 1024 else 4, 2)


def conv_forward(channels: int, out_channels: int, item_bytes: int) -> Tiles:
    """norm_act_conv: rows × out_channels accumulators, three times."""
    return Tiles(128, min(32, max(16, power_of_two(channels))), power_of_two(out_channels), 4, 2)


def conv_backward(channels: int, out_channels: int, item_bytes: int) -> Tiles:
    """norm_act_conv_backward: inner × 4 · out_channels accumulators of the weight gradient, three times."""
    return Tiles(64, 32, power_of_two(out_channels), 4, 1)


def elementwise(channels: int) -> Tiles:
    """Kernels that read and write rows: about 4096 elements a program."""
    inner = min(128, power_of_two(channels))
    return Tiles(max(16, 4096 // inner), inner, 0, 4, 2)


def reduction(channels: int, positions: int) -> tuple[Tiles, int]:
    """Kernels that also sum over positions: the tiles, and how many of them one program takes one after another.

    The number of programs depends on the shape alone, never on the machine: so does the order of the sums.
    """
    tiles = elementwise(channels)
    rows = cdiv(positions, tiles.positions)
    columns = cdiv(channels, tiles.inner)
    programs = max(1, PROGRAMS // columns)
    return tiles, max(1, cdiv(rows, programs))


PROGRAMS = 1056
"""Programs that a reduction is split into: a few for each multiprocessor of a large card."""
