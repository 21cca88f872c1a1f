"""Sums over positions that a norm's gradient needs; where the norm reads an arena, its data gradient in the same pass.

With d = dz · act'(norm(x)): Σ d and Σ d·(x - mean), in parts. `accumulate`: also gradient += scale · d. The rest of the
norm's data gradient is affine in x for each channel and waits in two numbers (`finish_norm`) until the gradient of the
channel is used (`feature_gradient`), so that all readers of a channel together pass over its gradient once each.
dz may be that of averages over windows (`norm_act_pool`): every position in a window gets an equal share.
"""

import torch

from memopt.runtime.kernels import reference, tiles
from memopt.runtime.kernels.language import activation_gradient, affine_of, tl
from memopt.runtime.kernels.launches import kernel
from memopt.runtime.kernels.library import define


@kernel(do_not_specialize=["P", "part_count", "NT", "W"])
def _kernel(
    dz,
    x,
    mean,
    variance,
    weight,
    bias,
    gradient,
    sums,
    P,
    C,
    READABLE,
    dz_stride,
    x_stride,
    gradient_stride,
    part_count,
    NT,
    W,
    eps,
    parameter,
    ACTIVATION: tl.constexpr,
    WINDOW_HEIGHT: tl.constexpr,
    WINDOW_WIDTH: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    STAGES: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    part = tl.program_id(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = c < C
    centre, scale, shift = affine_of(mean, variance, weight, bias, eps, c, inside)
    # One sum for each row of a tile until the end: threads meet once, not at every tile.
    first = tl.zeros((BP, BC), tl.float32)
    second = tl.zeros((BP, BC), tl.float32)
    for step in tl.range(0, NT, num_stages=STAGES):
        p = (part * NT + step) * BP + tl.arange(0, BP)
        row = p.to(tl.int64)[:, None]
        given = row
        if WINDOW_HEIGHT * WINDOW_WIDTH > 1:
            given = (p // W // WINDOW_HEIGHT * (W // WINDOW_WIDTH) + p % W // WINDOW_WIDTH).to(tl.int64)[:, None]
        there = (p < P)[:, None] & inside[None, :]
        touched = (p < P)[:, None] & (c < READABLE)[None, :]
        distance = tl.load(x + row * x_stride + c[None, :], mask=touched, other=0.0).to(tl.float32) - centre[None, :]
        d = tl.load(dz + given * dz_stride + c[None, :], mask=there, other=0.0).to(tl.float32)
        d *= 1.0 / (WINDOW_HEIGHT * WINDOW_WIDTH)
        d = activation_gradient(distance * scale[None, :] + shift[None, :], d, ACTIVATION, parameter)
        d = tl.where(there, d, 0.0)
        first += d
        second += tl.where(there, d * distance, 0.0)
        if ACCUMULATE:
            place = gradient + row * gradient_stride + c[None, :]
            tl.store(place, tl.load(place, mask=touched, other=0.0) + d * scale[None, :], mask=touched)
    tl.store(sums + c.to(tl.int64) * part_count + part, tl.sum(first, 0), mask=inside)
    tl.store(sums + (C + c).to(tl.int64) * part_count + part, tl.sum(second, 0), mask=inside)


def part_count(positions: int, channels: int) -> int:
    """Parts of the sums."""
    chosen, repeats = tiles.reduction(channels, positions)
    return tiles.cdiv(positions, chosen.positions * repeats)


def launch(
    dz: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    activation: int,
    parameter: float,
    width: int,
    window: list[int],
    sums: torch.Tensor,
    gradient: torch.Tensor | None,
) -> None:
    """Run the kernel; the arguments are those of the operator."""
    positions, channels = x.shape
    chosen, repeats = tiles.reduction(channels, positions)
    parts = part_count(positions, channels)
    _kernel[(parts, tiles.cdiv(channels, chosen.inner))](
        dz,
        x,
        mean,
        variance,
        weight,
        bias,
        gradient,
        sums,
        positions,
        channels,
        tiles.readable(x) if gradient is None else tiles.readable(x, gradient),
        dz.stride(0),
        x.stride(0),
        0 if gradient is None else gradient.stride(0),
        parts,
        repeats,
        width,
        eps,
        parameter,
        ACTIVATION=activation,
        WINDOW_HEIGHT=window[0],
        WINDOW_WIDTH=window[1],
        ACCUMULATE=gradient is not None,
        STAGES=chosen.stages,
        BP=chosen.positions,
        BC=chosen.inner,
        num_warps=chosen.warps,
    )


def compute(
    dz: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    activation: int,
    parameter: float,
    width: int,
    window: list[int],
    sums: torch.Tensor,
    gradient: torch.Tensor | None,
) -> None:
    """The same in plain torch."""
    before = reference.normalised(x, mean, variance, weight, bias, eps)
    given = reference.spread(dz.float(), width, window)
    d = reference.activation_gradient(before, given, activation, parameter)
    chosen, repeats = tiles.reduction(x.shape[1], len(x))
    rows = chosen.positions * repeats
    for kind, values in enumerate((d, d * (x.float() - mean))):
        sums[kind].copy_(torch.stack([part.sum(0) for part in values.split(rows)], 1))
    if gradient is not None:
        gradient += d * (weight.float() * torch.rsqrt(variance + eps))


norm_act_sums = define(
    "norm_act_sums(Tensor dz, Tensor x, Tensor mean, Tensor variance, Tensor weight, Tensor bias, float eps, "
    "int activation, float parameter, int width, int[] window, Tensor(a!) sums, Tensor(b!)? gradient) -> ()",
    cuda=launch,
    reference=compute,
)
"""x (P, C) of images of a width, dz (P / window, C), rows `stride(0)` apart; window: height and width of what was
averaged, [1, 1] if nothing was; mean, variance, weight, bias (C). sums (2, C, part_count) is written; gradient (P, C)
float32 is added to, if given."""
