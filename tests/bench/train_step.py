"""A training step's memory and time: naive, checkpointed, torch.compile, torchvision's own, memopt. Needs a GPU.

    PYTHONPATH=. python tests/bench/train_step.py bc100-512 --out tests/bench/results/train_step.csv

Every row is measured in this process from a cleaned state, naive first. The run stops by itself before `--seconds`
and keeps the rows it has. Bytes and seconds. `gpu_seconds` and `kernels` are the summed time (median of some profiled
steps) and the count of a step's GPU kernels, `step_seconds` the median of the steps in a plain loop. In such a loop
Python counts, and hosts that others share are at times half as fast as at others: there naive steps take turns with the
variant's, and `naive_step_seconds` is their median. `predicted_bytes` is the activation peak predicted without a GPU
for the same step; as that takes a while and no GPU, it can be left out and filled in elsewhere:

    PYTHONPATH=. python tests/bench/train_step.py bc100-512 --out FILE --no-prediction
    PYTHONPATH=. python tests/bench/train_step.py bc100-512 --out FILE --only-prediction
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import rivals
import torch
from line import HELP, Line
from provenance import provenance
from results_file import append_rows, write_rows
from rows_table import load
from torch import nn
from torch.profiler import ProfilerActivity, profile

import memopt
from densenet_models import bc
from memopt.measure import GPU
from memopt.measure.memory import CudaLedger, clean, is_out_of_memory, leave, observe_step
from memopt.measure.predict import predict_step
from memopt.measure.step import TrainingStep, on_device, seeded

FIELDS = (
    "table", "variant", "activation_peak_bytes", "predicted_bytes", "peak_allocated_bytes", "peak_reserved_bytes",
    "saved_bytes", "retained_bytes", "step_seconds", "naive_step_seconds", "gpu_seconds", "kernels", "gpu", "torch",
    "commit", "date",
)  # fmt: skip
DEVICE = torch.device("cuda")
Change = Callable[[nn.Module], nn.Module]


@dataclass(frozen=True)
class Work:
    """What one table measures."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    variants: tuple[str, ...]
    amp: torch.dtype | None = None
    channels_last: bool = False


OURS = ("memopt exact concat", "memopt exact layer", "memopt fast concat", "memopt fast layer")
REDUCED = "torch.compile reduce-overhead"
UNSEEN = ("activation_peak_bytes", "peak_allocated_bytes", "saved_bytes", "retained_bytes")
"""Figures of its graphs' memory, which they keep between steps: of it only what is reserved is seen."""
COMPILED = ("torch.compile", REDUCED, "torch.compile memory budget 0.5", "torch.compile memory budget 0")
RIVALS = ("checkpointed", "torch.compile")
TRIED_OUT = ("naive, cudnn.benchmark", "naive channels-last, cudnn.benchmark", "checkpointed, cudnn.benchmark")
"""What cuDNN chose before in the same process it does not try out again."""
GRAPHED = "memopt fast layer, CUDA graph"
"""The whole step captured once and replayed: its time alone, since a graph keeps memory of its own."""
EXPANDABLE = "memopt fast layer, expandable segments"
"""With PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True: the allocator then reserves little that it cannot use."""
DEPTHS = (40, 100, 196, 400)
DEPTH_TABLE = "bc{}-64"
WARMUP, PROFILED_STEPS = 3, 5
TURNS, STEPS_A_TURN = 7, 6
MEMORY_TRIES, MEMORY_SECONDS = 20, 5.0
"""How often, and how soon again, one that compiles beside others asks for memory that they hold."""
TABLES: dict[str, Work] = {
    "bc100-64": Work(bc.DenseNet, (64, 3, 32, 32), ("naive", *OURS, "checkpointed", *COMPILED, GRAPHED, EXPANDABLE)),
    "bc100-512": Work(
        bc.DenseNet,
        (512, 3, 32, 32),
        (
            *("naive", "naive, cudnn.benchmark", "naive channels-last, cudnn.benchmark", *OURS, *RIVALS),
            *("checkpointed, cudnn.benchmark", EXPANDABLE),
        ),
    ),
    "densenet121-64": Work(
        bc.densenet121,
        (64, 3, 224, 224),
        ("naive", "naive channels-last", *OURS, "checkpointed", *COMPILED, "torchvision memory_efficient"),
    ),
    "densenet121-64-bf16": Work(
        bc.densenet121,
        (64, 3, 224, 224),
        ("naive", *OURS, *RIVALS, "torchvision memory_efficient"),
        amp=torch.bfloat16,
        channels_last=True,
    ),
    **{
        DEPTH_TABLE.format(depth): Work(
            lambda depth=depth: bc.DenseNet(depth=depth),
            (64, 3, 32, 32),
            ("naive", "memopt exact layer", "memopt fast layer"),
        )
        for depth in DEPTHS
        if depth != 100
    },
}


