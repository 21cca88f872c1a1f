"""y = act(norm(x)) · matrixᵀ + matrix_bias: norm, activation and 1×1 convolution without storing what lies between.

The channels are normalised as they are loaded. The moments of y, which the next norm needs, leave from the same
accumulators: one partial result for each tile of positions, merged by `merge_moments`.
"""

import torch

from memopt.runtime.kernels import reference, tiles
from memopt.runtime.kernels.language import activate, affine_of, as_operand, tl
from memopt.runtime.kernels.launches import kernel
from memopt.runtime.kernels.library import define
from memopt.runtime.kernels.moments import partial_moments


@kernel(do_not_specialize=["P", "c_units", "b_units", "y_units", "tile_count"])
def _kernel(
    x,
    mean,
    variance,
    weight,
    bias,
    matrix,
    matrix_bias,
    y,
    moments,
    P,
    c_units,
    READABLE,
    b_units,
    x_stride,
    y_units,
    tile_count,
    eps,
    parameter,
    UNIT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    MOMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
    BB: tl.constexpr,
):
    C, B, y_stride = c_units * UNIT, b_units * UNIT, y_units * UNIT
    tile = tl.program_id(0)
    p = tile * BP + tl.arange(0, BP)
    b = tl.program_id(1) * BB + tl.arange(0, BB)
    rows, columns = p < P, b < B
    # Offsets of 64 bits are the tile's alone: within it, 32 do.
    x += tl.cast(tile, tl.int64) * BP * x_stride
    y += tl.cast(tile, tl.int64) * BP * y_stride
    i = tl.arange(0, BP)[:, None]
    total = tl.zeros((BP, BB), tl.float32)
    for start in range(0, C, BC):
        c = start + tl.arange(0, BC)
        inside = c < C
        centre, scale, shift = affine_of(mean, variance, weight, bias, eps, c, inside)
        value = tl.load(x + (i * x_stride + c[None, :]), mask=rows[:, None] & (c < READABLE)[None, :], other=0.0)
        value = (value.to(tl.float32) - centre[None, :]) * scale[None, :] + shift[None, :]
        value = tl.where(inside[None, :], activate(value, ACTIVATION, parameter), 0.0)
        taken = tl.load(matrix + b[None, :] * C + c[:, None], mask=columns[None, :] & inside[:, None], other=0.0)
        value = as_operand(value.to(y.dtype.element_ty), PRECISION)
        taken = as_operand(taken.to(y.dtype.element_ty), PRECISION)
        total = tl.dot(value, taken, total, input_precision=PRECISION)
    if HAS_BIAS:
        total += tl.load(matrix_bias + b, mask=columns, other=0.0).to(tl.float32)[None, :]
    result = total.to(y.dtype.element_ty)
    there = rows[:, None] & columns[None, :]
    tl.store(y + (i * y_stride + b[None, :]), result, mask=there)
    if MOMENTS:
        seen = tl.where(there, result.to(tl.float32), 0.0)
        count = tl.minimum(P - tile * BP, BP)
        average = tl.sum(seen, 0) / count
        distance = tl.where(there, seen - average[None, :], 0.0)
        tl.store(moments + b.to(tl.int64) * tile_count + tile, average, mask=columns)
        tl.store(moments + (B + b).to(tl.int64) * tile_count + tile, tl.sum(distance * distance, 0), mask=columns)


def part_rows(channels: int, out_channels: int, item_bytes: int) -> int:
    """Rows of one partial result of the moments."""
    return tiles.matmul_forward(channels, out_channels, item_bytes).positions


def launch(
    x: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    activation: int,
    parameter: float,
    matrix: torch.Tensor,
    matrix_bias: torch.Tensor | None,
    allow_tf32: bool,
    y: torch.Tensor,
    moments: torch.Tensor | None,
) -> None:
    """Run the kernel; the arguments are those of the operator."""
    positions, channels = x.shape
    out_channels = len(matrix)
    chosen = tiles.matmul_forward(channels, out_channels, y.element_size())
    if y.dtype != torch.float32 or allow_tf32:
        chosen = tiles.for_device(chosen, y.device)
    unit = tiles.unit(channels, out_channels, y.stride(0))
    row_tiles = tiles.cdiv(positions, chosen.positions)
    _kernel[(row_tiles, tiles.cdiv(out_channels, chosen.outer))](
        x,
        mean,
        variance,
        weight,
        bias,
        matrix,
        matrix_bias,
        y,
        moments,
        positions,
        channels // unit,
        tiles.readable(x),
        out_channels // unit,
        x.stride(0),
        y.stride(0) // unit,
        row_tiles,
        eps,
        parameter,
        UNIT=unit,
        ACTIVATION=activation,
        HAS_BIAS=matrix_bias is not None,
        MOMENTS=moments is not None,
        PRECISION="tf32" if allow_tf32 else "ieee",
        BP=chosen.positions,
        BC=chosen.inner,
        BB=chosen.outer,
        num_warps=chosen.warps,
        num_stages=chosen.stages,
    )


def compute(
    x: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    activation: int,
    parameter: float,
    matrix: torch.Tensor,
    matrix_bias: torch.Tensor | None,
    allow_tf32: bool,
    y: torch.Tensor,
    moments: torch.Tensor | None,
) -> None:
    """The same in plain torch."""
    value = reference.activate(reference.normalised(x, mean, variance, weight, bias, eps), activation, parameter)
    total = (
        reference.as_operand(value.to(y.dtype), allow_tf32) @ reference.as_operand(matrix.to(y.dtype), allow_tf32).t()
    )
    if matrix_bias is not None:
        total += matrix_bias.float()
    y.copy_(total)
    if moments is not None:
        moments.copy_(partial_moments(y, part_rows(x.shape[1], len(matrix), y.element_size())))


norm_act_matmul = define(
    "norm_act_matmul(Tensor x, Tensor mean, Tensor variance, Tensor weight, Tensor bias, float eps, int activation, "
    "float parameter, Tensor matrix, Tensor? matrix_bias, bool allow_tf32, Tensor(a!) y, Tensor(b!)? moments) -> ()",
    cuda=launch,
    reference=compute,
)
"""x (P, C), rows `x.stride(0)` apart; mean, variance, weight, bias (C); matrix (B, C); matrix_bias (B) or None; y
(P, B) and moments (2, B, ⌈P / part_rows⌉) are written: each tile's mean and sum of squared distances from it."""
