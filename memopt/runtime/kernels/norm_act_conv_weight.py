"""The weight gradient of conv(act(norm(x))) for a window of 3 × 3 in an image or 3 in a signal, from x itself.

For wide convolutions, whose data gradient is left to cuDNN. For each tap the gradient is a matmul that contracts the
positions: of act(norm(x)), computed as x is loaded and stored nowhere, and g as many rows and columns away. A program
has the three taps of one row of the window in registers over many tiles of positions; `finish_norm` adds the parts.
"""

import torch
import torch.nn.functional as F

from memopt.runtime.kernels import reference, tiles
from memopt.runtime.kernels.language import activate, affine_of, as_operand, tl, triton
from memopt.runtime.kernels.launches import kernel
from memopt.runtime.kernels.library import define
from memopt.runtime.kernels.pack_taps import outer


@triton.jit
def _add_tap(total, g, value, there, PRECISION: tl.constexpr, TURNED: tl.constexpr):
    gathered = as_operand(tl.load(g, mask=there, other=0.0), PRECISION)
    if TURNED:
        total = tl.dot(tl.trans(value), gathered, total, input_precision=PRECISION)
    else:
        total = tl.dot(tl.trans(gathered), value, total, input_precision=PRECISION)
    return total


@kernel(do_not_specialize=["P", "k_units", "H", "W", "g_units", "NT"])
def _kernel(
    g,
    x,
    mean,
    variance,
    weight,
    bias,
    parts,
    P,
    C,
    READABLE,
    k_units,
    H,
    W,
    g_units,
    x_stride,
    NT,
    eps,
    parameter,
    UNIT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    TURNED: tl.constexpr,
    WINDOW: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    K, g_stride = k_units * UNIT, g_units * UNIT
    window = tl.program_id(0) % WINDOW
    down = window - WINDOW // 2
    c = tl.program_id(0) // WINDOW * BC + tl.arange(0, BC)
    part = tl.program_id(1)
    k = tl.arange(0, BK)
    inside = c < C
    centre, scale, shift = affine_of(mean, variance, weight, bias, eps, c, inside)
    left = tl.zeros((BC, BK) if TURNED else (BK, BC), tl.float32)
    middle = tl.zeros((BC, BK) if TURNED else (BK, BC), tl.float32)
    right = tl.zeros((BC, BK) if TURNED else (BK, BC), tl.float32)
    i = tl.arange(0, BP)
    for step in range(0, NT):
        # Offsets of 64 bits are the tile's alone: within it, 32 do.
        start = tl.cast(part * NT + step, tl.int64) * BP
        p = (part * NT + step) * BP + i
        column = p % W
        row = p // W % H
        touched = (p < P)[:, None] & (c < READABLE)[None, :]
        value = tl.load(x + start * x_stride + (i[:, None] * x_stride + c[None, :]), mask=touched, other=0.0)
        value = (value.to(tl.float32) - centre[None, :]) * scale[None, :] + shift[None, :]
        value = tl.where((p < P)[:, None] & inside[None, :], activate(value, ACTIVATION, parameter), 0.0)
        value = as_operand(value.to(g.dtype.element_ty), PRECISION)
        # What a position gives to the one `down` rows and a column before it, level with it, a column behind it.
        reached = (p < P) & (row >= down) & (row - down < H)
        place = g + start * g_stride + ((i[:, None] - down * W) * g_stride + k[None, :])
        taken = (k < K)[None, :]
        there = (reached & (column + 1 < W))[:, None] & taken
        left = _add_tap(left, place + g_stride, value, there, PRECISION, TURNED)
        middle = _add_tap(middle, place, value, reached[:, None] & taken, PRECISION, TURNED)
        there = (reached & (column >= 1))[:, None] & taken
        right = _add_tap(right, place - g_stride, value, there, PRECISION, TURNED)
    if TURNED:
        left, middle, right = tl.trans(left), tl.trans(middle), tl.trans(right)
    own = parts + (tl.cast(part, tl.int64) * WINDOW + window) * (3 * BK) * C + k[:, None] * C + c[None, :]
    tl.store(own, left, mask=inside[None, :])
    tl.store(own + BK * C, middle, mask=inside[None, :])
    tl.store(own + 2 * BK * C, right, mask=inside[None, :])


def _split(positions: int, channels: int, out_channels: int, window: int, item_bytes: int) -> tuple[tiles.Tiles, int]:
    """Tiles, and how many of them a program takes: by the shape alone, so that the order of the sums is."""
    chosen = tiles.conv_weight(channels, outer(out_channels), item_bytes)
    programs = max(1, chosen.programs // (window * tiles.cdiv(channels, chosen.inner)))
    return chosen, tiles.cdiv(tiles.cdiv(positions, chosen.positions), programs)


def parts_size(positions: int, channels: int, weight: torch.Tensor) -> tuple[int, int, int, int]:
    """Of `parts`, for a weight (K, C, 3, 3) or (K, C, 3) in the dtype of g."""
    window = 3 if weight.dim() == 4 else 1
    chosen, repeats = _split(positions, channels, len(weight), window, weight.element_size())
    return tiles.cdiv(positions, chosen.positions * repeats), window, 3 * outer(len(weight)), channels


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
    height: int,
    width: int,
    allow_tf32: bool,
    parts: torch.Tensor,
) -> None:
    """Run the kernel; the arguments are those of the operator."""
    positions, channels = x.shape
    count, window, columns, _ = parts.shape
    chosen, repeats = _split(positions, channels, g.shape[1], window, g.element_size())
    # Without tensor cores a thread holds whole rows of its operands: fewer of them at a time, in the same parts.
    exact = g.dtype == torch.float32 and not allow_tf32
    slices = chosen.positions // 16 if exact else 1
    if not exact:
        chosen = tiles.for_device(chosen, g.device)
    # sm_90 has instructions for 64 rows and more, which take all but float32 as it lies here.
    turned = g.element_size() == 2 and tiles.capability(g.device)[0] == 9
    unit = tiles.unit(g.shape[1], g.stride(0))
    _kernel[(window * tiles.cdiv(channels, chosen.inner), count)](
        g,
        x,
        mean,
        variance,
        weight,
        bias,
        parts,
        positions,
        channels,
        tiles.readable(x),
        g.shape[1] // unit,
        height,
        width,
        g.stride(0) // unit,
        x.stride(0),
        repeats * slices,
        eps,
        parameter,
        UNIT=unit,
        ACTIVATION=activation,
        PRECISION="tf32" if allow_tf32 else "ieee",
        TURNED=turned,
        WINDOW=window,
        BP=chosen.positions // slices,
        BC=chosen.inner,
        BK=columns // 3,
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
    height: int,
    width: int,
    allow_tf32: bool,
    parts: torch.Tensor,
) -> None:
    """The same in plain torch."""
    value = reference.activate(reference.normalised(x, mean, variance, weight, bias, eps), activation, parameter)
    value = reference.as_operand(value.to(g.dtype), allow_tf32)
    window, out_channels = parts.shape[1], g.shape[1]
    given = reference.as_operand(g, allow_tf32).view(-1, height, width, out_channels).movedim(3, 1)
    padded = F.pad(given, (1, 1, window // 2, window // 2))
    chosen, repeats = _split(len(x), x.shape[1], out_channels, window, g.element_size())
    rows = chosen.positions * repeats
    parts.zero_()
    split = parts.unflatten(2, (3, -1))
    for row in range(window):
        for column in range(3):
            y, x_ = window - 1 - row, 2 - column
            shifted = padded[:, :, y : y + height, x_ : x_ + width].movedim(1, 3).reshape(-1, out_channels)
            pairs = zip(shifted.split(rows), value.split(rows), strict=True)
            split[:, row, column, :out_channels] = torch.stack([a.t() @ b for a, b in pairs])


norm_act_conv_weight = define(
    "norm_act_conv_weight(Tensor g, Tensor x, Tensor mean, Tensor variance, Tensor weight, Tensor bias, float eps, "
    "int activation, float parameter, int height, int width, bool allow_tf32, Tensor(a!) parts) -> ()",
    cuda=launch,
    reference=compute,
)
"""g (P, K), K at most 64, and x (P, C), rows `stride(0)` apart, of images of height × width; mean, variance, weight,
bias (C). parts (count, R, 3 · K', C) of `parts_size`, float32, is written."""
