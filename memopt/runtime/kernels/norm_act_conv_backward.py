"""Backward of `norm_act_conv` in one pass over x: recompute, data gradient, both sums, weight gradient.

dz, the gradient of act(norm(x)), is a convolution of g with the taps turned round: for each row of the window one
matmul of g at three columns, gathered side by side. The weight gradient contracts the same gathered tile over the
positions. With d = dz · act'(norm(x)): either d is stored, for a norm that alone reads x (`norm_act_backward`), or
gradient += scale · d, for one that reads an arena (`norm_act_sums`).
"""

import torch
import torch.nn.functional as F

from memopt.runtime.kernels import reference, tiles
from memopt.runtime.kernels.language import activate, activation_gradient, affine_of, as_operand, tl
from memopt.runtime.kernels.launches import kernel
from memopt.runtime.kernels.library import define
from memopt.runtime.kernels.pack_taps import COLUMNS, unpacked


@kernel(do_not_specialize=["P", "k_units", "H", "W", "g_units", "part_count", "NT"])
def _kernel(
    g,
    x,
    mean,
    variance,
    weight,
    bias,
    taps,
    result,
    parts,
    sums,
    P,
    C,
    READABLE,
    k_units,
    H,
    W,
    g_units,
    x_stride,
    result_stride,
    CP,
    part_count,
    NT,
    eps,
    parameter,
    UNIT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROUNDED: tl.constexpr,
    WINDOW: tl.constexpr,
    BY_ROW: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    BJ: tl.constexpr,
):
    K, g_stride = k_units * UNIT, g_units * UNIT
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    part = tl.program_id(1)
    j = tl.arange(0, BJ)
    k = j % BK
    across = j // BK - 1
    inside, taken = c < C, (j < 3 * BK) & (k < K)
    centre, scale, shift = affine_of(mean, variance, weight, bias, eps, c, inside)
    above = tl.zeros((BC, BJ), tl.float32)
    level = tl.zeros((BC, BJ), tl.float32)
    below = tl.zeros((BC, BJ), tl.float32)
    first = tl.zeros((BP, BC) if BY_ROW else (BC,), tl.float32)
    second = tl.zeros((BP, BC) if BY_ROW else (BC,), tl.float32)
    i = tl.arange(0, BP)
    for step in range(0, NT):
        # Offsets of 64 bits are the tile's alone: within it, 32 do.
        start = tl.cast(part * NT + step, tl.int64) * BP
        p = (part * NT + step) * BP + i
        column = p % W
        row = p // W % H
        there = (p < P)[:, None] & inside[None, :]
        touched = (p < P)[:, None] & (c < READABLE)[None, :]
        distance = tl.load(x + start * x_stride + (i[:, None] * x_stride + c[None, :]), mask=touched, other=0.0).to(
            tl.float32
        )
        distance -= centre[None, :]
        normalised = distance * scale[None, :] + shift[None, :]
        activated = tl.where(there, activate(normalised, ACTIVATION, parameter), 0.0)
        activated = as_operand(activated.to(taps.dtype.element_ty), PRECISION)
        dz = tl.zeros((BP, BC), tl.float32)
        for window in tl.static_range(WINDOW):
            # What a position gives to the one `down` rows and `across` columns before it.
            down = window - WINDOW // 2
            reached = (column[:, None] >= across[None, :]) & (column[:, None] - across[None, :] < W)
            reached = reached & ((p < P) & (row >= down) & (row - down < H))[:, None] & taken[None, :]
            place = g + start * g_stride + ((i[:, None] - down * W - across[None, :]) * g_stride + k[None, :])
            gathered = tl.load(place, mask=reached, other=0.0)
            if not ROUNDED:
                gathered = as_operand(gathered, PRECISION)
            matrix = tl.load(taps + window * CP * (4 * BK) + c[None, :] * (4 * BK) + j[:, None])
            dz = tl.dot(gathered, matrix, dz, input_precision=PRECISION)
            if down < 0:
                above = tl.dot(tl.trans(activated), gathered, above, input_precision=PRECISION)
            elif down == 0:
                level = tl.dot(tl.trans(activated), gathered, level, input_precision=PRECISION)
            else:
                below = tl.dot(tl.trans(activated), gathered, below, input_precision=PRECISION)
        d = tl.where(there, activation_gradient(normalised, dz, ACTIVATION, parameter), 0.0)
        place = result + start * result_stride + (i[:, None] * result_stride + c[None, :])
        if ACCUMULATE:
            tl.store(place, tl.load(place, mask=touched, other=0.0) + d * scale[None, :], mask=touched)
        else:
            tl.store(place, d.to(result.dtype.element_ty), mask=there)
        with_distance = tl.where(there, d * distance, 0.0)
        first += d if BY_ROW else tl.sum(d, 0)
        second += with_distance if BY_ROW else tl.sum(with_distance, 0)
    if BY_ROW:
        first, second = tl.sum(first, 0), tl.sum(second, 0)
    own = parts + tl.cast(part, tl.int64) * (WINDOW * BJ) * C + j[:, None] * C + c[None, :]
    if WINDOW == 3:
        tl.store(own, tl.trans(above), mask=inside[None, :])
        tl.store(own + BJ * C, tl.trans(level), mask=inside[None, :])
        tl.store(own + 2 * BJ * C, tl.trans(below), mask=inside[None, :])
    else:
        tl.store(own, tl.trans(level), mask=inside[None, :])
    tl.store(sums + c.to(tl.int64) * part_count + part, first, mask=inside)
    tl.store(sums + (C + c).to(tl.int64) * part_count + part, second, mask=inside)


