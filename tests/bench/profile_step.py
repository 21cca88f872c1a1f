"""Where the GPU time of a training step goes, kernel by kernel, beside the least time its bytes need. Needs a GPU.

    PYTHONPATH=. python tests/bench/profile_step.py bc100-512 --variant "memopt fast layer"

One row per operator and input shape: launches, microseconds, and for memopt's own the time that reading its inputs and
writing its outputs once would take at `BYTES_PER_SECOND`. Then one row per kernel.
"""

import argparse
from collections import defaultdict
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from train_step import DEVICE, TABLES, VARIANTS, is_kernel, laid_out

from memopt.measure.step import TrainingStep, on_device, seeded

BYTES_PER_SECOND = 4.2e12
"""Of an H200's memory, as copies reach it."""
READ_AND_WRITTEN = {"norm_act_matmul_backward": 11, "norm_act_sums": 10}
"""Operators that add to an argument, by its place: its bytes count twice."""


def main() -> None:
    """Profile the variants named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--variant", nargs="+", choices=VARIANTS, default=["memopt fast layer"])
    parser.add_argument("--rows", type=int, default=40)
    options = parser.parse_args()
    for variant in options.variant:
        print(f"== {options.table}, {variant}")
        _show(_trace(options.table, variant), options.rows)


def _trace(table: str, variant: str) -> Any:
    work = TABLES[table]
    with seeded(0, DEVICE):
        model = VARIANTS[variant](laid_out(work.make().to(DEVICE), work.channels_last))
        inputs = on_device((laid_out(torch.randn(work.shape), work.channels_last),), DEVICE)
        step = TrainingStep(model, inputs, work.amp)
        for _ in range(4):
            step.run()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], record_shapes=True) as trace:
            step.run()
            torch.cuda.synchronize()
    return trace


def _show(trace: Any, rows: int) -> None:
    operators = [e for e in trace.key_averages(group_by_input_shape=True) if e.self_device_time_total > 0]
    operators = [e for e in operators if e.device_type == torch.autograd.DeviceType.CPU]
    total = sum(e.self_device_time_total for e in operators)
    print(f"{total / 1e3:.2f} ms on the GPU")
    by_name: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    for event in operators:
        entry = by_name[event.key]
        entry[0] += event.count
        entry[1] += event.self_device_time_total
        entry[2] += event.count * _floor(event)
    for name, (count, time, floor) in sorted(by_name.items(), key=lambda item: -item[1][1])[:rows]:
        print(f"{time:10.0f} us  floor {floor:8.0f}  {count:5.0f} x  {name}")
    print("-- by shape")
    for event in sorted(operators, key=lambda e: -e.self_device_time_total)[:rows]:
        time, shapes = event.self_device_time_total, [s for s in event.input_shapes if s][:8]
        each = time / event.count
        print(
            f"{time:10.0f} us  each {each:7.1f}  floor {_floor(event):6.1f}  {event.count:4d} x  {event.key} {shapes}"
        )
    print("-- by kernel")
    kernels: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for event in trace.events():
        if is_kernel(event):
            kernels[event.name][0] += 1
            kernels[event.name][1] += event.device_time
    for name, (count, time) in sorted(kernels.items(), key=lambda item: -item[1][1])[:rows]:
        print(f"{time:10.0f} us  {count:5.0f} x  {name[:120]}")


def _floor(event: Any) -> float:
    """Microseconds, of memopt's own operators; the profiler does not say of what type, so as if of four bytes."""
    if not event.key.startswith("memopt::"):
        return 0.0
    sizes = [torch.Size(shape).numel() if shape else 0 for shape in event.input_shapes]
    twice = READ_AND_WRITTEN.get(event.key.removeprefix("memopt::"))
    extra = sizes[twice] if twice is not None and twice < len(sizes) else 0
    return (sum(sizes) + extra) * 4 / BYTES_PER_SECOND * 1e6


if __name__ == "__main__":
    main()
