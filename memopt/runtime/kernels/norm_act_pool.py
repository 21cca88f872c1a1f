"""z = average(act(norm(x))) over windows that lie side by side: what the convolution of a transition reads.

A 1×1 convolution and an average are both linear: with the average first, the convolution has fewer positions, and
nothing of the size of x is stored in between. The average is taken in float32 and rounded once.
"""

import torch

from memopt.runtime.kernels import reference, tiles
from memopt.runtime.kernels.language import activate, affine_of, tl
from memopt.runtime.kernels.launches import kernel
from memopt.runtime.kernels.library import define


@kernel(do_not_specialize=["Q", "W"])
def _kernel(
    x,
    mean,
    variance,
    weight,
    bias,
    z,
    Q,
    C,
    READABLE,
    W,
    x_stride,
    z_stride,
    eps,
    parameter,
    ACTIVATION: tl.constexpr,
    WINDOW_HEIGHT: tl.constexpr,
    WINDOW_WIDTH: tl.constexpr,
    BQ: tl.constexpr,
    BC: tl.constexpr,
):
    q = tl.program_id(0) * BQ + tl.arange(0, BQ)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    across = W // WINDOW_WIDTH
    # The number of the row of windows in the batch is that of the row of images: every height is a multiple.
    corner = (q // across).to(tl.int64) * (WINDOW_HEIGHT * W) + q % across * WINDOW_WIDTH
    inside = c < C
    centre, scale, shift = affine_of(mean, variance, weight, bias, eps, c, inside)
    touched = (q < Q)[:, None] & (c < READABLE)[None, :]
    total = tl.zeros((BQ, BC), tl.float32)
    for tap in tl.static_range(WINDOW_HEIGHT * WINDOW_WIDTH):
        p = corner + (tap // WINDOW_WIDTH * W + tap % WINDOW_WIDTH)
        value = tl.load(x + p[:, None] * x_stride + c[None, :], mask=touched, other=0.0).to(tl.float32)
        total += activate((value - centre[None, :]) * scale[None, :] + shift[None, :], ACTIVATION, parameter)
    total /= WINDOW_HEIGHT * WINDOW_WIDTH
    there = (q < Q)[:, None] & inside[None, :]
    tl.store(z + q.to(tl.int64)[:, None] * z_stride + c[None, :], total.to(z.dtype.element_ty), mask=there)


def launch(
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
    z: torch.Tensor,
) -> None:
    """Run the kernel; the arguments are those of the operator."""
    positions, channels = z.shape
    chosen = tiles.pooling(channels)
    _kernel[(tiles.cdiv(positions, chosen.positions), tiles.cdiv(channels, chosen.inner))](
        x,
        mean,
        variance,
        weight,
        bias,
        z,
        positions,
        channels,
        tiles.readable(x),
        width,
        x.stride(0),
        z.stride(0),
        eps,
        parameter,
        ACTIVATION=activation,
        WINDOW_HEIGHT=window[0],
        WINDOW_WIDTH=window[1],
        BQ=chosen.positions,
        BC=chosen.inner,
        num_warps=chosen.warps,
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
    width: int,
    window: list[int],
    z: torch.Tensor,
) -> None:
    """The same in plain torch."""
    value = reference.activate(reference.normalised(x, mean, variance, weight, bias, eps), activation, parameter)
    z.copy_(reference.windows(value, width, window).mean((1, 3)).view(z.shape))


norm_act_pool = define(
    "norm_act_pool(Tensor x, Tensor mean, Tensor variance, Tensor weight, Tensor bias, float eps, int activation, "
    "float parameter, int width, int[] window, Tensor(a!) z) -> ()",
    cuda=launch,
    reference=compute,
)
"""x (P, C) of images of a width, z (P / window, C), rows `stride(0)` apart; mean, variance, weight, bias (C);
window: height and width, which divide an image's, of at most `memopt.ir.MAX_POOL_WINDOW` positions. z is written."""
