"""Does it train the same? DenseNet-BC on the handwritten digits, 5 seeds: naive, exact, fast, and what roundings do.

    PYTHONPATH=. python tests/bench/convergence.py --out tests/bench/results/convergence.csv

A row is a run: its losses and errors in evaluation mode and a digest of its final weights and buffers. "rough" is the
naive model from initial weights that differ by a rounding or two: by how much such differences alone grow. Finished
rows are kept and not run again; the run stops by itself before `--seconds`. On one core of a CPU the small network
takes some 20 minutes, DenseNet-BC-40 two hours: `--models` and `--variants` choose.
"""

import argparse
import itertools
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from provenance import software
from results_file import append_rows
from rows_table import load
from torch import nn

from tests import conftest as _  # noqa: F401, makes the command importable from the tree
from tests.digits import Change, roughly, small_digits, train_digits

import memopt  # isort: skip
from densenet_models import bc  # isort: skip

FIELDS = (
    "model", "variant", "seed", "steps", "train_loss", "train_error", "test_loss", "test_error", "digest", "device",
    "torch", "commit", "date",
)  # fmt: skip
SEEDS = range(5)


@dataclass(frozen=True)
class Work:
    """A network, what it is trained on, and for how long: a part of a schedule of so many epochs.

    Attributes:
        reduced: to images of this size, and so many of them; None for all as they are.
    """

    make: Callable[[], nn.Module]
    reduced: tuple[int, int] | None
    batch_size: int
    steps: int
    epochs: int


WORKS = {
    "DenseNet-BC-16 (k = 6)": Work(
        lambda: bc.DenseNet(depth=16, growth_rate=6, num_init_features=12), (16, 960), 32, 180, 6
    ),
    "DenseNet-BC-40 (k = 12)": Work(lambda: bc.DenseNet(depth=40), None, 64, 200, 9),
}


def _memopt(numerics: str) -> Change:
    return lambda model: memopt.apply(model, config=memopt.Config(numerics=numerics))


VARIANTS: dict[str, Change] = {
    "naive": lambda model: model,
    "rough": roughly,
    "exact": _memopt("exact"),
    "fast": _memopt("fast"),
}


def main() -> None:
    """Append the rows that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=3 * 3600.0)
    options = parser.parse_args()
    append_rows(options.out, FIELDS, rows(options), text)


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Those that the file lacks, until the deadline."""
    deadline = time.monotonic() + options.seconds
    done = {tuple(row[name] for name in ("model", "variant", "seed")) for row in load(options.out)}
    device = torch.device(options.device)
    for model, seed, variant in itertools.product(options.models, SEEDS, options.variants):
        if (model, variant, str(seed)) in done:
            continue
        if time.monotonic() > deadline:
            print("stopped: out of time")
            return
        work = WORKS[model]
        data = None if work.reduced is None else small_digits(*work.reduced)
        result = train_digits(
            work.make, VARIANTS[variant], seed, steps=work.steps, epochs=work.epochs, device=device, data=data,
            batch_size=work.batch_size,
        )  # fmt: skip
        yield {
            "model": model,
            "variant": variant,
            "seed": seed,
            "steps": work.steps,
            "train_loss": result.train.loss,
            "train_error": result.train.error,
            "test_loss": result.test.loss,
            "test_error": result.test.error,
            "digest": result.digest,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
            **software(),
        }


def text(row: dict[str, Any]) -> str:
    """A row as text."""
    figures = f"loss {row['train_loss']:.4f} test error {row['test_error']:.4f}"
    return f"{row['model']} {row['variant']} {row['seed']} {figures}"


if __name__ == "__main__":
    main()
