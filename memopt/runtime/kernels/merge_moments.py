"""Mean and variance of every channel from the partial results of its tiles, merged in a fixed order."""

import torch

from memopt.runtime.kernels import tiles
from memopt.runtime.kernels.language import tl
from memopt.runtime.kernels.launches import kernel
from memopt.runtime.kernels.library import define


@kernel(do_not_specialize=["P", "C", "part_count", "rows"])
def _kernel(moments, mean, variance, P, C, part_count, rows, BT: tl.constexpr):
    c = tl.program_id(0)
    average = 0.0
    squares = 0.0
    count = 0.0
    for start in range(0, part_count, BT):
        part = start + tl.arange(0, BT)
        there = part < part_count
        averages = tl.load(moments + tl.cast(c, tl.int64) * part_count + part, mask=there, other=0.0)
        distances = tl.load(moments + tl.cast(C + c, tl.int64) * part_count + part, mask=there, other=0.0)
        counts = tl.where(there, tl.minimum(P - part * rows, rows), 0).to(tl.float32)
        new = tl.sum(counts, 0)
        new_average = tl.sum(averages * counts, 0) / new
        apart = tl.where(there, averages - new_average, 0.0)
        both = count + new
        new_squares = tl.sum(distances, 0) + tl.sum(apart * apart * counts, 0)
        distance = new_average - average
        average += distance * (new / both)
        squares += new_squares + distance * distance * (count * (new / both))
        count = both
    tl.store(mean + c, average)
    tl.store(variance + c, squares / P)


def launch(moments: torch.Tensor, positions: int, rows: int, mean: torch.Tensor, variance: torch.Tensor) -> None:
    """Run the kernel; the arguments are those of the operator."""
    _, channels, parts = moments.shape
    block = min(1024, tiles.power_of_two(parts))
    _kernel[(channels,)](moments, mean, variance, positions, channels, parts, rows, BT=block, num_warps=4)


def compute(moments: torch.Tensor, positions: int, rows: int, mean: torch.Tensor, variance: torch.Tensor) -> None:
    """The same in plain torch."""
    averages, squares = moments.double().unbind()
    starts = torch.arange(averages.shape[1], device=moments.device) * rows
    counts = (positions - starts).clamp(max=rows).double()
    average = (averages * counts).sum(1) / positions
    total = squares.sum(1) + ((averages - average[:, None]).square() * counts).sum(1)
    mean.copy_(average)
    variance.copy_(total / positions)


merge_moments = define(
    "merge_moments(Tensor moments, int positions, int rows, Tensor(a!) mean, Tensor(b!) variance) -> ()",
    cuda=launch,
    reference=compute,
)
"""moments (2, C, parts) as `moments` and `norm_act_matmul` write it, of `rows` rows each but the last; mean and
variance (C), biased, are written."""
