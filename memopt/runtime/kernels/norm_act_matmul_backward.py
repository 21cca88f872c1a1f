"""Backward of `norm_act_matmul` in one pass over x: recompute, data gradient, both sums, weight gradient.

With dz = dy · matrix and d = dz · act'(norm(x)): gradient += scale · d (see `norm_act_sums` for the rest of the norm's
data gradient), Σ d, Σ d·(x - mean) and dyᵀ · act(norm(x)). Each program keeps its part of the weight gradient in
registers over many tiles of positions; the parts are added in a fixed order afterwards.
"""

import torch

from memopt.runtime.kernels import reference, tiles
from memopt.runtime.kernels.language import activate, activation_gradient, affine_of, as_operand, tl
from memopt.runtime.kernels.launches import kernel
from memopt.runtime.kernels.library import define


@kernel(do_not_specialize=["P", "c_units", "b_units", "dy_units", "part_count", "NT"])
def _kernel(
    dy,
    x,
    mean,
    variance,
    weight,
    bias,
    matrix,
    gradient,
    matrix_parts,
    sums,
    P,
    c_units,
    READABLE,
    b_units,
    dy_units,
    x_stride,
    gradient_stride,
    part_count,
    NT,
    eps,
    parameter,
    UNIT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    ROUNDED: tl.constexpr,
    TURNED: tl.constexpr,
    BY_ROW: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
    BB: tl.constexpr,
):
    C, B, dy_stride = c_units * UNIT, b_units * UNIT, dy_units * UNIT
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    part = tl.program_id(1)
    b = tl.arange(0, BB)
    inside, columns = c < C, b < B
    centre, scale, shift = affine_of(mean, variance, weight, bias, eps, c, inside)
    w = tl.load(matrix + b[:, None] * C + c[None, :], mask=columns[:, None] & inside[None, :], other=0.0)
    w = as_operand(w.to(dy.dtype.element_ty), PRECISION)
    total = tl.zeros((BC, BB) if TURNED else (BB, BC), tl.float32)
    first = tl.zeros((BP, BC) if BY_ROW else (BC,), tl.float32)
    second = tl.zeros((BP, BC) if BY_ROW else (BC,), tl.float32)
    i = tl.arange(0, BP)[:, None]
    x_at, gradient_at = i * x_stride + c[None, :], i * gradient_stride + c[None, :]
    dy_at = i * dy_stride + b[None, :]
    for step in range(0, NT):
        # Offsets of 64 bits are the tile's alone: within it, 32 do.
        start = tl.cast(part * NT + step, tl.int64) * BP
        rows = (part * NT + step) * BP + tl.arange(0, BP) < P
        there = rows[:, None] & inside[None, :]
        touched = rows[:, None] & (c < READABLE)[None, :]
        distance = tl.load(x + start * x_stride + x_at, mask=touched, other=0.0).to(tl.float32) - centre[None, :]
        g = tl.load(dy + start * dy_stride + dy_at, mask=rows[:, None] & columns[None, :], other=0.0)
        if not ROUNDED:
            g = as_operand(g, PRECISION)
        place = gradient + start * gradient_stride + gradient_at
        before = tl.load(place, mask=touched, other=0.0)
        normalised = distance * scale[None, :] + shift[None, :]
        d = tl.dot(g, w, input_precision=PRECISION)
        d = tl.where(there, activation_gradient(normalised, d, ACTIVATION, parameter), 0.0)
        tl.store(place, before + d * scale[None, :], mask=touched)
        activated = tl.where(there, activate(normalised, ACTIVATION, parameter), 0.0)
        activated = as_operand(activated.to(dy.dtype.element_ty), PRECISION)
        if TURNED:
            total = tl.dot(tl.trans(activated), g, total, input_precision=PRECISION)
        else:
            total = tl.dot(tl.trans(g), activated, total, input_precision=PRECISION)
        with_distance = tl.where(there, d * distance, 0.0)
        first += d if BY_ROW else tl.sum(d, 0)
        second += with_distance if BY_ROW else tl.sum(with_distance, 0)
    if BY_ROW:
        first, second = tl.sum(first, 0), tl.sum(second, 0)
    parts = matrix_parts + tl.cast(part, tl.int64) * B * C
    if TURNED:
        total = tl.trans(total)
    tl.store(parts + b[:, None] * C + c[None, :], total, mask=columns[:, None] & inside[None, :])
    tl.store(sums + c.to(tl.int64) * part_count + part, first, mask=inside)
    tl.store(sums + (C + c).to(tl.int64) * part_count + part, second, mask=inside)


