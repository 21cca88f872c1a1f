"""Weights of a 3-wide convolution as its kernels read them, and the gradient of the weights back out of their parts.

A convolution over H × W positions is a sum over its taps: a matrix for each, applied to shifted positions. Packed, the
matrices lie side by side, `taps` (R, C', 4 · K'): rows of the window (3 in an image, 1 in a signal), channels read,
and for each of three columns (the fourth is zeros: sizes are powers of two) the channels made. C' and K' are padded
with zeros, so that no kernel masks them.
"""

import torch

from memopt.runtime.kernels import reference, tiles
from memopt.runtime.kernels.language import as_operand, tl
from memopt.runtime.kernels.launches import kernel
from memopt.runtime.kernels.library import define

CHANNELS = 64
"""Channels read are padded to a multiple of this."""
COLUMNS = 4
"""Three, and one of zeros."""


def packed_size(weight: torch.Tensor) -> tuple[int, int, int]:
    """Of `taps` for a weight (K, C, 3, 3) or (K, C, 3)."""
    return window_rows(weight), tiles.cdiv(weight.shape[1], CHANNELS) * CHANNELS, COLUMNS * outer(weight.shape[0])


def window_rows(weight: torch.Tensor) -> int:
    """3 for an image, 1 for a signal."""
    return 3 if weight.dim() == 4 else 1


def outer(out_channels: int) -> int:
    """Channels made, padded."""
    return max(16, tiles.power_of_two(out_channels))


@kernel
def _kernel(
    weight,
    taps,
    K,
    C,
    k_stride,
    c_stride,
    row_stride,
    column_stride,
    CP,
    SIZE,
    PRECISION: tl.constexpr,
    BK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k = at % BK
    column = at // BK % 4
    c = at // (4 * BK) % CP
    row = at // (4 * BK) // CP
    place = weight + k * k_stride + c * c_stride + row * row_stride + column * column_stride
    value = tl.load(place, mask=(at < SIZE) & (k < K) & (column < 3) & (c < C), other=0.0)
    value = as_operand(value.to(taps.dtype.element_ty), PRECISION)
    tl.store(taps + at, value, mask=at < SIZE)


def launch(weight: torch.Tensor, allow_tf32: bool, taps: torch.Tensor) -> None:
    """Run the kernel; the arguments are those of the operator."""
    strides = weight.stride()
    block = 1024
    _kernel[(tiles.cdiv(taps.numel(), block),)](
        weight,
        taps,
        weight.shape[0],
        weight.shape[1],
        strides[0],
        strides[1],
        strides[2] if weight.dim() == 4 else 0,
        strides[-1],
        taps.shape[1],
        taps.numel(),
        PRECISION="tf32" if allow_tf32 else "ieee",
        BK=taps.shape[2] // COLUMNS,
        BLOCK=block,
        num_warps=4,
    )


def compute(weight: torch.Tensor, allow_tf32: bool, taps: torch.Tensor) -> None:
    """The same in plain torch."""
    as_image = weight if weight.dim() == 4 else weight[:, :, None]
    out_channels, channels = weight.shape[:2]
    taps.zero_()
    value = reference.as_operand(as_image.to(taps.dtype), allow_tf32)
    taps.unflatten(2, (COLUMNS, -1))[:, :channels, :3, :out_channels] = value.permute(2, 1, 3, 0).to(taps.dtype)


pack_taps = define("pack_taps(Tensor weight, bool allow_tf32, Tensor(a!) taps) -> ()", cuda=launch, reference=compute)
"""weight (K, C, 3, 3) or (K, C, 3), of any layout; taps of `packed_size` is written, rounded to its dtype or TF32."""


def unpacked(taps: torch.Tensor, channels: int, out_channels: int) -> torch.Tensor:
    """The weight (K, C, R, 3) of `taps`, for references."""
    by_column = taps.view(*taps.shape[:2], COLUMNS, -1)
    return by_column[:, :channels, :3, :out_channels].permute(3, 1, 0, 2)
