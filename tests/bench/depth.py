"""How deep a DenseNet-BC (k = 12) trains within a given memory, and how long memopt needs before its first step.

    PYTHONPATH=. python tests/bench/depth.py 2002 --out tests/bench/results/deepest.csv

Batch 64 at 32×32, float32, the caching allocator capped (`--cap-gib`, parameters, gradients and optimiser state
included). Per depth and variant one row: seconds of `memopt.apply` with example inputs (capture, planning and
verification) and of the first step (which compiles kernels), the median of the steps after it, the peaks, and what
`explain` had to say. "out of memory" in `outcome` is a result, too. Needs a GPU.
"""

import argparse
import cProfile
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from provenance import provenance
from results_file import append_rows
from torch import nn
from train_step import DEVICE, VARIANTS

import memopt
from densenet_models import bc
from memopt.measure.memory import clean, is_out_of_memory
from memopt.measure.step import TrainingStep, on_device, seeded

FIELDS = (
    "depth", "variant", "lazy", "cap_bytes", "outcome", "apply_seconds", "first_step_seconds", "step_seconds",
    "peak_allocated_bytes", "peak_reserved_bytes", "notes", "gpu", "torch", "commit", "date",
)  # fmt: skip
GIB = 2**30
STEPS = 3


def row(depth: int, variant: str, cap_bytes: int, lazy: bool, profiler: cProfile.Profile | None) -> dict[str, Any]:
    """Train for a few steps and say how it went."""
    result: dict[str, Any] = dict.fromkeys(FIELDS) | {"depth": depth, "variant": variant, "lazy": lazy}
    result["cap_bytes"] = cap_bytes
    clean(DEVICE)
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction(cap_bytes / total)
    try:
        _train(depth, variant, lazy, profiler, result)
        result["outcome"] = "trained"
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        result["outcome"] = "out of memory"
    finally:
        result["peak_allocated_bytes"] = torch.cuda.max_memory_allocated()
        result["peak_reserved_bytes"] = torch.cuda.max_memory_reserved()
        torch.cuda.set_per_process_memory_fraction(1.0)
    clean(DEVICE)
    return result | provenance()


def _train(depth: int, variant: str, lazy: bool, profiler: cProfile.Profile | None, result: dict[str, Any]) -> None:
    with seeded(0, DEVICE):
        model: nn.Module = bc.DenseNet(depth=depth).to(DEVICE)
        inputs = on_device((torch.randn(64, 3, 32, 32),), DEVICE)
        torch.optim.SGD(model.parameters(), lr=0.1)  # imports what training imports: seconds in a fresh environment
        start = time.perf_counter()
        if variant.startswith("memopt"):
            _, numerics, level = variant.split()
            examples = None if lazy else inputs
            with profiler or nullcontext():
                memopt.apply(model, examples, config=memopt.Config(numerics=numerics, recompute=level))
            torch.cuda.synchronize()
            result["apply_seconds"] = time.perf_counter() - start
            result["notes"] = " ".join(memopt.explain(model).notes)
        else:
            model = VARIANTS[variant](model)
        clean(DEVICE)
        step = TrainingStep(model, inputs)
        result["first_step_seconds"], *rest = [_timed(step) for _ in range(1 + STEPS)]
        result["step_seconds"] = statistics.median(rest)


def _timed(step: TrainingStep) -> float:
    start = time.perf_counter()
    step.run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Try the depths named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("depths", nargs="+", type=int, help="6n + 4 layers")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["memopt fast layer"])
    parser.add_argument("--lazy", action="store_true", help="apply without example inputs: the first step does it all")
    parser.add_argument("--profile", type=Path, help="write where apply's time goes, for pstats; it takes longer then")
    parser.add_argument("--cap-gib", type=float, default=12.0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    pairs = ((depth, variant) for depth in options.depths for variant in options.variants)
    profiler = cProfile.Profile() if options.profile else None
    made = (row(*pair, int(options.cap_gib * GIB), options.lazy, profiler) for pair in pairs)
    append_rows(options.out, FIELDS, made, lambda row: {key: value for key, value in row.items() if value is not None})
    if profiler is not None:
        profiler.dump_stats(options.profile)


if __name__ == "__main__":
    main()