def _split(positions: int, channels: int, out_channels: int, item_bytes: int) -> tuple[tiles.Tiles, int, int]:
    """Tiles, how many of them a program takes, and how many programs share the positions.

    Depends on the shape alone, so that the order of the sums does.
    """
    chosen = tiles.matmul_backward(channels, out_channels, item_bytes)
    rows = tiles.cdiv(positions, chosen.positions)
    repeats = tiles.cdiv(rows, max(1, tiles.cdiv(chosen.programs, tiles.cdiv(channels, chosen.inner))))
    return chosen, repeats, tiles.cdiv(rows, repeats)


def part_count(positions: int, channels: int, out_channels: int, item_bytes: int) -> int:
    """Parts of the sums and of the weight gradient."""
    return _split(positions, channels, out_channels, item_bytes)[2]


def launch(
    dy: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    activation: int,
    parameter: float,
    matrix: torch.Tensor,
    allow_tf32: bool,
    rounded: bool,
    gradient: torch.Tensor,
    matrix_parts: torch.Tensor,
    sums: torch.Tensor,
) -> None:
    """Run the kernel; the arguments are those of the operator."""
    positions, channels = x.shape
    out_channels = len(matrix)
    chosen, repeats, parts = _split(positions, channels, out_channels, dy.element_size())
    unit = tiles.unit(channels, out_channels, dy.stride(0))
    # Without tensor cores a thread holds whole rows of its operands: fewer of them at a time, in the same parts.
    exact = dy.dtype == torch.float32 and not allow_tf32
    slices = max(1, chosen.positions * chosen.outer // 2048) if exact else 1
    if not exact:
        chosen = tiles.for_device(chosen, dy.device)
    # On sm_90 so few channels first keep Triton from the instructions that need float32 transposed in shared memory.
    turned = not exact and tiles.capability(dy.device)[0] == 9
    _kernel[(tiles.cdiv(channels, chosen.inner), parts)](
        dy,
        x,
        mean,
        variance,
        weight,
        bias,
        matrix,
        gradient,
        matrix_parts,
        sums,
        positions,
        channels // unit,
        tiles.readable(x, gradient),
        out_channels // unit,
        dy.stride(0) // unit,
        x.stride(0),
        gradient.stride(0),
        parts,
        repeats * slices,
        eps,
        parameter,
        UNIT=unit,
        ACTIVATION=activation,
        PRECISION="tf32" if allow_tf32 else "ieee",
        ROUNDED=rounded,
        TURNED=turned,
        BY_ROW=chosen.sums_by_row,
        BP=chosen.positions // slices,
        BC=chosen.inner,
        BB=chosen.outer,
        num_warps=chosen.warps,
        num_stages=chosen.stages,
    )


def compute(
    dy: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    activation: int,
    parameter: float,
    matrix: torch.Tensor,
    allow_tf32: bool,
    rounded: bool,
    gradient: torch.Tensor,
    matrix_parts: torch.Tensor,
    sums: torch.Tensor,
) -> None:
    """The same in plain torch."""
    before = reference.normalised(x, mean, variance, weight, bias, eps)
    activated = reference.as_operand(reference.activate(before, activation, parameter).to(dy.dtype), allow_tf32)
    g = reference.as_operand(dy, allow_tf32)
    dz = g @ reference.as_operand(matrix.to(dy.dtype), allow_tf32)
    d = reference.activation_gradient(before, dz, activation, parameter)
    gradient += d * (weight.float() * torch.rsqrt(variance + eps))
    chosen, repeats, _ = _split(len(x), x.shape[1], len(matrix), dy.element_size())
    rows = chosen.positions * repeats
    for kind, values in enumerate((d, d * (x.float() - mean))):
        sums[kind].copy_(torch.stack([part.sum(0) for part in values.split(rows)], 1))
    pairs = zip(g.split(rows), activated.split(rows), strict=True)
    matrix_parts.copy_(torch.stack([left.t() @ right for left, right in pairs]))


norm_act_matmul_backward = define(
    "norm_act_matmul_backward(Tensor dy, Tensor x, Tensor mean, Tensor variance, Tensor weight, Tensor bias, "
    "float eps, int activation, float parameter, Tensor matrix, bool allow_tf32, bool rounded, Tensor(a!) gradient, "
    "Tensor(b!) matrix_parts, Tensor(c!) sums) -> ()",
    cuda=launch,
    reference=compute,
)
"""dy (P, B), `rounded` if that was done to it already, and x (P, C), rows `stride(0)` apart; mean, variance, weight,
bias (C); matrix (B, C), B at most `memopt.ir.MAX_MATMUL_CHANNELS`. gradient (P, C) float32 is added to; matrix_parts
(parts, B, C) and sums (2, C, parts), float32, are written, parts being `part_count`."""
