"""The gradient of a feature once all its readers have run: what they summed, less the means they put off."""

import torch

from memopt.runtime.kernels import reference, tiles
from memopt.runtime.kernels.language import as_operand, tl
from memopt.runtime.kernels.launches import kernel
from memopt.runtime.kernels.library import define


@kernel(do_not_specialize=["P"])
def _kernel(
    gradient,
    x,
    mean,
    constant,
    slope,
    out,
    P,
    C,
    gradient_stride,
    x_stride,
    out_stride,
    PRECISION: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = c < C
    row = p.to(tl.int64)[:, None]
    there = (p < P)[:, None] & inside[None, :]
    centre = tl.load(mean + c, mask=inside, other=0.0)
    level = tl.load(constant + c, mask=inside, other=0.0)
    steepness = tl.load(slope + c, mask=inside, other=0.0)
    distance = tl.load(x + row * x_stride + c[None, :], mask=there, other=0.0).to(tl.float32) - centre[None, :]
    total = tl.load(gradient + row * gradient_stride + c[None, :], mask=there, other=0.0)
    total = total - level[None, :] - steepness[None, :] * distance
    total = as_operand(total.to(out.dtype.element_ty), PRECISION)
    tl.store(out + row * out_stride + c[None, :], total, mask=there)


def launch(
    gradient: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    constant: torch.Tensor,
    slope: torch.Tensor,
    round_to_tf32: bool,
    out: torch.Tensor,
) -> None:
    """Run the kernel; the arguments are those of the operator."""
    positions, channels = x.shape
    chosen = tiles.elementwise(channels)
    _kernel[(tiles.cdiv(positions, chosen.positions), tiles.cdiv(channels, chosen.inner))](
        gradient,
        x,
        mean,
        constant,
        slope,
        out,
        positions,
        channels,
        gradient.stride(0),
        x.stride(0),
        out.stride(0),
        PRECISION="tf32" if round_to_tf32 else "ieee",
        BP=chosen.positions,
        BC=chosen.inner,
        num_warps=chosen.warps,
    )


def compute(
    gradient: torch.Tensor,
    x: torch.Tensor,
    mean: torch.Tensor,
    constant: torch.Tensor,
    slope: torch.Tensor,
    round_to_tf32: bool,
    out: torch.Tensor,
) -> None:
    """The same in plain torch."""
    total = gradient - constant - slope * (x.float() - mean)
    out.copy_(reference.as_operand(total.to(out.dtype), round_to_tf32))


feature_gradient = define(
    "feature_gradient(Tensor gradient, Tensor x, Tensor mean, Tensor constant, Tensor slope, bool round_to_tf32, "
    "Tensor(a!) out) -> ()",
    cuda=launch,
    reference=compute,
)
"""gradient (P, C) float32, x and out (P, C), rows `stride(0)` apart; mean, constant, slope (C). out is written; with
`round_to_tf32` it is an operand of nothing but matmuls, and rounded here instead of there."""
