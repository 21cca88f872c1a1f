"""Predicted against measured memory of a training step, a row for each model and variant. Needs a GPU for minutes.

    PYTHONPATH=. python tests/bench/predicted_vs_measured.py --out tests/bench/results/predicted.csv

Rows marked as held out are configurations that nothing of the prediction was fitted to. Bytes; the error is
predicted / measured − 1. Each row is measured in a process of its own, some at a time: where CUDA places memory, and so
what is reserved, depends on what a process has given back before. `--only-prediction` fills in the predictions of a
file anew, without a GPU.
"""

import argparse
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from provenance import provenance
from results_file import write_rows
from rows_table import load
from torch import nn

import memopt
from densenet_models import bc, growing, signal, volumetric
from memopt.measure import GPU
from memopt.measure.memory import leave, measure_step
from memopt.measure.predict import predict

FIGURES = ("activation_peak_bytes", "peak_allocated_bytes", "peak_reserved_bytes", "saved_bytes")
FIELDS = (
    "model", "input", "amp", "variant", "held_out",
    *(f"{kind}_{name}" for name in FIGURES for kind in ("measured", "predicted")),
    "largest_peak_allocated_bytes", "unmeasured_workspaces", "gpu", "torch", "commit", "date",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Work:
    """A model with its input; `held_out` where nothing of the prediction was fitted to it."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    amp: torch.dtype | None = None
    channels_last: bool = False
    held_out: bool = False

    def make_model(self) -> nn.Module:
        """On the CPU."""
        return self._laid_out(self.make())

    def inputs(self) -> tuple[torch.Tensor]:
        """On the CPU."""
        return (self._laid_out(torch.randn(self.shape)),)

    def _laid_out(self, thing: Any) -> Any:
        return thing.to(memory_format=torch.channels_last) if self.channels_last else thing


WORKS = {
    "DenseNet-BC-100": Work(bc.DenseNet, (64, 3, 32, 32)),
    "DenseNet-BC-100, large batch": Work(bc.DenseNet, (512, 3, 32, 32)),
    "densenet121": Work(bc.densenet121, (64, 3, 224, 224)),
    "densenet121, channels-last": Work(bc.densenet121, (64, 3, 224, 224), torch.bfloat16, channels_last=True),
    "densenet121, autocast, contiguous": Work(bc.densenet121, (64, 3, 224, 224), torch.bfloat16),
    "densenet121, small batch": Work(bc.densenet121, (16, 3, 224, 224)),
    "DenseNet-BC-40, small batch": Work(lambda: bc.DenseNet(depth=40), (64, 3, 32, 32)),
    "DenseNet-BC-196": Work(lambda: bc.DenseNet(depth=196), (64, 3, 32, 32)),
    "volumetric, large": Work(volumetric.DenseNet, (2, 1, 64, 64, 64)),
    "volumetric, small batch": Work(volumetric.DenseNet, (2, 1, 48, 48, 48)),
    "signal": Work(signal.DenseNet, (64, 12, 4096)),
    "volumetric, tiny": Work(volumetric.DenseNet, (4, 1, 48, 48, 48)),
    "DenseNet-BC-76": Work(lambda: bc.DenseNet(depth=76), (112, 3, 32, 32)),
    "DenseNet-BC-160": Work(lambda: bc.DenseNet(depth=160), (80, 3, 32, 32)),
    "densenet169": Work(bc.densenet169, (20, 3, 224, 224)),
    "densenet121, autocast": Work(bc.densenet121, (40, 3, 192, 192), torch.bfloat16),
    "growing": Work(growing.DenseNet, (112, 3, 32, 32)),
    "volumetric": Work(volumetric.DenseNet, (3, 1, 80, 80, 80)),
    "signal, long": Work(signal.DenseNet, (48, 12, 6000)),
    "DenseNet-BC-124": Work(lambda: bc.DenseNet(depth=124), (72, 3, 32, 32)),
    "densenet169, other batch": Work(bc.densenet169, (28, 3, 224, 224)),
    "densenet121, autocast, other images": Work(bc.densenet121, (36, 3, 208, 208), torch.bfloat16),
    "growing, other batch": Work(growing.DenseNet, (100, 3, 32, 32)),
    "volumetric, other volumes": Work(volumetric.DenseNet, (3, 1, 72, 72, 72)),
    "signal, other length": Work(signal.DenseNet, (56, 12, 5000)),
    "DenseNet-BC-136": Work(lambda: bc.DenseNet(depth=136), (56, 3, 32, 32)),
    "densenet201": Work(bc.densenet201, (16, 3, 224, 224)),
    "densenet121, channels-last, other batch": Work(
        bc.densenet121, (48, 3, 224, 224), torch.bfloat16, channels_last=True
    ),
    "growing, large batch": Work(growing.DenseNet, (144, 3, 32, 32)),
    "volumetric, large volumes": Work(volumetric.DenseNet, (2, 1, 88, 88, 88)),
    "signal, small batch": Work(signal.DenseNet, (40, 12, 5000)),
    "DenseNet-BC-88": Work(lambda: bc.DenseNet(depth=88), (96, 3, 32, 32), held_out=True),
    "densenet169, channels-last": Work(
        bc.densenet169, (24, 3, 224, 224), torch.bfloat16, channels_last=True, held_out=True
    ),
    "densenet121, large images": Work(bc.densenet121, (20, 3, 288, 288), held_out=True),
    "growing, small batch": Work(growing.DenseNet, (72, 3, 32, 32), held_out=True),
    "volumetric, small volumes": Work(volumetric.DenseNet, (5, 1, 56, 56, 56), held_out=True),
    "signal, short": Work(signal.DenseNet, (88, 12, 3000), held_out=True),
}
"""Changing the input, the model or the dtype of a held-out row keeps it held out; fitting something to it does not.
That its convolutions' workspaces are measured one by one is no fitting: no figure of its step is looked at."""

VARIANTS: dict[str, memopt.Config | None] = {
    "naive": None,
    "exact concat": memopt.Config(numerics="exact", recompute="concat"),
    "exact layer": memopt.Config(numerics="exact", recompute="layer"),
    "fast layer": memopt.Config(numerics="fast", recompute="layer"),
}


def change_of(variant: str) -> Callable[[nn.Module], nn.Module]:
    """What a variant does to a model."""
    config = VARIANTS[variant]
    return leave if config is None else lambda model: memopt.apply(model, config=config)


def measured_row(model: str, variant: str) -> dict[str, Any]:
    """Measure a row on the GPU."""
    work = WORKS[model]
    change, remove = change_of(variant), memopt.remove if VARIANTS[variant] else leave
    cuda = torch.device("cuda")
    figures = measure_step(
        lambda: change(work.make_model().to(cuda)), work.inputs(), cuda, amp=work.amp, remove=remove, steps=1
    )
    return {
        "model": model,
        "input": "x".join(map(str, work.shape)),
        "amp": "" if work.amp is None else str(work.amp).removeprefix("torch."),
        "variant": variant,
        "held_out": work.held_out,
        **{f"measured_{name}": getattr(figures, name) for name in FIGURES},
        **provenance(),
    }


def measured_rows(pairs: Iterable[tuple[str, str]], processes: int, deadline: float) -> Iterator[dict[str, Any]]:
    """The rows of models and variants, in order; none is begun after the deadline."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, max_tasks_per_child=1) as pool:
        futures = [pool.submit(measured_row, *pair) for pair in pairs]
        for number, future in enumerate(futures):
            if time.monotonic() > deadline:
                for later in futures[number:]:
                    later.cancel()
            if not future.cancelled():
                yield future.result()


def with_prediction(row: dict[str, Any]) -> dict[str, Any]:
    """The row with what is predicted for it."""
    work = WORKS[row["model"]]
    target = replace(GPU, gpu=row["gpu"])
    prediction = predict(work.make_model, work.inputs(), target, amp=work.amp, apply=change_of(row["variant"]))
    return row | {
        **{f"predicted_{name}": getattr(prediction.figures, name) for name in FIGURES},
        "largest_peak_allocated_bytes": prediction.largest.peak_allocated_bytes,
        "unmeasured_workspaces": len(prediction.unmeasured),
    }


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    parts = [f"{row['model']:30s} {row['amp'] or 'fp32':9s} {row['variant']:13s}"]
    for name in FIGURES:
        measured, predicted = (row.get(f"{kind}_{name}") for kind in ("measured", "predicted"))
        if measured and predicted:
            error = 100 * (int(predicted) / int(measured) - 1)
            parts.append(f"{name.split('_')[1]:>9s} {int(measured) / 2**20:8,.0f} MiB {error:+5.1f}%")
    count = int(row.get("unmeasured_workspaces") or 0)
    note = f"upper bound {int(row['largest_peak_allocated_bytes']) / 2**20:,.0f} MiB allocated" if count else ""
    return "  ".join([*parts, note])


def main() -> None:
    """Measure, predict, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seconds", type=float, default=450.0, help="no row is begun after this; default: %(default)s")
    parser.add_argument("--processes", type=int, default=6)
    parser.add_argument("--no-prediction", action="store_true")
    parser.add_argument("--only-prediction", action="store_true")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    rows: list[dict[str, Any]] = []
    if options.only_prediction:
        rows = [row for row in load(options.out) if row["model"] in options.models]
        work = (with_prediction(row) for row in rows)
    else:
        pairs = [(model, variant) for model in options.models for variant in options.variants]
        measured = measured_rows(pairs, options.processes, deadline)
        work = (row if options.no_prediction else with_prediction(row) for row in measured)
    done = []
    for row in work:
        print(line(row), flush=True)
        done.append(row)
        write_rows(options.out, FIELDS, [*done, *rows[len(done) :]])


if __name__ == "__main__":
    main()
