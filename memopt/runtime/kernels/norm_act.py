"""z = act(norm(x)): what a convolution reads that cannot normalise as it loads."""

import torch

from memopt.runtime.kernels import reference, tiles
from memopt.runtime.kernels.language import activate, affine_of, tl
from memopt.runtime.kernels.launches import kernel
from memopt.runtime.kernels.library import define


@kernel(do_not_specialize=["P"])
def _kernel(
    x,
    mean,
    variance,
    weight,
    bias,
    z,
    P,
    C,
    READABLE,
    x_stride,
    z_stride,
    eps,
    parameter,
    ACTIVATION: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = c < C
    there = (p < P)[:, None] & inside[None, :]
    centre, scale, shift = affine_of(mean, variance, weight, bias, eps, c, inside)
    touched = (p < P)[:, None] & (c < READABLE)[None, :]
    value = tl.load(x + p.to(tl.int64)[:, None] * x_stride + c[None, :], mask=touched, other=0.0).to(tl.float32)
    value = activate((value - centre[None, :]) * scale[None, :] + shift[None, :], ACTIVATION, parameter)
    tl.store(z + p.to(tl.int64)[:, None] * z_stride + c[None, :], value.to(z.dtype.element_ty), mask=there)


def launch(
    x: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    activation: int,
    parameter: float,
    z: torch.Tensor,
) -> None:
    """Run the kernel; the arguments are those of the operator."""
    positions, channels = x.shape
    chosen = tiles.elementwise(channels)
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
        x.stride(0),
        z.stride(0),
        eps,
        parameter,
        ACTIVATION=activation,
        BP=chosen.positions,
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
    z: torch.Tensor,
) -> None:
    """The same in plain torch."""
    z.copy_(reference.activate(reference.normalised(x, mean, variance, weight, bias, eps), activation, parameter))


norm_act = define(
    "norm_act(Tensor x, Tensor mean, Tensor variance, Tensor weight, Tensor bias, float eps, int activation, "
    "float parameter, Tensor(a!) z) -> ()",
    cuda=launch,
    reference=compute,
)
"""x and z (P, C), rows `stride(0)` apart; mean, variance, weight, bias (C). z is written."""
