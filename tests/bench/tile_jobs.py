"""What `search_tiles.py` times: the kernels' shapes in densenet121 and DenseNet-BC-100, their choices and arguments."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from math import prod
from typing import Any

import torch

from memopt.runtime.kernels import (
    norm_act_conv,
    norm_act_conv_backward,
    norm_act_conv_weight,
    norm_act_matmul_backward,
    norm_act_sums,
    tiles,
)
from memopt.runtime.kernels.moments import part_rows
from memopt.runtime.kernels.pack_taps import packed_size
from memopt.runtime.kernels.tiles import Tiles, cdiv, padded

BYTES_PER_SECOND = 4.2e12
Shape = tuple[int, ...]
_MATMULS = (
    (524288, 132, 48),
    (131072, 276, 48),
    (524288, 216, 108),
    (200704, 224, 128),
    (50176, 384, 128),
    (12544, 640, 128),
    (3136, 768, 128),
)
_CONVS = ((524288, 48, 12, 32), (131072, 48, 12, 16), (200704, 128, 32, 56), (12544, 128, 32, 14))
_TRANSITIONS = ((524288, 216, 216, 32), (200704, 256, 256, 56), (50176, 512, 512, 28), (12544, 1024, 1024, 14))
_BOTTLENECKS = ((200704, 128, 128), (50176, 128, 128), (12544, 128, 128), (3136, 128, 128))
SHAPES: dict[str, tuple[Shape, ...]] = {
    "norm_act_matmul": _MATMULS,
    "norm_act_matmul_backward": _MATMULS,
    "norm_act_conv": _CONVS,
    "norm_act_conv_backward": _CONVS,
    "norm_act_conv_weight": tuple((n, 128, 32, w) for n, w in ((200704, 56), (50176, 28), (12544, 14), (3136, 7))),
    "norm_act_sums": _BOTTLENECKS,
    "norm_act_sums averaged": _TRANSITIONS,
    "norm_act_pool": _TRANSITIONS,
    "moments": ((200704, 32, 32), (50176, 32, 32), (12544, 32, 32), (3136, 32, 32), (200704, 64, 64)),
    "finish_norm": ((524288, 132, 48), (200704, 160, 128), (12544, 640, 128), (3136, 768, 128)),
}
"""Positions, channels read, channels made; then the width (and height) of an image."""
CHOOSERS = {
    "norm_act_matmul": "matmul_forward",
    "norm_act_matmul_backward": "matmul_backward",
    "norm_act_conv": "conv_forward",
    "norm_act_conv_backward": "conv_backward",
    "norm_act_conv_weight": "conv_weight",
    "norm_act_sums": "reduction_tiles",
    "norm_act_sums averaged": "reduction_tiles",
    "norm_act_pool": "pooling",
    "moments": "reduction_tiles",
    "finish_norm": "partial_sums",
}
"""Which function of `tiles` chooses."""


@dataclass(frozen=True)
class Job:
    """One kernel at one shape; `tiles` None: those that it chooses itself."""

    kernel: str
    shape: Shape
    dtype: torch.dtype
    tiles: Tiles | None

    @property
    def size(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def key(self) -> str:
        return f"{self.kernel} {self.dtype} {self.size}"

    @property
    def row(self) -> tuple[Any, ...]:
        """Of the CSV file."""
        t = self.tiles
        if t is None:
            return ("now", *[""] * 5)
        return (t.positions, t.inner, t.warps, t.stages, t.programs, t.sums_by_row)


def module_of(job: Job) -> Any:
    """The kernel's file."""
    return importlib.import_module(f"memopt.runtime.kernels.{job.kernel.split()[0]}")


