"""What all kernels share: Triton itself, and the activations on the device."""

from types import SimpleNamespace
from typing import Any

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # a CPU build of torch has no Triton: the references run there
    triton: Any = SimpleNamespace(jit=lambda function=None, **_: function or (lambda f: f))  # type: ignore[no-redef]
    tl: Any = SimpleNamespace(constexpr=Any)  # type: ignore[no-redef]

__all__ = ["KINDS", "activate", "activation_gradient", "affine_of", "as_operand", "tl", "triton"]

IDENTITY = 0
RELU = 1
LEAKY_RELU = 2
RELU6 = 3
ELU = 4
SILU = 5
GELU = 6
GELU_TANH = 7
HARDSWISH = 8
SIGMOID = 9
TANH = 10
KINDS = {
    "identity": IDENTITY,
    "relu": RELU,
    "leaky_relu": LEAKY_RELU,
    "relu6": RELU6,
    "elu": ELU,
    "silu": SILU,
    "gelu": GELU,
    "gelu_tanh": GELU_TANH,
    "hardswish": HARDSWISH,
    "sigmoid": SIGMOID,
    "tanh": TANH,
}
"""By the names of `memopt.ir.Activation`."""


@triton.jit
def affine_of(mean, variance, weight, bias, eps, c, inside):
    """A norm as (x - centre) · scale + shift, for channels `c`; 0 where they are not `inside`."""
    scale = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    scale *= tl.rsqrt(tl.load(variance + c, mask=inside, other=1.0) + eps)
    shift = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    return tl.load(mean + c, mask=inside, other=0.0), scale, shift


@triton.jit
def as_operand(x, PRECISION: tl.constexpr):
    """What `tl.dot` takes. The hardware cuts float32 to TF32, which shrinks every product: round to nearest first.

    Half a unit in the last place of TF32 is 2^-11 of the power of two below x; NaN and infinity stay.
    """
    if PRECISION == "tf32" and x.dtype == tl.float32:
        power = (x.to(tl.int32, bitcast=True) & -8388608).to(tl.float32, bitcast=True)
        x = ((x + power * 0.00048828125).to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return x


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x)."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """Through the sigmoid: exact in the limits, no overflow."""
    return 2.0 * (1.0 / (1.0 + tl.exp(-2.0 * x))) - 1.0


@triton.jit
def activate(x, KIND: tl.constexpr, parameter):
    """act(x), elementwise. NaN stays NaN. `parameter` is the negative slope or alpha."""
    if KIND == 1:
        x = tl.where(x <= 0.0, 0.0, x)
    elif KIND == 2:
        x = tl.where(x > 0.0, x, x * parameter)
    elif KIND == 3:
        x = tl.where(x <= 0.0, 0.0, tl.where(x >= 6.0, 6.0, x))
    elif KIND == 4:
        x = tl.where(x <= 0.0, parameter * (tl.exp(x) - 1.0), x)
    elif KIND == 5:
        x = x * sigmoid(x)
    elif KIND == 6:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == 7:
        x = 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif KIND == 8:
        inner = tl.where(x <= -3.0, 0.0, tl.where(x >= 3.0, 6.0, x + 3.0))
        x = x * inner * 0.16666666666666666
    elif KIND == 9:
        x = sigmoid(x)
    elif KIND == 10:
        x = tanh(x)
    return x


@triton.jit
def activation_gradient(x, gradient, KIND: tl.constexpr, parameter):
    """gradient · act'(x), with the conventions of torch at the kinks."""
    if KIND == 1:
        gradient = tl.where(x <= 0.0, 0.0, gradient)
    elif KIND == 2:
        gradient = tl.where(x > 0.0, gradient, gradient * parameter)
    elif KIND == 3:
        gradient = tl.where((x <= 0.0) | (x >= 6.0), 0.0, gradient)
    elif KIND == 4:
        gradient = tl.where(x <= 0.0, gradient * parameter * tl.exp(x), gradient)
    elif KIND == 5:
        s = sigmoid(x)
        gradient = gradient * s * (1.0 + x * (1.0 - s))
    elif KIND == 6:
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        gradient = gradient * (0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density)
    elif KIND == 7:
        t = tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))
        inner = 0.7978845608028654 * (1.0 + 0.134145 * x * x)
        gradient = gradient * (0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner)
    elif KIND == 8:
        slope = tl.where(x < -3.0, 0.0, tl.where(x <= 3.0, x * 0.3333333333333333 + 0.5, 1.0))
        gradient = gradient * slope
    elif KIND == 9:
        s = sigmoid(x)
        gradient = gradient * s * (1.0 - s)
    elif KIND == 10:
        t = tanh(x)
        gradient = gradient * (1.0 - t * t)
    return gradient
