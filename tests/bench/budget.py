"""Memory budgets from what the naive model takes down to the least: measured peaks and times. Needs a GPU.

    PYTHONPATH=. python tests/bench/budget.py --out tests/bench/results/budget.csv

For each model and numerics a row for the naive step, the checkpointed rival, and each budget, which lie at even ratios
between the naive peak allocated and the least that can be kept within. Bytes and seconds; `planned_seconds` is what
the plan predicts for computing again. The run stops by itself before `--seconds` and keeps the rows it has.
"""

import argparse
import csv
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from provenance import provenance
from torch import nn
from train_step import DEVICE, TABLES, VARIANTS, profiled

import memopt
from memopt.errors import BudgetError
from memopt.measure.memory import leave, measure_step

FIELDS = (
    "table", "numerics", "variant", "budget_bytes", "predicted_bytes", "peak_allocated_bytes", "peak_reserved_bytes",
    "planned_seconds", "step_seconds", "gpu_seconds", "gpu", "torch", "commit", "date",
)  # fmt: skip
POINTS = 20
MIB = 2**20


def rows(table: str, numerics: str, deadline: float) -> Iterator[dict[str, Any]]:
    """Rivals first, then the budgets from the largest down."""
    work = TABLES[table]
    inputs = (torch.randn(work.shape),)

    def measured(variant: str, change: Callable[[nn.Module], nn.Module], **more: Any) -> dict[str, Any]:
        def make() -> nn.Module:
            return change(work.make().to(DEVICE))

        ours = variant == "budget"
        figures = measure_step(make, inputs, DEVICE, amp=work.amp, remove=memopt.remove if ours else leave)
        gpu_seconds, _ = profiled(make, inputs, work.amp)
        taken = {name: getattr(figures, name) for name in FIELDS if hasattr(figures, name)}
        row = {"table": table, "numerics": numerics, "variant": variant, "gpu_seconds": gpu_seconds}
        return dict.fromkeys(FIELDS) | row | taken | more | provenance()

    naive = measured("naive", VARIANTS["naive"])
    yield naive
    yield measured("checkpointed", VARIANTS["checkpointed"])
    model = work.make()  # on the CPU: planning reads no values
    for budget_bytes in budgets(model, inputs, numerics, naive["peak_allocated_bytes"]):
        if time.monotonic() > deadline:
            print(f"stopped before {table} {numerics} {budget_bytes / MIB:,.0f} MiB: out of time", flush=True)
            return
        plan = memopt.plan_memory(model, inputs, config=memopt.Config(numerics=numerics, memory_budget=budget_bytes))
        config = memopt.Config(numerics=numerics, recompute=plan.levels)
        change = leave if plan.untouched else lambda m, config=config: memopt.apply(m, config=config)
        more = {"predicted_bytes": plan.peak_allocated_bytes, "planned_seconds": plan.seconds}
        yield measured("budget", change, budget_bytes=budget_bytes, **more)


def budgets(model: nn.Module, inputs: tuple[torch.Tensor, ...], numerics: str, highest_bytes: int) -> list[int]:
    """At even ratios, from a little more than the naive peak down to the least."""
    highest_bytes = int(highest_bytes * 1.02) + 4 * MIB
    try:
        memopt.plan_memory(model, inputs, config=memopt.Config(numerics=numerics, memory_budget=1))
    except BudgetError as error:
        least_bytes = int(str(error).split(" within is ")[1].split(" MiB")[0].replace(",", "")) * MIB
    ratio = (least_bytes / highest_bytes) ** (1 / (POINTS - 1))
    return [*(int(highest_bytes * ratio**number) for number in range(POINTS - 1)), least_bytes]


def main() -> None:
    """Measure the tables and append their rows to a CSV file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=["bc100-64", "densenet121-64"])
    parser.add_argument("--numerics", nargs="+", choices=("fast", "exact"), default=["fast", "exact"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=520.0)
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    new = not options.out.exists()
    with options.out.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if new:
            writer.writeheader()
        for numerics in options.numerics:
            for table in options.tables:
                for row in rows(table, numerics, deadline):
                    writer.writerow(row)
                    file.flush()
                    print(line(row), flush=True)


def line(row: dict[str, Any]) -> str:
    """A row as text."""

    def mib(name: str) -> str:
        return "-" if row[name] is None else f"{row[name] / MIB:,.0f}"

    return (
        f"{row['table']:15s} {row['numerics']:5s} {row['variant']:12s} budget {mib('budget_bytes'):>6s} MiB  allocated "
        f"{mib('peak_allocated_bytes'):>6s} (predicted {mib('predicted_bytes'):>6s})  step "
        f"{(row['step_seconds'] or 0) * 1e3:6.1f} ms  GPU {row['gpu_seconds'] * 1e3:6.1f} ms"
    )


if __name__ == "__main__":
    main()