def choices(job: Job, near: bool) -> list[Tiles]:
    """Tiles to try."""
    outer = max(16, tiles.power_of_two(job.shape[2]))
    if job.kernel == "finish_norm":
        return [Tiles(p, i, 0, w, 1) for p, i, w in product((8, 16, 32, 64), (64, 128, 256), (4, 8)) if p * i <= 8192]
    if job.kernel == "norm_act_pool":
        grid = product((256, 512, 1024, 2048), (32, 64, 128), (2, 4, 8))
        return [Tiles(size // i, i, 0, w, 1) for size, i, w in grid]
    if CHOOSERS[job.kernel] == "reduction_tiles":
        grid = product((1024, 2048, 4096), (32, 64, 128), (4,), (1, 2, 3), (528, 1056, 2112))
        return [Tiles(size // i, i, 0, w, s, n) for size, i, w, s, n in grid]
    if job.kernel in ("norm_act_matmul", "norm_act_conv"):
        warps, stages = ((4,), (1, 3)) if near else ((4, 8), (1, 2, 3, 4))
        return [Tiles(p, i, outer, w, s) for p, i, w, s in product((128, 256), (32, 64), warps, stages)]
    if job.kernel == "norm_act_conv_weight":
        stages, programs = ((2, 3), (264, 528)) if near else ((1, 2, 3, 4), (132, 264, 396, 528))
        grid = product((16, 32, 64, 128), (64, 128), (4, 8), stages, programs)
        return [Tiles(p, i, outer, w, s, n) for p, i, w, s, n in grid if p * i <= 8192]
    rows, stages, programs = ((32, 64), (2, 3), (264, 528)) if near else ((32, 64, 128), (1, 2, 3), (264, 528, 1056))
    grid = product(rows, (32, 64), (4, 8), stages, programs, (False, True))
    return [Tiles(p, i, outer, w, s, n, sums_by_row=by_row) for p, i, w, s, n, by_row in grid if p * i <= 4096]


def floor(job: Job) -> float:
    """Microseconds that the bytes alone take, once each."""
    positions, channels, out = job.shape[:3]
    item = job.dtype.itemsize
    one = job.kernel.split()[0]
    if one == "finish_norm":
        count = norm_act_matmul_backward.part_count(positions, channels, out, item)
        return 4 * count * channels * (out + 2) / BYTES_PER_SECOND * 1e6
    moved = {
        "norm_act_matmul": (channels + out) * item,
        "norm_act_matmul_backward": (channels + out) * item + 8 * channels,
        "norm_act_conv": (channels + out) * item,
        "norm_act_conv_backward": (2 * channels + out) * item,
        "norm_act_conv_weight": (channels + out) * item,
        "norm_act_sums": 2 * channels * item,
        "norm_act_pool": 1.25 * channels * item,
        "moments": 2 * channels * item,
    }[one]
    if job.kernel == "norm_act_sums averaged":
        moved = 1.25 * channels * item + 8 * channels
    return positions * moved / BYTES_PER_SECOND * 1e6


def arguments(job: Job, device: str) -> dict[str, Any]:
    """What `launch` may take, by name."""
    positions, channels, out = job.shape[:3]
    width = job.shape[3] if len(job.shape) > 3 else 1
    one, averaged = job.kernel.split()[0], job.kernel.endswith("averaged") or job.kernel == "norm_act_pool"
    item, window = job.dtype.itemsize, [2, 2] if averaged else [1, 1]

    def matrix(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(size, dtype=dtype, device=device)

    def arena(dtype: torch.dtype) -> torch.Tensor:
        return matrix(positions, padded(2 * channels), dtype=dtype)[:, :channels]

    def dense(wide: int, rows: int = positions) -> torch.Tensor:
        return matrix(rows, wide, dtype=job.dtype)

    names = ("mean", "variance", "weight", "bias")
    given: dict[str, Any] = {name: matrix(channels) for name in names}
    given |= {"eps": 1e-5, "activation": 1, "parameter": 0.0, "allow_tf32": True, "rounded": True, "width": width}
    given |= {"height": width, "window": window, "positions": positions, "accumulate": one == "finish_norm"}
    if one in ("norm_act_matmul", "norm_act_matmul_backward"):
        given |= {"x": arena(job.dtype), "matrix": matrix(out, channels), "matrix_bias": None}
    if one == "norm_act_matmul":
        rows = module_of(job).part_rows(channels, out, item)
        return given | {"y": dense(out), "moments": matrix(2, out, cdiv(positions, rows))}
    if one in ("norm_act_matmul_backward", "finish_norm"):
        count = norm_act_matmul_backward.part_count(positions, channels, out, item)
        parts, sums = matrix(count, out, channels), matrix(2, channels, count)
        if one == "finish_norm":
            vectors = ("weight_gradient", "bias_gradient", "constant", "slope")
            given |= {name: matrix(channels) for name in vectors}
            return given | {"sums": sums, "parts": parts, "gradient": matrix(out, channels, 1, 1)}
        return given | {"dy": dense(out), "gradient": arena(torch.float32), "matrix_parts": parts, "sums": sums}
    if one in ("moments", "norm_act_pool"):
        x = dense(channels) if one == "moments" else arena(job.dtype)
        parts = cdiv(positions, part_rows(positions, channels))
        return given | {"x": x, "moments": matrix(2, channels, parts), "copy": arena(job.dtype)} | {
            "z": dense(channels, positions // prod(window))
        }  # fmt: skip
    if one == "norm_act_sums":
        given |= {"x": arena(job.dtype) if averaged else dense(channels)}
        given |= {"dz": dense(channels, positions // prod(window))}
        given |= {"gradient": arena(torch.float32) if averaged else None}
        return given | {"sums": matrix(2, channels, norm_act_sums.part_count(positions, channels))}
    return given | _convolution(job, matrix, dense)


def _convolution(job: Job, matrix: Any, dense: Any) -> dict[str, Any]:
    positions, channels, out, width = job.shape
    item = job.dtype.itemsize
    if job.kernel == "norm_act_conv_weight":
        weight = torch.empty(out, channels, 3, 3, dtype=job.dtype, device="meta")
        parts = matrix(*norm_act_conv_weight.parts_size(positions, channels, weight))
        return {"g": dense(out), "x": dense(channels), "parts": parts}
    size = packed_size(torch.empty(out, channels, 3, 3, device="meta"))
    given = {"x": dense(channels), "taps": matrix(*size, dtype=job.dtype), "taps_bias": None}
    if job.kernel == "norm_act_conv":
        rows = norm_act_conv.part_rows(width, channels, item, True)
        return given | {"y": dense(224)[:, 96 : 96 + out], "moments": matrix(2, out, cdiv(positions, rows))}
    count = norm_act_conv_backward.part_count(positions, channels, item)
    parts, sums = matrix(count, 3, size[2], channels), matrix(2, channels, count)
    return given | {"g": dense(out), "result": dense(channels), "parts": parts, "sums": sums}


def library(job: Job) -> Callable[[], Any] | None:
    """What a library does instead of a kernel, which also spares `norm_act`: cuDNN's weight gradient."""
    if job.kernel != "norm_act_conv_weight":
        return None
    positions, channels, out, width = job.shape

    def image(wide: int) -> torch.Tensor:
        rows = torch.zeros(positions // width**2, width, width, wide, dtype=job.dtype, device="cuda")
        return rows.movedim(3, 1)

    weight = torch.zeros(out, channels, 3, 3, dtype=job.dtype, device="cuda").to(memory_format=torch.channels_last)
    settings = (None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False])
    return partial(torch.ops.aten.convolution_backward, image(out), image(channels), weight, *settings)