DEPTH_TABLES = [DEPTH_TABLE.format(depth) for depth in DEPTHS if depth != 100]
"""Beside "bc100-64", which has more variants."""


def _memopt(numerics: str, level: str) -> Change:
    return lambda model: memopt.apply(model, config=memopt.Config(numerics=numerics, recompute=level))


VARIANTS: dict[str, Change] = {
    "naive": lambda model: model,
    **{f"memopt {n} {level}": _memopt(n, level) for n in ("exact", "fast") for level in ("concat", "layer")},
    GRAPHED: _memopt("fast", "layer"),
    EXPANDABLE: _memopt("fast", "layer"),
    "checkpointed": rivals.checkpointed,
    "torch.compile": lambda model: torch.compile(model),
    REDUCED: lambda model: torch.compile(model, mode="reduce-overhead"),
    "torch.compile memory budget 0": rivals.compiled_for_memory,
    "torch.compile memory budget 0.5": partial(rivals.compiled_for_memory, budget=0.5),
    **dict.fromkeys(("naive, cudnn.benchmark", "naive channels-last", "naive channels-last, cudnn.benchmark"), leave),
    "checkpointed, cudnn.benchmark": rivals.checkpointed,
    "torchvision memory_efficient": rivals.torchvision_memory_efficient,
}


def rows(table: str, variants: list[str], deadline: float, line: Line) -> Iterator[dict[str, Any]]:
    """One row per variant until the deadline."""
    work = TABLES[table]
    for name in (v for v in work.variants if v in variants):
        if time.monotonic() > deadline:
            print(f"stopped before {table} {name}: out of time", flush=True)
            return
        change = VARIANTS[name]
        is_ours = name.startswith("memopt")

        channels_last = is_channels_last(work, name)
        inputs = (laid_out(torch.randn(work.shape), channels_last),)

        def make(change: Change = change, channels_last: bool = channels_last) -> nn.Module:
            return change(laid_out(work.make().to(DEVICE), channels_last))

        torch.cuda.memory._set_allocator_settings(f"expandable_segments:{name == EXPANDABLE}")
        torch.backends.cudnn.benchmark = "cudnn.benchmark" in name
        if name == GRAPHED:
            with line.measuring():
                seconds = _replayed(make, inputs, work.amp)
            yield dict.fromkeys(FIELDS) | {"table": table, "variant": name, "step_seconds": seconds, **provenance()}
            continue
        alone = name.startswith("naive") or name == EXPANDABLE or "cudnn" in name  # naive runs without
        naive = None if alone else partial(make, leave)
        measured = measure(make, inputs, work.amp, memopt.remove if is_ours else leave, naive, line, name in COMPILED)
        torch._dynamo.reset()
        if name == REDUCED:
            measured |= dict.fromkeys(UNSEEN)
        yield dict.fromkeys(FIELDS) | {"table": table, "variant": name, **measured, **provenance()}


