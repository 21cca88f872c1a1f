"""Which tiles are fastest for the two matmul kernels, shape by shape: what `tiles.py` was written from. Needs a GPU.

    PYTHONPATH=. python tests/bench/search_tiles.py --out tiles.csv

Compiles in as many processes as there are cores, then times every choice alone. Microseconds; `floor` is what reading
the inputs and writing the outputs once takes at 4.2 TB/s.
"""

import argparse
import csv
import os
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton

from memopt.runtime.kernels import norm_act_matmul as forward
from memopt.runtime.kernels import norm_act_matmul_backward as backward
from memopt.runtime.kernels import tiles
from memopt.runtime.kernels.tiles import Tiles, cdiv, padded

BYTES_PER_SECOND = 4.2e12
SHAPES = (
    (524288, 60, 48),
    (524288, 132, 48),
    (524288, 204, 48),
    (131072, 276, 48),
    (32768, 330, 48),
    (524288, 216, 108),
    (200704, 96, 128),
    (200704, 224, 128),
    (50176, 384, 128),
    (12544, 640, 128),
    (3136, 768, 128),
)
"""Positions, channels read, channels made."""
PROGRAMS = tiles.PROGRAMS
Choice = tuple[Tiles, float]


def choices(kernel: str, out: int) -> list[Choice]:
    outer = max(16, tiles.power_of_two(out))
    if kernel == "forward":
        grid = product((64, 128, 256), (32, 64), (4, 8), (2, 3, 4))
        return [(Tiles(p, i, outer, w, s), 1.0) for p, i, w, s in grid]
    grid = product((32, 64, 128), (32, 64), (4, 8), (1, 2, 3))
    return [(Tiles(p, i, outer, w, s), f) for p, i, w, s in grid for f in (1.0, 2.0, 0.5)]


def prepare(kernel: str, shape: tuple[int, int, int], dtype: torch.dtype, choice: Choice, device: str) -> Any:
    """The arguments of a launch with these tiles."""
    positions, channels, out = shape
    chosen, factor = choice
    tiles.PROGRAMS = int(PROGRAMS * factor)
    tiles.matmul_forward = tiles.matmul_backward = lambda *_: chosen

    def arena(kind: torch.dtype) -> torch.Tensor:
        return torch.zeros(positions, padded(2 * channels), dtype=kind, device=device)[:, :channels]

    x, y = arena(dtype), torch.zeros(positions, out, dtype=dtype, device=device)
    norm = [torch.ones(channels, device=device) for _ in range(4)]
    matrix = torch.ones(out, channels, device=device)
    if kernel == "forward":
        moments = torch.zeros(2, out, cdiv(positions, chosen.positions), device=device)
        return forward, (x, *norm, 1e-5, 1, 0.0, matrix, None, True, y, moments)
    count = backward.part_count(positions, channels, out, dtype.itemsize)
    parts, sums = torch.zeros(count, out, channels, device=device), torch.zeros(2, channels, count, device=device)
    return backward, (y, x, *norm, 1e-5, 1, 0.0, matrix, True, arena(torch.float32), parts, sums)


class Compiler:
    """In the place of a kernel: compiles it, and does not run it."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: self.kernel.warmup(*args, grid=grid, **kwargs)


def compile_one(job: tuple[str, tuple[int, int, int], torch.dtype, Choice]) -> None:
    module, arguments = prepare(*job, "meta")
    kernel = module._kernel
    module._kernel = Compiler(kernel)
    try:
        module.launch(*arguments)
    except Exception as error:
        print(type(error).__name__, job, flush=True)
    finally:
        module._kernel = kernel


def floor(kernel: str, shape: tuple[int, int, int], dtype: torch.dtype) -> float:
    positions, channels, out = shape
    item = dtype.itemsize
    moved = (channels + out) * item + (8 * channels if kernel == "backward" else 0)
    return positions * moved / BYTES_PER_SECOND * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kernels", nargs="+", default=["forward", "backward"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--seconds", type=float, default=400)
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    dtypes = [getattr(torch, name) for name in options.dtypes]
    jobs = [(k, s, d, c) for k in options.kernels for s in SHAPES for d in dtypes for c in choices(k, s[2])]
    distinct: dict[Any, Any] = {}
    for job in jobs:
        kernel, shape, dtype, (chosen, _) = job
        distinct.setdefault((kernel, dtype, chosen, *(n % 16 == 0 for n in shape[1:])), job)
    start = time.monotonic()
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=get_context("spawn")) as pool:
        list(pool.map(compile_one, distinct.values()))
    print(f"{len(distinct)} compiled in {time.monotonic() - start:.0f} s", flush=True)
    with options.out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(
            ["kernel", "dtype", "positions", "channels", "out", "rows", "inner", "outer", "warps", "stages"]
        )
        for kernel, shape, dtype in product(options.kernels, SHAPES, dtypes):
            found = []
            for choice in choices(kernel, shape[2]):
                if time.monotonic() > deadline:
                    print("out of time")
                    return
                try:
                    module, arguments = prepare(kernel, shape, dtype, choice, "cuda")
                    run = lambda m=module, a=arguments: m.launch(*a)  # noqa: E731
                    run()
                    time_us = 1e3 * triton.testing.do_bench(run, warmup=1, rep=4, return_mode="median")
                except Exception as error:
                    print(type(error).__name__, kernel, shape, choice, flush=True)
                    continue
                found.append((time_us, choice))
                t = choice[0]
                writer.writerow(
                    [kernel, dtype, *shape, t.positions, t.inner, t.outer, t.warps, t.stages, choice[1], time_us]
                )
            file.flush()
            found.sort(key=lambda pair: pair[0])
            least = floor(kernel, shape, dtype)
            print(
                f"{kernel} {dtype} {shape} floor {least:.0f}",
                *(f"{t:.0f}:{c[0].positions},{c[0].inner},{c[0].warps},{c[0].stages},{c[1]}" for t, c in found[:6]),
                flush=True,
            )


if __name__ == "__main__":
    main()
