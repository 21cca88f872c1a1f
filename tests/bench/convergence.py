"""Does it train the same? DenseNet-BC on the handwritten digits, 5 seeds: naive, exact, fast, and what roundings do.

    PYTHONPATH=. python tests/bench/convergence.py --out tests/bench/results/convergence.csv

A row is a run: its losses and errors in evaluation mode and a digest of its final weights and buffers. "rough" is the
naive model from initial weights that differ by a rounding or two: by how much such differences alone grow. Finished
rows are kept and not run again; the run stops by itself before `--seconds`.
"""

import argparse
import csv
import platform
import time
from pathlib import Path

import torch
from provenance import software
from torch import nn

from tests import conftest as _  # noqa: F401, makes the command importable from the tree
from tests.digits import Change, roughly, small_digits, train_digits

import memopt  # isort: skip
from densenet_models import bc  # isort: skip

FIELDS = (
    "variant", "seed", "steps", "train_loss", "train_error", "test_loss", "test_error", "digest", "device", "torch",
    "commit", "date",
)  # fmt: skip
SEEDS = range(5)
DEPTH, GROWTH_RATE, SIZE, IMAGES, BATCH_SIZE, EPOCHS = 16, 6, 16, 960, 32, 6


def make_model() -> nn.Module:
    """The network of every row."""
    return bc.DenseNet(depth=DEPTH, growth_rate=GROWTH_RATE, num_init_features=12)


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
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=3600.0)
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    device = torch.device(options.device)
    done = _done(options.out)
    data = small_digits(SIZE, IMAGES)
    steps = EPOCHS * (IMAGES // BATCH_SIZE)
    with options.out.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if not done:
            writer.writeheader()
        for seed in SEEDS:
            for variant, change in VARIANTS.items():
                if (variant, str(seed)) in done:
                    continue
                if time.monotonic() > deadline:
                    print("stopped: out of time")
                    return
                result = train_digits(
                    make_model, change, seed, steps=steps, epochs=EPOCHS, device=device, data=data,
                    batch_size=BATCH_SIZE,
                )  # fmt: skip
                row = {
                    "variant": variant,
                    "seed": seed,
                    "steps": steps,
                    "train_loss": result.train.loss,
                    "train_error": result.train.error,
                    "test_loss": result.test.loss,
                    "test_error": result.test.error,
                    "digest": result.digest,
                    "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
                    **software(),
                }
                writer.writerow(row)
                file.flush()
                print(variant, seed, f"loss {result.train.loss:.4f} test error {result.test.error:.4f}", flush=True)


def _done(path: Path) -> set[tuple[str, str]]:
    if not path.exists():
        return set()
    with path.open(newline="") as file:
        return {(row["variant"], row["seed"]) for row in csv.DictReader(file)}


if __name__ == "__main__":
    main()
