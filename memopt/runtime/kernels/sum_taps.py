"""The gradient of a 3-wide convolution's weight from its partial sums, in a fixed order."""

import torch

from memopt.runtime.kernels import tiles
from memopt.runtime.kernels.language import tl
from memopt.runtime.kernels.launches import kernel
from memopt.runtime.kernels.library import define
from memopt.runtime.kernels.pack_taps import COLUMNS


@kernel(do_not_specialize=["COUNT"])
def _kernel(
    parts,
    gradient,
    K,
    C,
    k_stride,
    c_stride,
    row_stride,
    column_stride,
    COUNT,
    SIZE,
    BK: tl.constexpr,
    BT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, COUNT, BT):
        part = start + tl.arange(0, BT)
        there = (part < COUNT)[:, None] & (at < SIZE)[None, :]
        total += tl.sum(tl.load(parts + part.to(tl.int64)[:, None] * SIZE + at[None, :], mask=there, other=0.0), 0)
    c = at % C
    k = at // C % BK
    column = at // C // BK % 4
    row = at // C // BK // 4
    place = gradient + k * k_stride + c * c_stride + row * row_stride + column * column_stride
    wanted = (at < SIZE) & (k < K) & (column < 3)
    tl.store(place, total.to(gradient.dtype.element_ty), mask=wanted)


def launch(parts: torch.Tensor, gradient: torch.Tensor) -> None:
    """Run the kernel; the arguments are those of the operator."""
    strides = gradient.stride()
    size, block = parts[0].numel(), 64
    _kernel[(tiles.cdiv(size, block),)](
        parts,
        gradient,
        gradient.shape[0],
        gradient.shape[1],
        strides[0],
        strides[1],
        strides[2] if gradient.dim() == 4 else 0,
        strides[-1],
        len(parts),
        size,
        BK=parts.shape[2] // COLUMNS,
        BT=64,
        BLOCK=block,
        num_warps=4,
    )


def compute(parts: torch.Tensor, gradient: torch.Tensor) -> None:
    """The same in plain torch."""
    total = parts.sum(0).unflatten(1, (COLUMNS, -1))[:, :3, : len(gradient)].permute(2, 3, 0, 1)
    gradient.copy_(total.view(gradient.shape) if gradient.dim() == 4 else total[:, :, 0])


sum_taps = define("sum_taps(Tensor parts, Tensor(a!) gradient) -> ()", cuda=launch, reference=compute)
"""parts (count, R, 4 · K', C) as `norm_act_conv_backward` writes it; gradient (K, C, 3, 3) or (K, C, 3) is written."""
