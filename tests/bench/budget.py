"""Memory budgets from what the naive model takes down to the least: measured peaks and times. Needs a GPU.

    PYTHONPATH=. python tests/bench/budget.py --out tests/bench/results/budget.csv

For each model and numerics a row for each budget: a little more than the naive peak allocated, then at even ratios from
what the plan for that takes down to the least that can be kept within. What compares with them is measured by
`train_step.py`. Bytes and seconds; `planned_seconds` is what the plan predicts for computing again. Plans are made in
processes of their own, several at a time; as they take a while and no GPU, they can be made elsewhere, by the same
code:

    PYTHONPATH=. python tests/bench/budget.py --only-plans plans.json
    PYTHONPATH=. python tests/bench/budget.py --plans plans.json --out tests/bench/results/budget.csv

The run stops by itself before `--seconds` and keeps the rows it has.
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from line import HELP, Line
from provenance import provenance
from results_file import append_rows
from torch import nn
from train_step import DEVICE, TABLES, measure

import memopt
from memopt.errors import BudgetError
from memopt.measure.predict import predict_step

FIELDS = (
    "table", "numerics", "variant", "budget_bytes", "predicted_bytes", "peak_allocated_bytes", "peak_reserved_bytes",
    "planned_seconds", "step_seconds", "gpu_seconds", "gpu", "torch", "commit", "date",
)  # fmt: skip
MEASURED = ("peak_allocated_bytes", "peak_reserved_bytes", "step_seconds", "gpu_seconds")
POINTS = 20
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured of a `memopt.MemoryPlan`; `levels` by path of the norm, None where all stays as it is."""

    table: str
    numerics: str
    budget_bytes: int
    predicted_bytes: int
    planned_seconds: float
    levels: dict[str, str] | None


def plan(table: str, numerics: str, budget_bytes: int) -> Plan | int:
    """The plan for a budget, or the least budget that there is one for."""
    work = TABLES[table]
    config = memopt.Config(numerics=numerics, memory_budget=budget_bytes)
    try:
        found = memopt.plan_memory(work.make(), torch.empty(work.shape, device="meta"), config=config)
    except BudgetError as error:
        if error.least_bytes is None:
            raise
        return error.least_bytes
    levels = None if found.untouched else found.levels
    return Plan(table, numerics, budget_bytes, found.peak_allocated_bytes, found.seconds, levels)


def plans(pool: Executor, table: str, numerics: str) -> Iterator[Future[Any]]:
    """One for each budget, from the largest down."""
    highest = pool.submit(plan, table, numerics, naive_bytes(table))
    yield highest
    least_bytes = pool.submit(plan, table, numerics, MIB).result()
    highest_bytes = int(1.03 * highest.result().predicted_bytes) + 4 * MIB
    ratio = (least_bytes / highest_bytes) ** (1 / (POINTS - 2))
    for budget_bytes in (*(int(highest_bytes * ratio**number) for number in range(POINTS - 2)), least_bytes):
        yield pool.submit(plan, table, numerics, budget_bytes)


def row(planned: Plan, line: Line) -> dict[str, Any]:
    """A budget's, measured."""
    work = TABLES[planned.table]

    def make() -> nn.Module:
        with DEVICE:  # where weights are drawn sooner
            model = work.make()
        if planned.levels is None:
            return model
        return memopt.apply(model, config=memopt.Config(numerics=planned.numerics, recompute=planned.levels))

    figures = measure(make, (torch.randn(work.shape),), work.amp, memopt.remove, line=line)
    facts = {key: value for key, value in asdict(planned).items() if key in FIELDS}
    return {"variant": "budget"} | facts | {key: figures[key] for key in MEASURED} | provenance()


def rows(planned: Iterable[Plan], deadline: float, line: Line) -> Iterator[dict[str, Any]]:
    """Until the deadline."""
    for each in planned:
        if time.monotonic() > deadline:
            print(f"stopped in {each.table} {each.numerics}: out of time", flush=True)
            return
        yield row(each, line)


def main() -> None:
    """Plan, measure and append the rows to a CSV file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=["bc100-64", "densenet121-64"])
    parser.add_argument("--numerics", nargs="+", choices=("fast", "exact"), default=["fast", "exact"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only-plans", type=Path, metavar="FILE", help="write the plans, and measure nothing")
    parser.add_argument("--plans", type=Path, metavar="FILE", help="measure these plans")
    parser.add_argument("--lock", type=Path, help=HELP)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=520.0)
    options = parser.parse_args()
    if (options.out is None) == (options.only_plans is None):
        parser.error("either --out or --only-plans says what to write.")
    deadline = time.monotonic() + options.seconds
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
        if options.plans is None:
            jobs = [(table, numerics) for numerics in options.numerics for table in options.tables]
            futures = [list(plans(pool, *job)) for job in jobs]
            planned = (future.result() for job in futures for future in job)
        else:
            read = (Plan(**facts) for facts in json.loads(options.plans.read_text()))
            planned = (p for p in read if p.table in options.tables and p.numerics in options.numerics)
        if options.only_plans is not None:
            options.only_plans.write_text(json.dumps([asdict(each) for each in planned], indent=1) + "\n")
            return
        append_rows(options.out, FIELDS, rows(planned, deadline, Line(options.lock)), text)
        pool.shutdown(cancel_futures=True)


def naive_bytes(table: str) -> int:
    """A little more than the naive step is predicted to take."""
    work = TABLES[table]
    peak_bytes = predict_step(work.make, (torch.empty(work.shape, device="meta"),)).peak_allocated_bytes
    assert peak_bytes is not None
    return int(1.02 * peak_bytes) + 4 * MIB


def text(row: dict[str, Any]) -> str:
    """A row as text."""

    def mib(name: str) -> str:
        return f"{row[name] / MIB:,.0f}"

    return (
        f"{row['table']:15s} {row['numerics']:5s} budget {mib('budget_bytes'):>6s} MiB  allocated "
        f"{mib('peak_allocated_bytes'):>6s} (predicted {mib('predicted_bytes'):>6s})  step "
        f"{row['step_seconds'] * 1e3:6.1f} ms  GPU {row['gpu_seconds'] * 1e3:6.1f} ms"
    )


if __name__ == "__main__":
    main()
