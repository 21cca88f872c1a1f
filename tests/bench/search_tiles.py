"""Which tiles are fastest for the kernels that multiply, shape by shape: what `tiles.py` was written from. Needs a GPU.

    PYTHONPATH=. python tests/bench/search_tiles.py --out tiles.csv

Compiles in as many processes as there are cores, then times every choice alone, and prints the best of each shape.
Microseconds; `floor` is what reading the inputs and writing the outputs once takes at 4.2 TB/s.
"""

import argparse
import csv
import os
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton

from memopt.runtime.kernels import (
    norm_act_conv,
    norm_act_conv_backward,
    norm_act_matmul,
    norm_act_matmul_backward,
    tiles,
)
from memopt.runtime.kernels.pack_taps import packed_size
from memopt.runtime.kernels.tiles import Tiles, cdiv, padded

BYTES_PER_SECOND = 4.2e12
Shape = tuple[int, ...]
MATMUL_SHAPES = (
    (524288, 132, 48),
    (131072, 276, 48),
    (524288, 216, 108),
    (200704, 224, 128),
    (50176, 384, 128),
    (3136, 768, 128),
)
"""Positions, channels read, channels made."""
CONV_SHAPES = ((524288, 48, 12, 32), (131072, 48, 12, 16), (200704, 128, 32, 56), (12544, 128, 32, 14))
"""The same, and the width and height of an image."""
FIELDS = ("kernel", "dtype", "shape", "positions", "inner", "warps", "stages", "programs", "us")


@dataclass(frozen=True)
class Job:
    kernel: str
    shape: Shape
    dtype: torch.dtype
    tiles: Tiles


def choices(kernel: str, out_channels: int) -> list[Tiles]:
    outer = max(16, tiles.power_of_two(out_channels))
    if kernel in ("norm_act_matmul", "norm_act_conv"):
        return [Tiles(p, i, outer, w, s) for p, i, w, s in product((128, 256), (32, 64), (4, 8), (1, 2, 3, 4))]
    grid = product((32, 64, 128), (32, 64), (4, 8), (1, 2, 3), (264, 528, 1056))
    return [Tiles(p, i, outer, w, s, n) for p, i, w, s, n in grid if p * i <= 4096]


