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
    STAGES: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    part = tl.program_id(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = c < C
    # Welford's sums for each row of a tile, merged at the end: threads meet once, not at every tile.
    averages = tl.zeros((BP, BC), tl.float32)
    squares = tl.zeros((BP, BC), tl.float32)
    for step in tl.range(0, NT, num_stages=STAGES):
        p = (part * NT + step) * BP + tl.arange(0, BP)
        there = (p < P)[:, None] & inside[None, :]
        loaded = tl.load(x + p.to(tl.int64)[:, None] * x_stride + c[None, :], mask=there, other=0.0)
        if COPY:
            tl.store(copy + p.to(tl.int64)[:, None] * copy_stride + c[None, :], loaded, mask=there)
        # Rows are missing only at the end: one that is there has been in all tiles before.
        share = 1.0 / tl.cast(step + 1, tl.float32)
        distance = tl.where(there, loaded.to(tl.float32) - averages, 0.0)
        averages += distance * share
        squares += distance * distance * (1.0 - share)
    left = P - part * NT * BP - tl.arange(0, BP)
    counts = tl.maximum(tl.minimum((left + BP - 1) // BP, NT), 0).to(tl.float32)[:, None]
    average = tl.sum(averages * counts, 0) / tl.sum(counts, 0)
    distance = tl.where(counts > 0.0, averages - average[None, :], 0.0)
    total = tl.sum(squares, 0) + tl.sum(distance * distance * counts, 0)
    tl.store(moments + c.to(tl.int64) * part_count + part, average, mask=inside)
    tl.store(moments + (C + c).to(tl.int64) * part_count + part, total, mask=inside)


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
        STAGES=chosen.stages,
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
