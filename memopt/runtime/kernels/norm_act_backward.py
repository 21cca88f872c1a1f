"""dx of z = act(norm(x)) for a dense x that nothing else reads: the bottleneck's second norm.

`constant` and `slope` are what `finish_norm` left for this norm alone, zeros for a norm with running statistics.
"""

import torch

from memopt.runtime.kernels import reference, tiles
from memopt.runtime.kernels.language import activation_gradient, affine_of, as_operand, tl
from memopt.runtime.kernels.launches import kernel
from memopt.runtime.kernels.library import define


@kernel(do_not_specialize=["P"])
def _kernel(
    dz,
    x,
    mean,
    variance,
    weight,
    bias,
    constant,
    slope,
    dx,
    P,
    C,
    dz_stride,
    x_stride,
    dx_stride,
    eps,
    parameter,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = c < C
    row = p.to(tl.int64)[:, None]
    there = (p < P)[:, None] & inside[None, :]
    centre, scale, shift = affine_of(mean, variance, weight, bias, eps, c, inside)
    level = tl.load(constant + c, mask=inside, other=0.0)
    steepness = tl.load(slope + c, mask=inside, other=0.0)
    distance = tl.load(x + row * x_stride + c[None, :], mask=there, other=0.0).to(tl.float32) - centre[None, :]
    d = tl.load(dz + row * dz_stride + c[None, :], mask=there, other=0.0).to(tl.float32)
    d = activation_gradient(distance * scale[None, :] + shift[None, :], d, ACTIVATION, parameter)
    result = d * scale[None, :] - level[None, :] - steepness[None, :] * distance
    result = as_operand(result.to(dx.dtype.element_ty), PRECISION)
    tl.store(dx + row * dx_stride + c[None, :], result, mask=there)


def launch(
    dz: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    activation: int,
    parameter: float,
    constant: torch.Tensor,
    slope: torch.Tensor,
    round_to_tf32: bool,
    dx: torch.Tensor,
) -> None:
    """Run the kernel; the arguments are those of the operator."""
    positions, channels = x.shape
    chosen = tiles.elementwise(channels)
    _kernel[(tiles.cdiv(positions, chosen.positions), tiles.cdiv(channels, chosen.inner))](
        dz,
        x,
        mean,
        variance,
        weight,
        bias,
        constant,
        slope,
        dx,
        positions,
        channels,
        dz.stride(0),
        x.stride(0),
        dx.stride(0),
        eps,
        parameter,
        ACTIVATION=activation,
        PRECISION="tf32" if round_to_tf32 else "ieee",
        BP=chosen.positions,
        BC=chosen.inner,
        num_warps=chosen.warps,
    )


def compute(
    dz: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    activation: int,
    parameter: float,
    constant: torch.Tensor,
    slope: torch.Tensor,
    round_to_tf32: bool,
    dx: torch.Tensor,
) -> None:
    """The same in plain torch."""
    before = reference.normalised(x, mean, variance, weight, bias, eps)
    d = reference.activation_gradient(before, dz.float(), activation, parameter)
    total = d * (weight.float() * torch.rsqrt(variance + eps)) - constant - slope * (x.float() - mean)
    dx.copy_(reference.as_operand(total.to(dx.dtype), round_to_tf32))


norm_act_backward = define(
    "norm_act_backward(Tensor dz, Tensor x, Tensor mean, Tensor variance, Tensor weight, Tensor bias, float eps, "
    "int activation, float parameter, Tensor constant, Tensor slope, bool round_to_tf32, Tensor(a!) dx) -> ()",
    cuda=launch,
    reference=compute,
)
"""dz, x, dx (P, C), rows `stride(0)` apart; the rest (C). dx is written and may be dz; with
`round_to_tf32` it is an operand of nothing but matmuls, and rounded here instead of there."""
