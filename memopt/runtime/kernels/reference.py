"""What the plain-torch references share: the activations and a norm, in float32 as the kernels compute them."""

import torch
import torch.nn.functional as F

from memopt.runtime.kernels import language


def activate(x: torch.Tensor, kind: int, parameter: float) -> torch.Tensor:
    """act(x), elementwise; `kind` is one of `language`'s constants."""
    if kind == language.LEAKY_RELU:
        return F.leaky_relu(x, parameter)
    if kind == language.ELU:
        return F.elu(x, parameter)
    result: torch.Tensor = {
        language.IDENTITY: lambda t: t,
        language.RELU: F.relu,
        language.RELU6: F.relu6,
        language.SILU: F.silu,
        language.GELU: F.gelu,
        language.GELU_TANH: lambda t: F.gelu(t, approximate="tanh"),
        language.HARDSWISH: F.hardswish,
        language.SIGMOID: torch.sigmoid,
        language.TANH: torch.tanh,
    }[kind](x)
    return result


def activation_gradient(x: torch.Tensor, gradient: torch.Tensor, kind: int, parameter: float) -> torch.Tensor:
    """gradient · act'(x)."""
    # ATen's own formulas by name: below the dispatcher, where an operator runs, there is no autograd.
    aten = torch.ops.aten
    result: torch.Tensor = {
        language.IDENTITY: lambda: gradient,
        language.RELU: lambda: aten.threshold_backward(gradient, x, 0),
        language.LEAKY_RELU: lambda: aten.leaky_relu_backward(gradient, x, parameter, False),
        language.RELU6: lambda: aten.hardtanh_backward(gradient, x, 0.0, 6.0),
        language.ELU: lambda: aten.elu_backward(gradient, parameter, 1.0, 1.0, False, x),
        language.SILU: lambda: aten.silu_backward(gradient, x),
        language.GELU: lambda: aten.gelu_backward(gradient, x),
        language.GELU_TANH: lambda: aten.gelu_backward(gradient, x, approximate="tanh"),
        language.HARDSWISH: lambda: aten.hardswish_backward(gradient, x),
        language.SIGMOID: lambda: aten.sigmoid_backward(gradient, torch.sigmoid(x)),
        language.TANH: lambda: aten.tanh_backward(gradient, torch.tanh(x)),
    }[kind]()
    return result


def as_operand(x: torch.Tensor, allow_tf32: bool) -> torch.Tensor:
    """Of a matmul: in float32, rounded to TF32 (10 bits after the point) where x is float32 and that is allowed."""
    if x.dtype != torch.float32 or not allow_tf32:
        return x.float()
    significand, exponent = torch.frexp(x.double())
    # Half away from zero, as the kernels round; NaN and infinity have no significand to round.
    rounded = (significand.abs() * 2048 + 0.5).floor().copysign(significand) / 2048
    return torch.where(x.isfinite(), torch.ldexp(rounded, exponent), x.double()).float()


def normalised(
    x: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """(x - mean) · weight / √(variance + eps) + bias in float32; x (P, C), the others (C)."""
    return (x.float() - mean) * (weight.float() * torch.rsqrt(variance + eps)) + bias.float()


def windows(x: torch.Tensor, width: int, window: list[int]) -> torch.Tensor:
    """x (P, C) of images of a width as (rows of windows, row, windows, column, C)."""
    high, wide = window
    return x.view(-1, high, width // wide, wide, x.shape[1])


def spread(averages: torch.Tensor, width: int, window: list[int]) -> torch.Tensor:
    """The gradient (P, C) of x from that of its averages (P / window, C)."""
    high, wide = window
    if high == wide == 1:
        return averages
    rows = averages.view(-1, 1, width // wide, 1, averages.shape[1]) / (high * wide)
    return rows.expand(-1, high, -1, wide, -1).reshape(-1, averages.shape[1])