def _split(positions: int, channels: int, item_bytes: int) -> tuple[tiles.Tiles, int, int]:
    """Tiles, how many of them a program takes, and how many programs share the positions."""
    chosen = tiles.conv_backward(channels, item_bytes)
    rows = tiles.cdiv(positions, chosen.positions)
    repeats = tiles.cdiv(rows, max(1, tiles.cdiv(chosen.programs, tiles.cdiv(channels, chosen.inner))))
    return chosen, repeats, tiles.cdiv(rows, repeats)


def part_count(positions: int, channels: int, item_bytes: int) -> int:
    """Parts of the sums and of the weight gradient."""
    return _split(positions, channels, item_bytes)[2]


def launch(
    g: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    activation: int,
    parameter: float,
    taps: torch.Tensor,
    height: int,
    width: int,
    allow_tf32: bool,
    rounded: bool,
    accumulate: bool,
    result: torch.Tensor,
    parts: torch.Tensor,
    sums: torch.Tensor,
) -> None:
    """Run the kernel; the arguments are those of the operator."""
    positions, channels = x.shape
    chosen, repeats, count = _split(positions, channels, taps.element_size())
    chosen = tiles.for_device(chosen, g.device)
    unit = tiles.unit(g.shape[1], g.stride(0))
    _kernel[(tiles.cdiv(channels, chosen.inner), count)](
        g,
        x,
        mean,
        variance,
        weight,
        bias,
        taps,
        result,
        parts,
        sums,
        positions,
        channels,
        tiles.readable(x, result) if accumulate else tiles.readable(x),
        g.shape[1] // unit,
        height,
        width,
        g.stride(0) // unit,
        x.stride(0),
        result.stride(0),
        taps.shape[1],
        count,
        repeats,
        eps,
        parameter,
        UNIT=unit,
        ACTIVATION=activation,
        ACCUMULATE=accumulate,
        PRECISION="tf32" if allow_tf32 else "ieee",
        ROUNDED=rounded,
        WINDOW=len(taps),
        BY_ROW=chosen.sums_by_row,
        BP=chosen.positions,
        BC=chosen.inner,
        BK=taps.shape[2] // COLUMNS,
        BJ=taps.shape[2],
        num_warps=chosen.warps,
        num_stages=chosen.stages,
    )


def compute(
    g: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    activation: int,
    parameter: float,
    taps: torch.Tensor,
    height: int,
    width: int,
    allow_tf32: bool,
    rounded: bool,
    accumulate: bool,
    result: torch.Tensor,
    parts: torch.Tensor,
    sums: torch.Tensor,
) -> None:
    """The same in plain torch."""
    channels, out_channels, window = x.shape[1], g.shape[1], len(taps)
    before = reference.normalised(x, mean, variance, weight, bias, eps)
    activated = reference.as_operand(reference.activate(before, activation, parameter).to(taps.dtype), allow_tf32)
    given = reference.as_operand(g, allow_tf32).view(-1, height, width, out_channels).movedim(3, 1)
    matrix = unpacked(taps, channels, out_channels).float()
    dz = F.conv_transpose2d(given, matrix, padding=(window // 2, 1)).movedim(1, 3).reshape(x.shape)
    d = reference.activation_gradient(before, dz, activation, parameter)
    if accumulate:
        result += d * (weight.float() * torch.rsqrt(variance + eps))
    else:
        result.copy_(d)
    chosen, repeats, _ = _split(len(x), channels, taps.element_size())
    rows = chosen.positions * repeats
    for kind, values in enumerate((d, d * (x.float() - mean))):
        sums[kind].copy_(torch.stack([part.sum(0) for part in values.split(rows)], 1))
    padded = F.pad(given, (1, 1, window // 2, window // 2))
    parts.zero_()
    split = parts.unflatten(2, (COLUMNS, -1))
    for row in range(window):
        for column in range(3):
            y, x_ = window - 1 - row, 2 - column
            shifted = padded[:, :, y : y + height, x_ : x_ + width].movedim(1, 3).reshape(-1, out_channels)
            pairs = zip(shifted.split(rows), activated.split(rows), strict=True)
            split[:, row, column, :out_channels] = torch.stack([a.t() @ b for a, b in pairs])


norm_act_conv_backward = define(
    "norm_act_conv_backward(Tensor g, Tensor x, Tensor mean, Tensor variance, Tensor weight, Tensor bias, float eps, "
    "int activation, float parameter, Tensor taps, int height, int width, bool allow_tf32, bool rounded, "
    "bool accumulate, Tensor(a!) result, Tensor(b!) parts, Tensor(c!) sums) -> ()",
    cuda=launch,
    reference=compute,
)
"""g (P, K), `rounded` if that was done to it already, and x (P, C), rows `stride(0)` apart, of images of
height × width; mean, variance, weight, bias (C); taps as `pack_taps` writes them. result (P, C) is d, or float32 and
added to with `accumulate`; parts (part_count, R, 4 · K', C) and sums (2, C, part_count) are written."""
