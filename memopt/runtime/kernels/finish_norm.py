"""A norm's parameter gradients from its partial sums, in a fixed order, and what its data gradient still lacks.

dx = scale·d - scale·Σd/P - scale·invstd²·(x - mean)·Σ(d·(x - mean))/P for a norm with batch statistics. The first term
was written; per channel, the second is added to `constant` and the factor of (x - mean) to `slope`.
"""

import torch

from memopt.runtime.kernels import tiles
from memopt.runtime.kernels.language import tl
from memopt.runtime.kernels.launches import kernel
from memopt.runtime.kernels.library import define


@kernel(do_not_specialize=["P", "C", "part_count"])
def _kernel(
    sums,
    variance,
    weight,
    constant,
    slope,
    weight_gradient,
    bias_gradient,
    P,
    C,
    part_count,
    eps,
    DEFER: tl.constexpr,
    BT: tl.constexpr,
):
    c = tl.program_id(0)
    first = 0.0
    second = 0.0
    for start in range(0, part_count, BT):
        part = start + tl.arange(0, BT)
        there = part < part_count
        first += tl.sum(tl.load(sums + tl.cast(c, tl.int64) * part_count + part, mask=there, other=0.0), 0)
        second += tl.sum(tl.load(sums + tl.cast(C + c, tl.int64) * part_count + part, mask=there, other=0.0), 0)
    invstd = tl.rsqrt(tl.load(variance + c) + eps)
    tl.store(bias_gradient + c, first)
    tl.store(weight_gradient + c, second * invstd)
    if DEFER:
        scale = tl.load(weight + c).to(tl.float32) * invstd
        tl.store(constant + c, tl.load(constant + c) + scale * (first / P))
        tl.store(slope + c, tl.load(slope + c) + scale * invstd * invstd * (second / P))


def launch(
    sums: torch.Tensor,
    variance: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    positions: int,
    weight_gradient: torch.Tensor,
    bias_gradient: torch.Tensor,
    constant: torch.Tensor | None,
    slope: torch.Tensor | None,
) -> None:
    """Run the kernel; the arguments are those of the operator."""
    _, channels, parts = sums.shape
    _kernel[(channels,)](
        sums,
        variance,
        weight,
        constant,
        slope,
        weight_gradient,
        bias_gradient,
        positions,
        channels,
        parts,
        eps,
        DEFER=constant is not None,
        BT=min(1024, tiles.power_of_two(parts)),
        num_warps=4,
    )


def compute(
    sums: torch.Tensor,
    variance: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    positions: int,
    weight_gradient: torch.Tensor,
    bias_gradient: torch.Tensor,
    constant: torch.Tensor | None,
    slope: torch.Tensor | None,
) -> None:
    """The same in plain torch."""
    first, second = sums.sum(2)
    invstd = torch.rsqrt(variance + eps)
    bias_gradient.copy_(first)
    weight_gradient.copy_(second * invstd)
    if constant is not None and slope is not None:
        scale = weight.float() * invstd
        constant += scale * (first / positions)
        slope += scale * invstd * invstd * (second / positions)


finish_norm = define(
    "finish_norm(Tensor sums, Tensor variance, Tensor weight, float eps, int positions, Tensor(a!) weight_gradient, "
    "Tensor(b!) bias_gradient, Tensor(c!)? constant, Tensor(d!)? slope) -> ()",
    cuda=launch,
    reference=compute,
)
"""sums (2, C, parts): Σ d and Σ d·(x - mean); variance, weight (C). The gradients (C) are written; constant and slope
(C) are added to, if given (not for a norm with running statistics)."""
