"""What cuDNN's convolutions take for the time of a call: makes the table that predictions read.

    PYTHONPATH=. python tests/bench/measure_workspaces.py --collect    # without a GPU: which convolutions there are
    PYTHONPATH=. python tests/bench/measure_workspaces.py              # on a GPU: measure what was not, some minutes

The table is `memopt/measure/workspaces.csv`: every convolution of the models that predictions are compared for, and
those that fused kernels leave to cuDNN in the models that are shipped, with usual batch sizes. A convolution has a row
for each GPU that it was measured on, and one without `workspace_bytes` where it was on none. `--again` measures what
was measured on this GPU before; `--out` writes the table elsewhere.
"""

import argparse
import csv
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from predicted_vs_measured import VARIANTS, WORKS, Work, change_of
from provenance import provenance

from densenet_models import bc, growing, plain, signal, volumetric
from memopt.measure.predict import predict
from memopt.measure.workspaces import DATA_GRADIENT, FORWARD, TABLE, ConvolutionCall, as_row

OWN = ("workspace_bytes", "gpu", "torch", "cudnn")
FIELDS = (*(field.name for field in fields(ConvolutionCall)), *OWN)


BATCHES = (8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 192, 256)
SMALL_BATCHES = (1, 2, 3, 4, 8)
"""Of volumes."""
SIDES = (192, 256, 320)
"""Of images beside the usual 224."""
DEEP, LARGE = (1000, 1498, 2002, 2266, 2500, 3004, 3250), (512, 1024, 2090, 4521)
"""Depths and batches towards the largest that train in 12 GiB."""


def usual() -> Iterator[tuple[str, Work]]:
    """Shipped models with usual batch sizes."""
    images = {
        "BC-40": lambda: bc.DenseNet(depth=40),
        "BC-100": bc.DenseNet,
        "growing": growing.DenseNet,
        "plain": plain.DenseNet,
    }
    for batch in BATCHES:
        for name, make in images.items():
            yield f"{name} {batch}", Work(make, (batch, 3, 32, 32))
        for make in (bc.densenet121, bc.densenet169):
            shape = (batch, 3, 224, 224)
            yield f"{make.__name__} {batch}", Work(make, shape)
            yield f"{make.__name__} bf16 {batch}", Work(make, shape, torch.bfloat16)
            yield f"{make.__name__} bf16 channels-last {batch}", Work(make, shape, torch.bfloat16, channels_last=True)
        for length in (2048, 4096, 5000, 8192)[: 4 if batch <= 64 else 2]:
            yield f"signal {batch} {length}", Work(signal.DenseNet, (batch, 12, length))
    for depth in DEEP:
        yield f"BC-{depth} 64", Work(lambda depth=depth: bc.DenseNet(depth=depth), (64, 3, 32, 32))
    for batch in LARGE:
        yield f"BC-100 {batch}", Work(bc.DenseNet, (batch, 3, 32, 32))
    for batch in (16, 32, 64):
        for side in SIDES:
            shape = (batch, 3, side, side)
            yield f"densenet121 {batch} {side}", Work(bc.densenet121, shape)
            yield f"densenet121 bf16 {batch} {side}", Work(bc.densenet121, shape, torch.bfloat16)
    for batch in SMALL_BATCHES:
        for side in (48, 64, 80, 96):
            yield f"volumetric {batch} {side}", Work(volumetric.DenseNet, (batch, 1, side, side, side))


def collect() -> list[dict[str, str]]:
    """Rows of the table as it is, and one for each further convolution of the models."""
    rows = read()
    known = {call_of(row) for row in rows}
    predicted = [(name, work, variant) for name, work in WORKS.items() for variant in VARIANTS]
    for name, work, variant in (*predicted, *((name, work, "fast layer") for name, work in usual())):
        inputs = tuple(x.to("meta") for x in work.inputs())
        prediction = predict(work.make_model, inputs, amp=work.amp, apply=change_of(variant))
        new = [as_row(call) for call in prediction.unmeasured if tuple(as_row(call).values()) not in known]
        known |= {tuple(row.values()) for row in new}
        rows += [row | dict.fromkeys(OWN, "") for row in new]
        print(f"{name}, {variant}: {len(new)} new, {len(rows)} in all", flush=True)
    return ordered(rows)


