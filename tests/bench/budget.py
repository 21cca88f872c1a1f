"""Memory budgets from what the naive model takes down to the least: measured peaks and times. Needs a GPU.

    PYTHONPATH=. python tests/bench/budget.py --out tests/bench/results/budget.csv

For each model and numerics a row for the naive step, each rival (`--rivals`), and each budget: a little more than the
naive peak allocated, then at even ratios from what the plan for that takes down to the least that can be kept within.
Bytes and seconds; `planned_seconds` is what the plan predicts for computing again. Plans need no GPU and are made in
processes of their own, several at a time. The run stops by itself before `--seconds` and keeps the rows it has.
"""

import argparse
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from provenance import provenance
from results_file import append_rows
from torch import nn
from train_step import DEVICE, LOCK_HELP, TABLES, VARIANTS, measure

import memopt
from memopt.errors import BudgetError
from memopt.measure.memory import leave
from memopt.measure.predict import predict_step

FIELDS = (
    "table", "numerics", "variant", "budget_bytes", "predicted_bytes", "peak_allocated_bytes", "peak_reserved_bytes",
    "planned_seconds", "step_seconds", "gpu_seconds", "gpu", "torch", "commit", "date",
)  # fmt: skip
MEASURED = ("peak_allocated_bytes", "peak_reserved_bytes", "step_seconds", "gpu_seconds")
POINTS = 20
RIVALS = (
    "naive", "checkpointed", "torch.compile", "torch.compile memory budget 0.5", "torch.compile memory budget 0",
)  # fmt: skip
MIB = 2**20


def plan(table: str, numerics: str, budget_bytes: int) -> memopt.MemoryPlan | int:
    """The plan for a budget, or the least budget that there is one for."""
    work = TABLES[table]
    config = memopt.Config(numerics=numerics, memory_budget=budget_bytes)
    try:
        return memopt.plan_memory(work.make(), torch.empty(work.shape, device="meta"), config=config)
    except BudgetError as error:
        if error.least_bytes is None:
            raise
        return error.least_bytes


def plans(pool: Executor, table: str, numerics: str, highest: Future, least: Future) -> list[Future]:
    """One for each budget, from the largest down, but for the first, which is `highest`."""
    least_bytes, highest_bytes = least.result(), int(1.03 * highest.result().peak_allocated_bytes) + 4 * MIB
    ratio = (least_bytes / highest_bytes) ** (1 / (POINTS - 2))
    budgets = [*(int(highest_bytes * ratio**number) for number in range(POINTS - 2)), least_bytes]
    return [pool.submit(plan, table, numerics, budget_bytes) for budget_bytes in budgets]


def rows(
    table: str, numerics: str, rivals: list[str], planned: list[Future], deadline: float, lock: Path | None
) -> Iterator[dict[str, Any]]:
    """Rivals first, then the budgets."""
    work = TABLES[table]
    inputs = (torch.randn(work.shape),)

    def measured(variant: str, change: Callable[[nn.Module], nn.Module], **more: Any) -> dict[str, Any]:
        def make() -> nn.Module:
            with DEVICE:  # where weights are drawn sooner
                return change(work.make())

        figures = measure(make, inputs, work.amp, lock=lock, compiles="compile" in variant)
        row = {"table": table, "numerics": numerics, "variant": variant}
        return dict.fromkeys(FIELDS) | row | {key: figures[key] for key in MEASURED} | more | provenance()

    for rival in rivals:
        if time.monotonic() > deadline:
            print(f"stopped before {table} {rival}: out of time", flush=True)
            return
        yield measured(rival, VARIANTS[rival])
        torch._dynamo.reset()
    for future in planned:
        if time.monotonic() > deadline:
            print(f"stopped in {table} {numerics}: out of time", flush=True)
            return
        found = future.result()
        config = memopt.Config(numerics=numerics, recompute=found.levels)
        change = leave if found.untouched else lambda m, config=config: memopt.apply(m, config=config)
        more = {"predicted_bytes": found.peak_allocated_bytes, "planned_seconds": found.seconds}
        yield measured("budget", change, budget_bytes=found.budget_bytes, **more)


def main() -> None:
    """Measure the tables and append their rows to a CSV file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=["bc100-64", "densenet121-64"])
    parser.add_argument("--numerics", nargs="+", choices=("fast", "exact"), default=["fast", "exact"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rivals", nargs="*", choices=RIVALS, default=list(RIVALS))
    parser.add_argument("--lock", type=Path, help=LOCK_HELP)
    parser.add_argument("--no-budgets", action="store_true", help="only the rivals")
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=520.0)
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
        jobs = [(table, numerics) for numerics in options.numerics for table in options.tables]
        to_plan = [] if options.no_budgets else jobs
        ends = {job: (pool.submit(plan, *job, naive_bytes(job[0])), pool.submit(plan, *job, MIB)) for job in to_plan}
        planned = {job: [highest, *plans(pool, *job, highest, least)] for job, (highest, least) in ends.items()}
        made = (row for job in jobs for row in rows(*job, options.rivals, planned.get(job, []), deadline, options.lock))
        append_rows(options.out, FIELDS, made, line)
        pool.shutdown(cancel_futures=True)


def naive_bytes(table: str) -> int:
    """A little more than the naive step is predicted to take."""
    work = TABLES[table]
    peak_bytes = predict_step(work.make, (torch.empty(work.shape, device="meta"),)).peak_allocated_bytes
    assert peak_bytes is not None
    return int(1.02 * peak_bytes) + 4 * MIB


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