def prepare(job: Job, device: str) -> tuple[Any, tuple[Any, ...]]:
    """The kernel's file, and the arguments of a launch with these tiles."""
    positions, channels, out = job.shape[:3]
    chosen = job.tiles
    tiles.matmul_forward = tiles.matmul_backward = tiles.conv_forward = tiles.conv_backward = lambda *_: chosen
    item = job.dtype.itemsize

    def matrix(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(size, dtype=dtype, device=device)

    def arena(dtype: torch.dtype) -> torch.Tensor:
        return matrix(positions, padded(2 * channels), dtype=dtype)[:, :channels]

    norm = (*(matrix(channels) for _ in range(4)), 1e-5, 1, 0.0)
    y = matrix(positions, out, dtype=job.dtype)
    if job.kernel == "norm_act_matmul":
        moments = matrix(2, out, cdiv(positions, chosen.positions))
        return norm_act_matmul, (arena(job.dtype), *norm, matrix(out, channels), None, True, y, moments)
    if job.kernel == "norm_act_matmul_backward":
        count = norm_act_matmul_backward.part_count(positions, channels, out, item)
        written = (arena(torch.float32), matrix(count, out, channels), matrix(2, channels, count))
        return norm_act_matmul_backward, (
            y, arena(job.dtype), *norm, matrix(out, channels), True, True, *written,
        )  # fmt: skip
    size = packed_size(torch.empty(out, channels, 3, 3, device="meta"))
    taps, x, width = matrix(*size, dtype=job.dtype), matrix(positions, channels, dtype=job.dtype), job.shape[3]
    if job.kernel == "norm_act_conv":
        slot = matrix(positions, 224, dtype=job.dtype)[:, 96 : 96 + out]
        rows = norm_act_conv.part_rows(width, channels, item, True)
        return norm_act_conv, (
            x, *norm, taps, None, width, width, True, slot, matrix(2, out, cdiv(positions, rows)),
        )  # fmt: skip
    count = norm_act_conv_backward.part_count(positions, channels, item)
    written = (torch.zeros_like(x), matrix(count, 3, size[2], channels), matrix(2, channels, count))
    return norm_act_conv_backward, (y, x, *norm, taps, width, width, True, True, False, *written)


class Compiler:
    """In the place of a kernel: compiles it, and does not run it."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: self.kernel.warmup(*args, grid=grid, **kwargs)


def compile_one(job: Job) -> None:
    module, arguments = prepare(job, "meta")
    kernel = module._kernel
    module._kernel = Compiler(kernel.jit)
    try:
        module.launch(*arguments)
    except Exception as error:
        print(type(error).__name__, error, job, flush=True)
    finally:
        module._kernel = kernel


def floor(job: Job) -> float:
    positions, channels, out = job.shape[:3]
    item = job.dtype.itemsize
    moved = (channels + out) * item
    if job.kernel == "norm_act_matmul_backward":
        moved += 8 * channels
    elif job.kernel == "norm_act_conv_backward":
        moved += channels * item
    return positions * moved / BYTES_PER_SECOND * 1e6


def microseconds(job: Job) -> float | None:
    """Median of a launch; None where the tiles do not fit."""
    try:
        module, arguments = prepare(job, "cuda")
        module.launch(*arguments)
        seconds: Any = triton.testing.do_bench(lambda: module.launch(*arguments), warmup=1, rep=3, return_mode="median")
    except triton.runtime.errors.OutOfResources:
        return None
    return 1e3 * float(seconds)


def describe(job: Job, time_us: float) -> str:
    t = job.tiles
    return f"{time_us:.0f}:{t.positions},{t.inner},{t.warps},{t.stages},{t.programs}"


def jobs(kernels: Iterable[str], dtypes: Iterable[torch.dtype]) -> list[list[Job]]:
    """Of every kernel, shape and type, the choices."""
    return [
        [Job(kernel, shape, dtype, choice) for choice in choices(kernel, shape[2])]
        for dtype in dtypes
        for kernel in kernels
        for shape in (CONV_SHAPES if "conv" in kernel else MATMUL_SHAPES)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("norm_act_matmul", "norm_act_matmul_backward", "norm_act_conv", "norm_act_conv_backward")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kernels", nargs="+", default=names)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--seconds", type=float, default=400)
    options = parser.parse_args()
    start = time.monotonic()
    groups = jobs(options.kernels, [getattr(torch, name) for name in options.dtypes])
    distinct = {
        (j.kernel, j.dtype, replace(j.tiles, programs=0), tiles.unit(*j.shape[1:3])): j
        for group in groups
        for j in group
    }
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=get_context("spawn")) as pool:
        list(pool.map(compile_one, distinct.values(), chunksize=4))
    print(f"{len(distinct)} compiled in {time.monotonic() - start:.0f} s", flush=True)
    with options.out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(FIELDS)
        for group in groups:
            found = []
            for job in group:
                if time.monotonic() - start > options.seconds:
                    print("out of time")
                    return
                if (time_us := microseconds(job)) is not None:
                    found.append((time_us, job))
                    shape, t = "x".join(map(str, job.shape)), job.tiles
                    sizes = (t.positions, t.inner, t.warps, t.stages, t.programs)
                    writer.writerow([job.kernel, job.dtype, shape, *sizes, time_us])
            file.flush()
            found.sort(key=lambda pair: pair[0])
            best = " ".join(describe(job, time_us) for time_us, job in found[:8])
            print(
                f"{group[0].kernel} {group[0].dtype} {group[0].shape} floor {floor(group[0]):.0f}: {best}", flush=True
            )


if __name__ == "__main__":
    main()