def call_of(row: dict[str, str]) -> tuple[str, ...]:
    """What was measured, without the outcome."""
    return tuple(row[field.name] for field in fields(ConvolutionCall))


def ordered(rows: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    """The rows as the table has them."""
    return sorted(rows, key=lambda row: (*call_of(row), row["gpu"]))


def measured_here(rows: list[dict[str, str]], gpu: str, again: bool) -> list[dict[str, str]]:
    """Rows to be measured on a GPU: those it has, where that is to be done again, and new ones for what it lacks."""
    own = [row for row in rows if row["gpu"] == gpu]
    known = {call_of(row) for row in own}
    new = {call_of(row): row | dict.fromkeys(OWN, "") for row in rows if call_of(row) not in known}
    return [*(own if again else ()), *new.values()]


def workspace_bytes(row: dict[str, str]) -> int:
    """What one call asks the caching allocator for beside its result, as asked for."""
    run = _runner(row)
    run()  # cuDNN chooses an engine at the first call, and may try some
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    result = run()
    stats = torch.cuda.memory_stats()
    del result
    return int(stats["requested_bytes.all.peak"] - stats["requested_bytes.all.current"])


def _runner(row: dict[str, str]) -> Callable[[], Any]:
    shapes = {
        name: tuple(map(int, row[name].split("x"))) for name in ("input", "weight", "stride", "padding", "dilation")
    }
    dtype, groups = getattr(torch, row["dtype"]), int(row["groups"])
    layout = torch.contiguous_format
    if row["layout"] == "channels_last":
        layout = torch.channels_last if len(shapes["input"]) == 4 else torch.channels_last_3d

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, device="cuda").to(memory_format=layout)

    x, weight = made(*shapes["input"]), made(*shapes["weight"])
    settings = (shapes["stride"], shapes["padding"], shapes["dilation"], False, [0] * len(shapes["stride"]), groups)
    if row["operation"] == FORWARD:
        return lambda: torch.ops.aten.convolution(x, weight, None, *settings)
    grad = torch.empty_like(torch.ops.aten.convolution(x, weight, None, *settings)).normal_()
    data = row["operation"] == DATA_GRADIENT
    return lambda: torch.ops.aten.convolution_backward(grad, x, weight, None, *settings, (data, not data, False))


def read() -> list[dict[str, str]]:
    """The table as it is."""
    if not TABLE.exists():
        return []
    with TABLE.open(newline="", encoding="ascii") as file:
        return list(csv.DictReader(file))


def write(rows: list[dict[str, str]], path: Path) -> None:
    """The table whole."""
    with path.open("w", newline="", encoding="ascii") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    """Collect or measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collect", action="store_true", help="add the convolutions that the table lacks")
    parser.add_argument("--again", action="store_true", help="measure what was measured before, too")
    parser.add_argument("--out", type=Path, default=TABLE)
    options = parser.parse_args()
    if options.collect:
        write(collect(), options.out)
        return
    rows = read()
    here = {
        "gpu": provenance()["gpu"],
        "torch": torch.__version__,
        "cudnn": str(torch.backends.cudnn.version()),
    }
    todo = measured_here(rows, here["gpu"], options.again)
    for number, row in enumerate(todo):
        row |= here | {"workspace_bytes": str(workspace_bytes(row))}
        if number % 100 == 0:
            print(f"{number} of {len(todo)}", flush=True)
            torch.cuda.empty_cache()
    kept = [row for row in rows if row["gpu"] and not (options.again and row["gpu"] == here["gpu"])]
    write(ordered([*kept, *todo]), options.out)
    taken = [int(row["workspace_bytes"]) for row in todo]
    largest = max(taken, default=0) / 2**20
    print(f"{len(todo)} measured, {sum(size > 0 for size in taken)} take something, {largest:,.1f} MiB at most")


if __name__ == "__main__":
    main()
