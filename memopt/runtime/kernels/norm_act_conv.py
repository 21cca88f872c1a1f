"""y = conv(act(norm(x))) for a window of 3 × 3 in an image or 3 in a signal, zero-padded: nothing stored in between.

Positions lie row after row, so a column to the left or right is a neighbour in the tile: each shifted row is loaded
once, multiplied for the three columns, and the results, not the inputs, are shifted. A tile is a whole number of image
rows, where no column reaches beyond, or overlaps its neighbours by a position on each side.
"""

import torch
import torch.nn.functional as F

from memopt.runtime.kernels import reference, tiles
from memopt.runtime.kernels.language import activate, affine_of, as_operand, tl
from memopt.runtime.kernels.launches import kernel
from memopt.runtime.kernels.library import define
from memopt.runtime.kernels.moments import partial_moments
from memopt.runtime.kernels.pack_taps import COLUMNS, unpacked


@kernel(do_not_specialize=["P", "H", "W", "STEP", "k_units", "tile_count"])
def _kernel(
    x,
    mean,
    variance,
    weight,
    bias,
    taps,
    taps_bias,
    y,
    moments,
    P,
    C,
    READABLE,
    k_units,
    H,
    W,
    STEP,
    x_stride,
    y_stride,
    taps_stride,
    tile_count,
    eps,
    parameter,
    UNIT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    MOMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
    WINDOW: tl.constexpr,
    LEAD: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    K = k_units * UNIT
    tile = tl.program_id(0)
    i = tl.arange(0, BP)
    # Offsets of 64 bits are the tile's alone: within it, 32 do.
    p = tile * STEP - LEAD + i
    x += (tl.cast(tile, tl.int64) * STEP - LEAD) * x_stride
    y += (tl.cast(tile, tl.int64) * STEP - LEAD) * y_stride
    column = tl.maximum(p, 0) % W
    row = tl.maximum(p, 0) // W % H
    k = tl.arange(0, BK)
    left = tl.zeros((BP, BK), tl.float32)
    middle = tl.zeros((BP, BK), tl.float32)
    right = tl.zeros((BP, BK), tl.float32)
    for start in range(0, C, BC):
        c = start + tl.arange(0, BC)
        inside = c < C
        centre, scale, shift = affine_of(mean, variance, weight, bias, eps, c, inside)
        for window in tl.static_range(WINDOW):
            down = window - WINDOW // 2
            there = (p >= 0) & (p < P) & (row + down >= 0) & (row + down < H)
            place = x + ((i + down * W)[:, None] * x_stride + c[None, :])
            value = tl.load(place, mask=there[:, None] & (c < READABLE)[None, :], other=0.0).to(tl.float32)
            value = activate((value - centre[None, :]) * scale[None, :] + shift[None, :], ACTIVATION, parameter)
            value = tl.where(there[:, None] & inside[None, :], value, 0.0)
            value = as_operand(value.to(taps.dtype.element_ty), PRECISION)
            matrix = taps + window * taps_stride + c[:, None] * (4 * BK) + k[None, :]
            left = tl.dot(value, tl.load(matrix), left, input_precision=PRECISION)
            middle = tl.dot(value, tl.load(matrix + BK), middle, input_precision=PRECISION)
            right = tl.dot(value, tl.load(matrix + 2 * BK), right, input_precision=PRECISION)
    before = tl.broadcast_to(tl.maximum(i - 1, 0)[:, None], (BP, BK))
    after = tl.broadcast_to(tl.minimum(i + 1, BP - 1)[:, None], (BP, BK))
    total = middle + tl.where((column > 0)[:, None], tl.gather(left, before, 0), 0.0)
    total += tl.where((column < W - 1)[:, None], tl.gather(right, after, 0), 0.0)
    if HAS_BIAS:
        total += tl.load(taps_bias + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
    made = ((i >= LEAD) & (i < LEAD + STEP) & (p < P))[:, None] & (k < K)[None, :]
    result = total.to(y.dtype.element_ty)
    tl.store(y + (i[:, None] * y_stride + k[None, :]), result, mask=made)
    if MOMENTS:
        seen = tl.where(made, result.to(tl.float32), 0.0)
        count = tl.minimum(P - tile * STEP, STEP).to(tl.float32)
        average = tl.sum(seen, 0) / count
        distance = tl.where(made, seen - average[None, :], 0.0)
        part = k.to(tl.int64) * tile_count + tile
        tl.store(moments + part, average, mask=k < K)
        tl.store(moments + tl.cast(K, tl.int64) * tile_count + part, tl.sum(distance * distance, 0), mask=k < K)


def _tile(width: int, channels: int, item_bytes: int, allow_tf32: bool) -> tuple[tiles.Tiles, int, int]:
    """Tiles, how many positions each makes, and how many before those it only reads."""
    chosen = tiles.conv_forward(channels, item_bytes, allow_tf32)
    if width <= chosen.positions:
        return chosen, chosen.positions // width * width, 0
    return chosen, chosen.positions - 2, 1


def part_rows(width: int, channels: int, item_bytes: int, allow_tf32: bool) -> int:
    """Rows of one partial result of the moments."""
    return _tile(width, channels, item_bytes, allow_tf32)[1]


def launch(
    x: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    activation: int,
    parameter: float,
    taps: torch.Tensor,
    taps_bias: torch.Tensor | None,
    height: int,
    width: int,
    allow_tf32: bool,
    y: torch.Tensor,
    moments: torch.Tensor | None,
) -> None:
    """Run the kernel; the arguments are those of the operator."""
    positions, channels = x.shape
    chosen, step, lead = _tile(width, channels, taps.element_size(), allow_tf32)
    count = tiles.cdiv(positions, step)
    unit = tiles.unit(y.shape[1])
    _kernel[(count,)](
        x,
        mean,
        variance,
        weight,
        bias,
        taps,
        taps_bias,
        y,
        moments,
        positions,
        channels,
        tiles.readable(x),
        y.shape[1] // unit,
        height,
        width,
        step,
        x.stride(0),
        y.stride(0),
        taps.stride(0),
        count,
        eps,
        parameter,
        UNIT=unit,
        ACTIVATION=activation,
        HAS_BIAS=taps_bias is not None,
        MOMENTS=moments is not None,
        PRECISION="tf32" if allow_tf32 else "ieee",
        WINDOW=len(taps),
        LEAD=lead,
        BP=chosen.positions,
        BC=chosen.inner,
        BK=taps.shape[2] // COLUMNS,
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
    taps: torch.Tensor,
    taps_bias: torch.Tensor | None,
    height: int,
    width: int,
    allow_tf32: bool,
    y: torch.Tensor,
    moments: torch.Tensor | None,
) -> None:
    """The same in plain torch."""
    value = reference.activate(reference.normalised(x, mean, variance, weight, bias, eps), activation, parameter)
    image = reference.as_operand(value.to(taps.dtype), allow_tf32).view(-1, height, width, x.shape[1]).movedim(3, 1)
    matrix = unpacked(taps, x.shape[1], y.shape[1]).float()
    total = F.conv2d(image, matrix, None if taps_bias is None else taps_bias.float(), padding=(len(taps) // 2, 1))
    y.copy_(total.movedim(1, 3).reshape(y.shape))
    if moments is not None:
        moments.copy_(partial_moments(y, part_rows(width, x.shape[1], taps.element_size(), allow_tf32)))


norm_act_conv = define(
    "norm_act_conv(Tensor x, Tensor mean, Tensor variance, Tensor weight, Tensor bias, float eps, int activation, "
    "float parameter, Tensor taps, Tensor? taps_bias, int height, int width, bool allow_tf32, Tensor(a!) y, "
    "Tensor(b!)? moments) -> ()",
    cuda=launch,
    reference=compute,
)
"""x (P, C), rows `x.stride(0)` apart, of images of height × width; mean, variance, weight, bias (C); taps as
`pack_taps` writes them; taps_bias (K) or None; y (P, K), rows `y.stride(0)` apart, and moments (2, K, ⌈P / part_rows⌉)
are written."""