def measure(
    make_model: Callable[[], nn.Module],
    inputs: tuple[torch.Tensor, ...],
    amp: torch.dtype | None,
    remove: Change = leave,
    make_naive: Callable[[], nn.Module] | None = None,
    line: Line | None = None,
    compiles: bool = False,
) -> dict[str, Any]:
    """Figures of a training step by their fields, all of one model: building it takes longer than measuring it.

    Args:
        make_model, inputs, amp: of the step; the model is on the GPU.
        remove: takes memopt off.
        make_naive: the model to take turns with, if any.
        line: the others that are measured on the same GPU. The first step, which takes the longest, is made before its
            turn has come.
        compiles: for minutes at the first step, on most processors: nobody measures meanwhile.
    """
    line = line or Line()
    clean(DEVICE)
    ledger = CudaLedger(DEVICE)
    with seeded(0, DEVICE):
        with line.compiling() if compiles else nullcontext():
            step = TrainingStep(make_model(), on_device(inputs, DEVICE), amp)
            if not line.alone:
                _first_step(step)
                if compiles:
                    clean(DEVICE)  # the others need it
        with line.measuring():
            figures = _measured(step, ledger, remove, make_naive)
    del step
    clean(DEVICE)
    return figures


def _first_step(step: TrainingStep) -> None:
    """Beside others, which may hold the memory that it takes."""
    for _ in range(MEMORY_TRIES):
        try:
            step.run()
            return
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        step.clear()
        clean(DEVICE)
        time.sleep(MEMORY_SECONDS)


def _measured(
    step: TrainingStep, ledger: CudaLedger, remove: Change, make_naive: Callable[[], nn.Module] | None
) -> dict[str, Any]:
    for _ in range(WARMUP):
        step.run()
    figures = observe_step(step, ledger)
    reserved_bytes = ledger.peak_reserved_bytes
    gpu_seconds, kernels = profiled(step)
    partners = [] if make_naive is None else [TrainingStep(make_naive(), step.inputs, step.amp)]
    times = dict(zip(("step_seconds", "naive_step_seconds"), in_turns((step, *partners)), strict=False))
    partners.clear()
    gc.collect()
    kept_bytes = ledger.current_bytes
    remove(step.model)
    gc.collect()
    retained_bytes = kept_bytes - ledger.current_bytes
    return {
        "activation_peak_bytes": figures.activation_peak_bytes + retained_bytes,
        "peak_allocated_bytes": figures.peak_allocated_bytes,
        "peak_reserved_bytes": reserved_bytes,
        "saved_bytes": figures.saved_bytes,
        "retained_bytes": retained_bytes,
        **times,
        "gpu_seconds": gpu_seconds,
        "kernels": kernels,
    }


def is_channels_last(work: Work, variant: str) -> bool:
    """Whether a row's model and images are."""
    return work.channels_last or "channels-last" in variant


def laid_out(thing: Any, channels_last: bool) -> Any:
    """In the memory format that a table asks for."""
    return thing.to(memory_format=torch.channels_last) if channels_last else thing


def fill_in(path: Path, tables: list[str]) -> None:
    """Predict for the rows of a file that have no prediction. Needs no GPU, but the code that they speak of."""
    rows = load(path)
    for row in rows:
        if row["table"] in tables and not row["predicted_bytes"]:
            row["predicted_bytes"] = predicted(row) or ""
    write_rows(path, FIELDS, rows)


def predicted(row: dict[str, Any]) -> int | None:
    """Activation peak of a row's step, without a GPU; None for rivals."""
    name, work = row["variant"], TABLES[row["table"]]
    if name == GRAPHED or not name.startswith(("naive", "memopt")) or "cudnn" in name:
        return None
    channels_last = is_channels_last(work, name)
    inputs = (laid_out(torch.empty(work.shape), channels_last),)

    def make() -> nn.Module:
        model: nn.Module = laid_out(work.make(), channels_last)
        return model

    target = replace(GPU, gpu=row["gpu"])
    return predict_step(make, inputs, target, amp=work.amp, apply=VARIANTS[name]).activation_peak_bytes


