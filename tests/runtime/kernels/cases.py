"""Arguments for every operator, of awkward sizes, with what it writes filled with NaN."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from memopt.ir import MAX_CONV_CHANNELS
from memopt.runtime.kernels import language
from memopt.runtime.kernels import norm_act_conv as conv_module
from memopt.runtime.kernels import norm_act_conv_backward as conv_backward_module
from memopt.runtime.kernels import norm_act_conv_weight as weight_module
from memopt.runtime.kernels import norm_act_matmul as forward_module
from memopt.runtime.kernels import norm_act_matmul_backward as backward_module
from memopt.runtime.kernels import norm_act_sums as sums_module
from memopt.runtime.kernels import pack_taps as pack_taps_module
from memopt.runtime.kernels.moments import part_rows
from memopt.runtime.kernels.pack_taps import packed_size
from memopt.runtime.kernels.tiles import cdiv

NAN = float("nan")


@dataclass(frozen=True)
class Shape:
    """Positions, channels read, channels of the whole arena, channels made."""

    positions: int
    channels: int
    arena: int
    out: int


SHAPES = (
    Shape(1, 1, 1, 1),
    Shape(37, 12, 30, 13),
    Shape(130, 48, 48, 48),
    Shape(300, 70, 100, 20),
    Shape(64, 17, 129, 128),
    Shape(130, 44, 64, 48),
)
ACTIVATIONS = {
    "identity": (language.IDENTITY, 0.0),
    "relu": (language.RELU, 0.0),
    "leaky": (language.LEAKY_RELU, 0.1),
    "relu6": (language.RELU6, 0.0),
    "elu": (language.ELU, 0.7),
    "silu": (language.SILU, 0.0),
    "gelu": (language.GELU, 0.0),
    "gelu tanh": (language.GELU_TANH, 0.0),
    "hardswish": (language.HARDSWISH, 0.0),
    "sigmoid": (language.SIGMOID, 0.0),
    "tanh": (language.TANH, 0.0),
}


class Maker:
    """Random tensors from a seed of its own."""

    def __init__(
        self, shape: Shape, dtype: torch.dtype, device: str, centre: float = 0.0, allow_tf32: bool = False
    ) -> None:
        self.allow_tf32 = allow_tf32
        self.shape, self.dtype, self.device = shape, dtype, device
        self.generator = torch.Generator().manual_seed(zlib.crc32(repr((shape, str(dtype))).encode()))
        self.centre = centre

    def normal(self, *size: int) -> torch.Tensor:
        return torch.randn(size, generator=self.generator).to(self.device)

    def arena(self) -> torch.Tensor:
        """An interval of an arena: rows further apart than they are long."""
        return self._interval((self.normal(self.shape.positions, self.shape.arena) + self.centre).to(self.dtype), NAN)

    def gradients(self) -> torch.Tensor:
        """The same interval of a gradient arena."""
        return self._interval(self.normal(self.shape.positions, self.shape.arena), 7.0)

    def _interval(self, whole: torch.Tensor, around: float) -> torch.Tensor:
        """An interval of an arena that has something else around it."""
        start = (self.shape.arena - self.shape.channels) // 2
        inside = whole[:, start : start + self.shape.channels]
        values = inside.clone()
        whole.fill_(around)
        return inside.copy_(values)

    def rows(self, channels: int) -> torch.Tensor:
        return self.normal(self.shape.positions, channels).to(self.dtype)

    def empty(self, *size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.full(size, NAN, dtype=dtype, device=self.device)

    def norm(self, channels: int, centre: float = 0.0) -> tuple[torch.Tensor, ...]:
        """Mean, variance, weight, bias."""
        variance = self.normal(channels).square() + 0.5
        return self.normal(channels) + centre, variance, self.normal(channels) + 1, self.normal(channels)


Case = Callable[[Maker, tuple[int, float]], dict[str, Any]]


def moments(m: Maker, act: tuple[int, float]) -> dict[str, Any]:
    s = m.shape
    parts = cdiv(s.positions, part_rows(s.positions, s.channels))
    return {
        "x": m.arena(),
        "moments": m.empty(2, s.channels, parts),
        "copy": m.empty(s.positions, s.channels, dtype=m.dtype),
    }


def merge_moments(m: Maker, act: tuple[int, float]) -> dict[str, Any]:
    s = m.shape
    rows = 7
    parts = cdiv(s.positions, rows)
    counts = (s.positions - torch.arange(parts) * rows).clamp(max=rows).to(m.device)
    squares = m.normal(s.channels, parts).square() * counts
    return {
        "moments": torch.stack([m.normal(s.channels, parts) + m.centre, squares]),
        "positions": s.positions,
        "rows": rows,
        "mean": m.empty(s.channels),
        "variance": m.empty(s.channels),
    }


def norm_act(m: Maker, act: tuple[int, float]) -> dict[str, Any]:
    s = m.shape
    z = m.empty(s.positions, s.channels, dtype=m.dtype)
    return _normed(m, act, x=m.arena()) | {"z": z}


def pooled_size(positions: int) -> tuple[int, list[int]]:
    """Width of the images that so many positions are, and of windows that tile them."""
    height, width = image_size(positions)
    return width, [next((n for n in (2, 3, 5) if size % n == 0), 1) for size in (height, width)]


def norm_act_pool(m: Maker, act: tuple[int, float]) -> dict[str, Any]:
    width, window = pooled_size(m.shape.positions)
    averages = m.shape.positions // prod(window)
    return {
        **_normed(m, act, x=m.arena()),
        "width": width,
        "window": window,
        "z": m.empty(averages, m.shape.channels, dtype=m.dtype),
    }


def norm_act_sums(m: Maker, act: tuple[int, float], pooled: bool = False) -> dict[str, Any]:
    s = m.shape
    parts = sums_module.part_count(s.positions, s.channels)
    width, window = pooled_size(s.positions) if pooled else (1, [1, 1])
    return {
        "dz": m.normal(s.positions // prod(window), s.channels).to(m.dtype),
        **_normed(m, act, x=m.arena()),
        "width": width,
        "window": window,
        "sums": m.empty(2, s.channels, parts),
        "gradient": m.gradients(),
    }


def finish_norm(m: Maker, act: tuple[int, float], taps: bool = False) -> dict[str, Any]:
    channels = m.shape.channels
    _, variance, weight, _ = m.norm(channels)
    convolution = _conv(m)[2] if taps else m.normal(m.shape.out, channels, 1, 1)
    in_parts = _in_parts(convolution) if taps else (m.shape.out, channels)
    return {
        "sums": m.normal(2, channels, 5),
        "variance": variance,
        "weight": weight,
        "eps": 1e-5,
        "positions": m.shape.positions,
        "accumulate": True,
        "weight_gradient": m.empty(channels),
        "bias_gradient": m.empty(channels),
        "constant": m.normal(channels),
        "slope": m.normal(channels),
        "parts": m.normal(5, *in_parts),
        "gradient": m.empty(*convolution.shape, dtype=m.dtype),
    }


def norm_act_backward(m: Maker, act: tuple[int, float]) -> dict[str, Any]:
    s = m.shape
    return {
        "dz": m.rows(s.channels),
        **_normed(m, act, x=m.arena()),
        "constant": m.normal(s.channels),
        "slope": m.normal(s.channels),
        "round_to_tf32": False,
        "dx": m.empty(s.positions, s.channels, dtype=m.dtype),
    }


def feature_gradient(m: Maker, act: tuple[int, float]) -> dict[str, Any]:
    s = m.shape
    return {
        "gradient": m.gradients(),
        "x": m.arena(),
        "mean": m.normal(s.channels) + m.centre,
        "constant": m.normal(s.channels),
        "slope": m.normal(s.channels),
        "round_to_tf32": False,
        "out": m.empty(s.positions, s.channels, dtype=m.dtype),
    }


def norm_act_matmul(m: Maker, act: tuple[int, float]) -> dict[str, Any]:
    s = m.shape
    parts = cdiv(s.positions, forward_module.part_rows(s.channels, s.out, m.dtype.itemsize))
    return {
        **_normed(m, act, x=m.arena()),
        "matrix": m.normal(s.out, s.channels),
        "matrix_bias": m.normal(s.out),
        "allow_tf32": m.allow_tf32,
        "y": m.empty(s.positions, s.out, dtype=m.dtype),
        "moments": m.empty(2, s.out, parts),
    }


def norm_act_matmul_backward(m: Maker, act: tuple[int, float]) -> dict[str, Any]:
    s = m.shape
    dy = m.rows(s.out)
    parts = backward_module.part_count(s.positions, s.channels, s.out, dy.element_size())
    return {
        "dy": dy,
        **_normed(m, act, x=m.arena()),
        "matrix": m.normal(s.out, s.channels),
        "allow_tf32": m.allow_tf32,
        "rounded": False,
        "gradient": m.gradients(),
        "matrix_parts": m.empty(parts, s.out, s.channels),
        "sums": m.empty(2, s.channels, parts),
    }


def image_size(positions: int) -> tuple[int, int]:
    """Height and width of the images, or of signals, that so many positions are: one row wider than a tile, too."""
    if positions in (1, 37, 300):
        return {1: (1, 1), 37: (1, 37), 300: (2, 150)}[positions]
    one = positions // 2 if positions % 2 == 0 else positions
    height = max(n for n in range(1, int(one**0.5) + 1) if one % n == 0)
    return height, one // height


def _conv(m: Maker) -> tuple[int, tuple[int, int], torch.Tensor]:
    """Channels made, height and width, and the weight."""
    out, size = min(m.shape.out, MAX_CONV_CHANNELS), image_size(m.shape.positions)
    return out, size, m.normal(out, m.shape.channels, *((3, 3) if size[0] > 1 else (3,)))


def pack_taps(m: Maker, act: tuple[int, float]) -> dict[str, Any]:
    _, _, weight = _conv(m)
    if weight.dim() == 4:
        weight = weight.contiguous(memory_format=torch.channels_last)
    return {"weight": weight, "allow_tf32": m.allow_tf32, "taps": m.empty(*packed_size(weight), dtype=m.dtype)}


def _packed(m: Maker, weight: torch.Tensor) -> torch.Tensor:
    arguments = {"weight": weight, "allow_tf32": m.allow_tf32, "taps": m.empty(*packed_size(weight), dtype=m.dtype)}
    if m.device != "meta":
        pack_taps_module.compute(**arguments)
    return arguments["taps"]


def _in_parts(weight: torch.Tensor) -> tuple[int, int, int]:
    rows, _, columns = packed_size(weight)
    return rows, columns, weight.shape[1]


def norm_act_conv(m: Maker, act: tuple[int, float]) -> dict[str, Any]:
    s = m.shape
    out, (height, width), weight = _conv(m)
    parts = cdiv(s.positions, conv_module.part_rows(width, s.channels, m.dtype.itemsize, m.allow_tf32))
    return {
        **_normed(m, act, x=m.arena()),
        "taps": _packed(m, weight),
        "taps_bias": m.normal(out),
        "height": height,
        "width": width,
        "allow_tf32": m.allow_tf32,
        "y": m.empty(s.positions, out, dtype=m.dtype),
        "moments": m.empty(2, out, parts),
    }


def norm_act_conv_weight(m: Maker, act: tuple[int, float]) -> dict[str, Any]:
    s = m.shape
    out, (height, width) = min(s.out, 64), image_size(s.positions)
    weight = torch.empty(out, s.channels, *((3, 3) if height > 1 else (3,)), dtype=m.dtype, device="meta")
    return {
        "g": m.rows(out),
        **_normed(m, act, x=m.arena()),
        "height": height,
        "width": width,
        "allow_tf32": m.allow_tf32,
        "parts": m.empty(*weight_module.parts_size(s.positions, s.channels, weight)),
    }


def norm_act_conv_backward(m: Maker, act: tuple[int, float], accumulate: bool = False) -> dict[str, Any]:
    s = m.shape
    out, (height, width), weight = _conv(m)
    count = conv_backward_module.part_count(s.positions, s.channels, m.dtype.itemsize)
    return {
        "g": m.rows(out),
        **_normed(m, act, x=m.arena()),
        "taps": _packed(m, weight),
        "height": height,
        "width": width,
        "allow_tf32": m.allow_tf32,
        "rounded": False,
        "accumulate": accumulate,
        "result": m.gradients() if accumulate else m.empty(s.positions, s.channels, dtype=m.dtype),
        "parts": m.empty(count, *_in_parts(weight)),
        "sums": m.empty(2, s.channels, count),
    }


def _normed(m: Maker, act: tuple[int, float], x: torch.Tensor) -> dict[str, Any]:
    mean, variance, weight, bias = m.norm(m.shape.channels, m.centre)
    return {
        "x": x,
        "mean": mean,
        "variance": variance,
        "weight": weight,
        "bias": bias,
        "eps": 1e-5,
        "activation": act[0],
        "parameter": act[1],
    }


CASES: dict[str, Case] = {
    case.__name__: case
    for case in (
        moments,
        merge_moments,
        norm_act,
        norm_act_pool,
        norm_act_sums,
        finish_norm,
        norm_act_backward,
        feature_gradient,
        norm_act_matmul,
        norm_act_matmul_backward,
        pack_taps,
        norm_act_conv,
        norm_act_conv_backward,
        norm_act_conv_weight,
    )
}
WITH_ACTIVATION = (
    "norm_act",
    "norm_act_pool",
    "norm_act_sums",
    "norm_act_backward",
    "norm_act_matmul",
    "norm_act_matmul_backward",
    "norm_act_conv",
    "norm_act_conv_backward",
    "norm_act_conv_weight",
)
OPTIONAL = ("copy", "gradient", "matrix_bias", "taps_bias", "moments", "constant", "slope")
"""Arguments that may be None."""
