"""What cuDNN's convolutions take for the time of a call: makes the table that predictions read.

    PYTHONPATH=. python tests/bench/measure_workspaces.py --collect    # without a GPU: which convolutions there are
    PYTHONPATH=. python tests/bench/measure_workspaces.py              # on a GPU: measure them all, under three minutes

The table is `memopt/measure/workspaces.csv`. A row that was not measured has no `workspace_bytes`. `--out` writes the
measured table elsewhere.
"""

import argparse
import csv
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from predicted_vs_measured import VARIANTS, WORKS, change_of
from provenance import provenance

from memopt.measure.predict import predict
from memopt.measure.workspaces import DATA_GRADIENT, FORWARD, TABLE, ConvolutionCall, as_row

OWN = ("workspace_bytes", "gpu", "torch", "cudnn")
FIELDS = (*(field.name for field in fields(ConvolutionCall)), *OWN)


def collect() -> list[dict[str, str]]:
    """Rows of the table as it is, and one for each further convolution of the models that are not held out."""
    rows = read()
    known = {tuple(row[field.name] for field in fields(ConvolutionCall)) for row in rows}
    for name, work in WORKS.items():
        if work.held_out:
            continue
        for variant in VARIANTS:
            prediction = predict(work.make_model, work.inputs(), amp=work.amp, apply=change_of(variant))
            new = [as_row(call) for call in prediction.unmeasured if tuple(as_row(call).values()) not in known]
            known |= {tuple(row.values()) for row in new}
            rows += [row | dict.fromkeys(OWN, "") for row in new]
            print(f"{name}, {variant}: {len(new)} new, {len(rows)} in all", flush=True)
    return sorted(rows, key=lambda row: [row[name] for name in FIELDS[:5]])


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
    for number, row in enumerate(rows):
        row |= here | {"workspace_bytes": str(workspace_bytes(row))}
        if number % 100 == 0:
            print(f"{number} of {len(rows)}", flush=True)
            torch.cuda.empty_cache()
    write(rows, options.out)
    taken = [int(row["workspace_bytes"]) for row in rows]
    print(
        f"{len(rows)} measured, {sum(size > 0 for size in taken)} take something, {max(taken) / 2**20:,.1f} MiB at most"
    )


if __name__ == "__main__":
    main()
