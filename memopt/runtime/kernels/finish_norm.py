"""What is left of a norm's backward after its pass over the positions: all its partial sums, in a fixed order.

The norm's own gradients; what its data gradient still lacks; the weight gradient of the convolution behind the norm.

dx = scale·d - scale·Σd/P - scale·invstd²·(x - mean)·Σ(d·(x - mean))/P for a norm with batch statistics. The first term
was written; per channel, the second belongs to `constant` and the factor of (x - mean) to `slope`.
"""

import torch

from memopt.runtime.kernels import tiles
from memopt.runtime.kernels.language import tl, triton
from memopt.runtime.kernels.launches import kernel
from memopt.runtime.kernels.library import define
from memopt.runtime.kernels.pack_taps import outer

_INTEGERS = ["P", "C", "part_count", "weight_count", "weight_tiles", "K"]
_STRIDES = ["k_stride", "c_stride", "row_stride", "column_stride"]


@triton.jit
def _total(parts, first, COUNT, distance, there, BT: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of `COUNT` vectors of BLOCK numbers that begin at `first`, `distance` apart."""
    total = tl.zeros((BT, BLOCK), tl.float32)
    for start in range(0, COUNT, BT):
        part = start + tl.arange(0, BT)
        place = parts + part.to(tl.int64)[:, None] * distance + first[None, :]
        total += tl.load(place, mask=(part < COUNT)[:, None] & there[None, :], other=0.0)
    return tl.sum(total, 0)


@kernel(do_not_specialize=_INTEGERS + _STRIDES)
def _kernel(
    sums,
    variance,
    weight,
    constant,
    slope,
    weight_gradient,
    bias_gradient,
    parts,
    gradient,
    P,
    C,
    part_count,
    eps,
    weight_count,
    weight_tiles,
    SIZE,
    K,
    k_stride,
    c_stride,
    row_stride,
    column_stride,
    DEFER: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    WEIGHT: tl.constexpr,
    TAPS: tl.constexpr,
    BT: tl.constexpr,
    COLUMNS: tl.constexpr,
    BK: tl.constexpr,
    BW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    if program < weight_tiles:
        if WEIGHT:
            at = program * BLOCK + tl.arange(0, BLOCK)
            total = _total(parts, at, weight_count, SIZE, at < SIZE, BW, BLOCK)
            c = at % C
            k = at // C
            place = gradient + c * c_stride
            wanted = at < SIZE
            if TAPS:
                column = k // BK % COLUMNS
                place += k // BK // COLUMNS * row_stride + column * column_stride
                k = k % BK
                wanted = wanted & (k < K) & (column < 3)
            tl.store(place + k * k_stride, total.to(gradient.dtype.element_ty), mask=wanted)
    else:
        channel = program - weight_tiles
        own = tl.cast(channel, tl.int64) * part_count
        first = 0.0
        second = 0.0
        for start in range(0, part_count, BT):
            part = start + tl.arange(0, BT)
            there = part < part_count
            first += tl.sum(tl.load(sums + own + part, mask=there, other=0.0), 0)
            second += tl.sum(tl.load(sums + tl.cast(C, tl.int64) * part_count + own + part, mask=there, other=0.0), 0)
        invstd = tl.rsqrt(tl.load(variance + channel) + eps)
        tl.store(bias_gradient + channel, first)
        tl.store(weight_gradient + channel, second * invstd)
        if DEFER:
            scale = tl.load(weight + channel).to(tl.float32) * invstd
            level = scale * (first / P)
            steepness = scale * invstd * invstd * (second / P)
            if ACCUMULATE:
                level += tl.load(constant + channel)
                steepness += tl.load(slope + channel)
            tl.store(constant + channel, level)
            tl.store(slope + channel, steepness)


def launch(
    sums: torch.Tensor,
    variance: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    positions: int,
    accumulate: bool,
    weight_gradient: torch.Tensor,
    bias_gradient: torch.Tensor,
    constant: torch.Tensor | None,
    slope: torch.Tensor | None,
    parts: torch.Tensor | None,
    gradient: torch.Tensor | None,
) -> None:
    """Run the kernel; the arguments are those of the operator."""
    _, channels, count = sums.shape
    rows = 1 if gradient is None else outer(len(gradient))
    columns = parts.shape[2] // rows if parts is not None and parts.dim() == 4 else 0
    size = 0 if parts is None or gradient is None else parts.numel() // len(parts)
    strides = (0, 0, 0) if gradient is None else gradient.stride()
    chosen = tiles.partial_sums()
    weight_tiles = tiles.cdiv(size, chosen.inner)
    _kernel[(weight_tiles + channels,)](
        sums,
        variance,
        weight,
        constant,
        slope,
        weight_gradient,
        bias_gradient,
        parts,
        gradient,
        positions,
        channels,
        count,
        eps,
        0 if parts is None else len(parts),
        weight_tiles,
        size,
        0 if gradient is None else len(gradient),
        strides[0],
        strides[1],
        strides[2] if len(strides) == 4 else 0,
        strides[-1],
        DEFER=constant is not None,
        ACCUMULATE=accumulate,
        WEIGHT=size > 0,
        TAPS=columns > 0,
        BT=1024,
        COLUMNS=columns,
        BK=rows,
        BW=chosen.positions,
        BLOCK=chosen.inner,
        num_warps=chosen.warps,
    )


def compute(
    sums: torch.Tensor,
    variance: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    positions: int,
    accumulate: bool,
    weight_gradient: torch.Tensor,
    bias_gradient: torch.Tensor,
    constant: torch.Tensor | None,
    slope: torch.Tensor | None,
    parts: torch.Tensor | None,
    gradient: torch.Tensor | None,
) -> None:
    """The same in plain torch."""
    first, second = sums.sum(2)
    invstd = torch.rsqrt(variance + eps)
    bias_gradient.copy_(first)
    weight_gradient.copy_(second * invstd)
    if constant is not None and slope is not None:
        scale = weight.float() * invstd
        if not accumulate:
            constant.zero_()
            slope.zero_()
        constant += scale * (first / positions)
        slope += scale * invstd * invstd * (second / positions)
    if parts is not None and gradient is not None:
        total = parts.sum(0)
        if parts.dim() == 4:
            total = total.unflatten(1, (-1, outer(len(gradient))))[:, :3, : len(gradient)].permute(2, 3, 0, 1)
        gradient.copy_(total.reshape(gradient.shape))


finish_norm = define(
    "finish_norm(Tensor sums, Tensor variance, Tensor weight, float eps, int positions, bool accumulate, "
    "Tensor(a!) weight_gradient, Tensor(b!) bias_gradient, Tensor(c!)? constant, Tensor(d!)? slope, Tensor? parts, "
    "Tensor(e!)? gradient) -> ()",
    cuda=launch,
    reference=compute,
)
"""sums (2, C, parts): Σ d and Σ d·(x - mean); variance, weight (C). weight_gradient and bias_gradient (C) are written;
constant and slope (C) are written or, with `accumulate`, added to, if given (not for a norm with running statistics).
gradient is written, if given, of any layout: (B, C, 1 …) from `parts` (count, B, C), as `norm_act_matmul_backward`
writes them, or (K, C, 3, 3) or (K, C, 3) from (count, R, 4 · K', C) of `norm_act_conv_backward` or
(count, R, 3 · K', C) of `norm_act_conv_weight`."""