def _replayed(make_model: Callable[[], nn.Module], inputs: tuple[torch.Tensor, ...], amp: torch.dtype | None) -> float:
    """Median seconds of a step replayed from a CUDA graph."""
    with seeded(0, DEVICE):
        step = TrainingStep(make_model(), on_device(inputs, DEVICE), amp)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(4):
                step.run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step.run()
    seconds = []
    for _ in range(20):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) * 1e-3)
    del graph, step
    clean(DEVICE)
    return statistics.median(seconds)


def in_turns(steps: Sequence[TrainingStep]) -> list[float]:
    """Median seconds of a step of each model, a few steps of one after a few of the other, if there is one."""
    seconds: list[list[float]] = [[] for _ in steps]
    for turn in range(1 + TURNS):  # the first warms up
        for step, own in zip(steps, seconds, strict=True):
            taken = _loop_seconds(step)
            own += [taken] if turn else []
    return [statistics.median(own) for own in seconds]


def _loop_seconds(step: TrainingStep) -> float:
    """Of a step, of several in a row, as a training loop makes them: Python may run ahead of the GPU."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(STEPS_A_TURN):
        step.run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / STEPS_A_TURN


def profiled(step: TrainingStep) -> tuple[float, int]:
    """Summed time of a step's kernels, median of some steps, and how many there are."""
    found = []
    for _ in range(PROFILED_STEPS):
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            step.run()
            torch.cuda.synchronize()
        kernels = [e for e in trace.events() or [] if is_kernel(e)]
        found.append((sum(event.device_time for event in kernels) * 1e-6, len(kernels)))
    return statistics.median(seconds for seconds, _ in found), found[-1][1]


def is_kernel(event: Any) -> bool:
    """Not a span that is only named on the GPU's timeline, such as the optimizer's step, nor the profiler's own."""
    named = ("##", "Optimizer.", "Activity Buffer")
    return event.device_type == torch.autograd.DeviceType.CUDA and not event.name.startswith(named)


def main() -> None:
    """Measure the tables named on the command line and append their rows to a CSV file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="+", choices=TABLES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seconds", type=float, default=520.0)
    parser.add_argument("--lock", type=Path, help=HELP)
    prediction = parser.add_mutually_exclusive_group()
    prediction.add_argument("--no-prediction", action="store_true", help="measure only")
    prediction.add_argument("--only-prediction", action="store_true", help="fill in what rows lack")
    options = parser.parse_args()
    if options.only_prediction:
        fill_in(options.out, options.tables)
        return
    start = time.monotonic()
    line, deadline = Line(options.lock, start + 0.6 * options.seconds), start + options.seconds
    made = (row for table in options.tables for row in rows(table, options.variants, deadline, line))
    if not options.no_prediction:
        made = (row | {"predicted_bytes": predicted(row)} for row in made)
    append_rows(options.out, FIELDS, made, _line)


def _line(row: dict[str, Any]) -> str:
    def mib(field: str) -> str:
        return "-" if row[field] is None else f"{row[field] / 2**20:.0f}"

    return (
        f"{row['table']:20s} {row['variant']:20s} activation {mib('activation_peak_bytes'):>6s} MiB "
        f"(predicted {mib('predicted_bytes'):>6s})  allocated {mib('peak_allocated_bytes'):>6s}  "
        f"reserved {mib('peak_reserved_bytes'):>6s}  wall {(row['step_seconds'] or 0) * 1e3:7.1f} ms  "
        f"gpu {(row['gpu_seconds'] or 0) * 1e3:7.1f} ms  {row['kernels']} kernels"
    )


if __name__ == "__main__":
    main()
