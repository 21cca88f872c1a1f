"""Which tiles are fastest for the fused kernels, shape by shape: what `tiles.py` was written from. Needs a GPU.

    PYTHONPATH=. python tests/bench/search_tiles.py --out tiles.csv --near
    PYTHONPATH=. python tests/bench/search_tiles.py --out tiles.csv --kernels norm_act_sums moments --old ../before

Compiles in as many processes as there are cores, then times every choice alone, and prints the present choice (`now`)
and the best of each shape; of a weight gradient also cuDNN's time. With `--old`, the present choice of another
checkout, timed first on the same GPU, is `old`. `--near` tries fewer choices for kernels that multiply. Microseconds;
`floor` is what reading the inputs and writing the outputs once takes at 4.2 TB/s.
"""

import argparse
import csv
import inspect
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton

from memopt.runtime.kernels import tiles
from tests.bench.tile_jobs import CHOOSERS, SHAPES, Job, arguments, choices, floor, library, module_of

FIELDS = ("kernel", "dtype", "shape", "positions", "inner", "warps", "stages", "programs", "sums_by_row", "us")
PRESENT = {name: getattr(tiles, name) for name in CHOOSERS.values() if hasattr(tiles, name)}


def prepare(job: Job, device: str) -> Callable[[], Any]:
    """A launch with the job's tiles, or those that the kernel chooses itself."""
    chooser, chosen = CHOOSERS[job.kernel], job.tiles
    if chosen is not None:
        setattr(tiles, chooser, lambda *_: chosen)
    elif chooser in PRESENT:
        setattr(tiles, chooser, PRESENT[chooser])
    given = arguments(job, device)
    launch = module_of(job).launch
    wanted = inspect.signature(launch).parameters
    if job.kernel.endswith("averaged") and "window" not in wanted:
        raise KeyError("another checkout's kernel, which cannot do this")
    own = {name: given[name] for name in wanted}

    def run() -> None:
        launch(**own)
        if "parts" in given and "parts" not in wanted and given["gradient"] is not None:
            given["gradient"].copy_(given["parts"].sum(0).view(given["gradient"].shape))

    return run


class Compiler:
    """In the place of a kernel: compiles it, and does not run it."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: self.kernel.warmup(*args, grid=grid, **kwargs)


def compile_one(job: Job) -> None:
    module: Any = module_of(job)
    # The tensors here are on no device, but what is compiled depends on the GPU.
    own = torch.cuda.get_device_capability()
    tiles.capability = lambda device: own  # type: ignore[assignment]
    kernel = module._kernel
    module._kernel = Compiler(kernel.jit)
    try:
        prepare(job, "meta")()
    except Exception as error:
        print(type(error).__name__, error, job, flush=True)
    finally:
        module._kernel = kernel


def microseconds(job: Job) -> float | None:
    """Median of a launch; None where the tiles do not fit."""
    try:
        run = prepare(job, "cuda")
        run()
        seconds: Any = triton.testing.do_bench(run, warmup=1, rep=3, return_mode="median")
    except triton.runtime.errors.OutOfResources:
        return None
    return 1e3 * float(seconds)


def describe(job: Job, time_us: float) -> str:
    t = job.tiles
    if t is None:
        return f"now {time_us:.0f}"
    by_row = ",by row" if t.sums_by_row else ""
    return f"{time_us:.0f}:{t.positions},{t.inner},{t.warps},{t.stages},{t.programs}{by_row}"


def present_jobs(kernels: Iterable[str], dtypes: Iterable[str]) -> list[Job]:
    """Every kernel, shape and type, with the tiles that it chooses itself."""
    return [
        Job(kernel, shape, getattr(torch, dtype), None)
        for dtype in dtypes
        for kernel in kernels
        for shape in SHAPES[kernel]
    ]


def times_of_present(found: list[Job]) -> dict[str, float]:
    """By kernel, type and shape, for a checkout that may lack some kernels."""
    times: dict[str, float] = {}
    for job in found:
        try:
            time_us = microseconds(job)
        except (ModuleNotFoundError, KeyError):
            continue
        if time_us is not None:
            times[job.key] = time_us
    return times


def times_of_old(checkout: Path, kernels: list[str], dtypes: list[str]) -> dict[str, float]:
    """What `times_of_present` says with another checkout's kernels."""
    here = str(Path(__file__).parents[2])
    command = [sys.executable, __file__, "--out", os.devnull, "--present", "--kernels", *kernels, "--dtypes", *dtypes]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(checkout.resolve()), here])}
    done = subprocess.run(command, env=environment, cwd=checkout, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{checkout}: nothing came of its kernels:\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def compile_all(groups: list[list[Job]]) -> int:
    """How many compilations there are; sizes matter to them by whether 16 divides them."""
    distinct = {
        (j.kernel, j.dtype, replace(j.tiles, programs=0), tiles.unit(*j.shape[1:3])): j
        for group in groups
        for j in group
        if j.tiles is not None
    }
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=get_context("spawn")) as pool:
        list(pool.map(compile_one, distinct.values(), chunksize=4))
    return len(distinct)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kernels", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--seconds", type=float, default=400)
    parser.add_argument("--near", action="store_true")
    parser.add_argument("--old", type=Path, help="another checkout, whose present choices are timed, too")
    parser.add_argument("--present", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    start = time.monotonic()
    present = present_jobs(options.kernels, options.dtypes)
    if options.present:
        print(json.dumps(times_of_present(present)))
        return
    old = {} if options.old is None else times_of_old(options.old, options.kernels, options.dtypes)
    groups = [[job, *(replace(job, tiles=t) for t in choices(job, options.near))] for job in present]
    print(f"{compile_all(groups)} compiled in {time.monotonic() - start:.0f} s", flush=True)
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
                    writer.writerow([job.kernel, job.dtype, job.size, *job.row, time_us])
            file.flush()
            now, rest = found[:1], sorted(found[1:], key=lambda pair: pair[0])[:6]
            if (other := library(group[0])) is not None:
                library_us = 1e3 * triton.testing.do_bench(other, warmup=1, rep=3, return_mode="median")
                print(f"{group[0].key} cuDNN: {library_us:.0f}")
            before = f"old {old[group[0].key]:.0f} " if group[0].key in old else ""
            best = " ".join(describe(job, time_us) for time_us, job in now + rest)
            print(f"{group[0].key} floor {floor(group[0]):.0f}: {before}{best}", flush=True)


if __name__ == "__main__":
    main()
