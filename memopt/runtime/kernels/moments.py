"""Mean and squared distances from it of every channel, in tiles of positions: the first half of a batch norm.

Welford and Chan et al.: no difference of large sums, so inputs far from zero lose nothing.
"""

import torch

from memopt.runtime.kernels import tiles
from memopt.runtime.kernels.language import tl
from memopt.runtime.kernels.launches import kernel
from memopt.runtime.kernels.library import define


@kernel(do_not_specialize=["P", "part_count", "NT"])
def _kernel(
    x,
    copy,
    moments,
    P,
    C,
    x_stride,
    copy_stride,
    part_count,
    NT,
    COPY: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    part = tl.program_id(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = c < C
    average = tl.zeros((BC,), tl.float32)
    squares = tl.zeros((BC,), tl.float32)
    for step in range(0, NT):
        first = (part * NT + step) * BP
        p = first + tl.arange(0, BP)
        there = (p < P)[:, None] & inside[None, :]
        loaded = tl.load(x + p.to(tl.int64)[:, None] * x_stride + c[None, :], mask=there, other=0.0)
        if COPY:
            tl.store(copy + p.to(tl.int64)[:, None] * copy_stride + c[None, :], loaded, mask=there)
        value = loaded.to(tl.float32)
        # Rows that are there: some may be missing at the end, and all of a part's later tiles.
        new = tl.maximum(tl.minimum(P - first, BP), 0).to(tl.float32)
        before = tl.minimum(step * BP, tl.maximum(P - part * NT * BP, 0)).to(tl.float32)
        both = tl.maximum(before + new, 1.0)
        tile_average = tl.sum(value, 0) / tl.maximum(new, 1.0)
        distance = tl.where(there, value - tile_average[None, :], 0.0)
        apart = tile_average - average
        average += apart * (new / both)
        squares += tl.sum(distance * distance, 0) + apart * apart * (before * (new / both))
    tl.store(moments + c.to(tl.int64) * part_count + part, average, mask=inside)
    tl.store(moments + (C + c).to(tl.int64) * part_count + part, squares, mask=inside)


def part_rows(positions: int, channels: int) -> int:
    """Rows of one partial result."""
    chosen, repeats = tiles.reduction(channels, positions)
    return chosen.positions * repeats


def launch(x: torch.Tensor, moments: torch.Tensor, copy: torch.Tensor | None) -> None:
    """Run the kernel; the arguments are those of the operator."""
    positions, channels = x.shape
    chosen, repeats = tiles.reduction(channels, positions)
    parts = tiles.cdiv(positions, chosen.positions * repeats)
    _kernel[(parts, tiles.cdiv(channels, chosen.inner))](
        x,
        copy,
        moments,
        positions,
        channels,
        x.stride(0),
        0 if copy is None else copy.stride(0),
        parts,
        repeats,
        COPY=copy is not None,
        BP=chosen.positions,
        BC=chosen.inner,
        num_warps=chosen.warps,
    )


def partial_moments(x: torch.Tensor, rows: int) -> torch.Tensor:
    """(2, C, parts): mean, and sum of squared distances from it, of every `rows` rows of x (P, C)."""
    parts = [part.float() for part in x.split(rows)]
    averages = torch.stack([part.mean(0) for part in parts], 1)
    squares = torch.stack([(part - part.mean(0)).square().sum(0) for part in parts], 1)
    return torch.stack([averages, squares])


def compute(x: torch.Tensor, moments: torch.Tensor, copy: torch.Tensor | None) -> None:
    """The same in plain torch."""
    if copy is not None:
        copy.copy_(x)
    moments.copy_(partial_moments(x, part_rows(*x.shape)))


moments = define("moments(Tensor x, Tensor(a!) moments, Tensor(b!)? copy) -> ()", cuda=launch, reference=compute)
"""x (P, C), rows `x.stride(0)` apart. moments (2, C, ⌈P / part_rows⌉) is written, and copy (P, C) if given."""
