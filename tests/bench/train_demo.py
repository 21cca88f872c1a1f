"""Training end to end, the loader running: DenseNet-BC-100, batch 64, naive, exact and fast. Needs a GPU.

    PYTHONPATH=. python tests/bench/train_demo.py --out tests/bench/results/train_demo.csv

The loop, the batches and the augmentation are those of `memopt train`; the images are the digits. Bytes and seconds.
`activation_peak_bytes` is the peak allocated while training minus what is allocated between steps; `step_seconds` the
wall time of a step, the loader included; `loading_seconds` the part of it in which the loop waited for a batch;
`gpu_seconds` the summed time of all kernels of a step. The variants take turns of some steps each, because the speed of
a host's processor changes from second to second; times are medians of the turns. Memory is measured before, each
variant alone.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from provenance import provenance
from results_file import append_rows
from torch import nn
from torch.profiler import ProfilerActivity, profile

import memopt
from densenet_models import bc
from densenet_models.train import Batch, Recipe, Trainer
from memopt.measure.memory import clean
from memopt.measure.step import seeded
from tests import conftest as _  # noqa: F401, makes the command importable from the tree

from memopt_cli.train import digits  # isort: skip
from memopt_cli.train.batches import Batches, Share  # isort: skip

FIELDS = (
    "variant", "batch", "steps", "activation_peak_bytes", "peak_allocated_bytes", "step_seconds", "loading_seconds",
    "gpu_seconds", "memory_ratio", "step_ratio", "gpu_ratio", "loading_share", "gpu", "torch", "commit", "date",
)  # fmt: skip
DEVICE = torch.device("cuda")
BATCH_SIZE, WARMUP, STEPS, TURNS = 64, 10, 20, 9
Change = Callable[[nn.Module], nn.Module]


def _memopt(numerics: str) -> Change:
    return lambda model: memopt.apply(model, config=memopt.Config(numerics=numerics))


VARIANTS: dict[str, Change] = {"naive": lambda model: model, "exact": _memopt("exact"), "fast": _memopt("fast")}


class Loader:
    """Endless training batches, and how long the loop waited for them."""

    def __init__(self) -> None:
        data = digits.load()
        batches = Batches(data, BATCH_SIZE, Share(), seed=0, augment=True, device=DEVICE)
        epochs = (batches.training(data.train, epoch) for epoch in itertools.count())
        self._batches: Iterator[Batch] = itertools.chain.from_iterable(epochs)
        self.waited_seconds = 0.0

    def take(self, count: int) -> Iterator[Batch]:
        """The next batches."""
        for _number in range(count):
            start = time.perf_counter()
            batch = next(self._batches)
            self.waited_seconds += time.perf_counter() - start
            yield batch


@dataclass(slots=True)
class Run:
    """A variant in training."""

    trainer: Trainer
    loader: Loader
    activation_peak_bytes: int = 0
    peak_allocated_bytes: int = 0
    step_seconds: list[float] = field(default_factory=list)
    loading_seconds: list[float] = field(default_factory=list)

    def take_turn(self) -> None:
        """Train for some steps and note the time."""
        self.loader.waited_seconds = 0.0
        start = time.perf_counter()
        _train(self.trainer, self.loader, STEPS)
        self.step_seconds.append((time.perf_counter() - start) / STEPS)
        self.loading_seconds.append(self.loader.waited_seconds / STEPS)

    def figures(self) -> dict[str, Any]:
        """Of a row."""
        return {
            "activation_peak_bytes": self.activation_peak_bytes,
            "peak_allocated_bytes": self.peak_allocated_bytes,
            "step_seconds": statistics.median(self.step_seconds),
            "loading_seconds": statistics.median(self.loading_seconds),
            "gpu_seconds": _gpu_seconds(self.trainer, self.loader),
        }


def start(change: Change) -> Run:
    """A variant warmed up, with what it allocates alone."""
    clean(DEVICE)
    others_bytes = torch.cuda.memory_allocated(DEVICE)
    with seeded(0, DEVICE):
        run = Run(Trainer(change(bc.DenseNet().to(DEVICE)), Recipe()), Loader())
    _train(run.trainer, run.loader, WARMUP)
    between_steps_bytes = torch.cuda.memory_allocated(DEVICE)
    torch.cuda.reset_peak_memory_stats(DEVICE)
    _train(run.trainer, run.loader, STEPS)
    peak_bytes = torch.cuda.max_memory_allocated(DEVICE)
    run.activation_peak_bytes = peak_bytes - between_steps_bytes
    run.peak_allocated_bytes = peak_bytes - others_bytes
    return run


def _train(trainer: Trainer, loader: Loader, steps: int) -> None:
    trainer.train(loader.take(steps), lambda done: None, lambda: False)
    torch.cuda.synchronize(DEVICE)


def _gpu_seconds(trainer: Trainer, loader: Loader, steps: int = 3) -> float:
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        _train(trainer, loader, steps)
    kernels = [e for e in trace.events() or [] if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(float(event.device_time) for event in kernels) * 1e-6 / steps


def main() -> None:
    """Measure the variants and append their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    append_rows(options.out, FIELDS, rows(), _line)


def rows() -> Iterator[dict[str, Any]]:
    """One row a variant, naive first."""
    runs = {variant: start(change) for variant, change in VARIANTS.items()}
    for _turn in range(TURNS):
        for run in runs.values():
            run.take_turn()
    naive: dict[str, Any] = {}
    for variant, run in runs.items():
        figures = run.figures()
        naive = naive or figures
        yield {
            "variant": variant,
            "batch": BATCH_SIZE,
            "steps": TURNS * STEPS,
            **figures,
            "memory_ratio": figures["activation_peak_bytes"] / naive["activation_peak_bytes"],
            "step_ratio": figures["step_seconds"] / naive["step_seconds"],
            "gpu_ratio": figures["gpu_seconds"] / naive["gpu_seconds"],
            "loading_share": figures["loading_seconds"] / figures["step_seconds"],
            **provenance(),
        }


def _line(row: dict[str, Any]) -> str:
    mib = row["activation_peak_bytes"] / 2**20
    return (
        f"{row['variant']:6s} activation {mib:7,.0f} MiB ({row['memory_ratio']:.3f} ×)  "
        f"step {row['step_seconds'] * 1e3:6.1f} ms ({row['step_ratio']:.2f} ×), waiting for batches "
        f"{row['loading_share']:.1%}  GPU {row['gpu_seconds'] * 1e3:6.1f} ms ({row['gpu_ratio']:.2f} ×)"
    )


if __name__ == "__main__":
    main()
