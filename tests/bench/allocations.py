"""Where what a step asks the allocator for parts from what is predicted: to find what a prediction lacks. Needs a GPU.

    PYTHONPATH=. python tests/bench/allocations.py densenet201 "exact concat" --out folder

Models and variants are those of `predicted_vs_measured.py`. Writes all requests from the model's making to the end of
the last warm-up step, rounded up to 512 bytes, one a line with where it comes from: `measured.txt` and `predicted.txt`;
and where the segments lie that were taken from the device, in order: `segments.txt`, of address and size. Of free
blocks of one size the allocator hands out that with the lowest address. Prints how segments lie, and where requests
differ, as `diff` finds it. `--only-prediction` writes the latter alone, without a GPU.
"""

import argparse
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from predicted_vs_measured import VARIANTS, WORKS, change_of

from memopt.measure import GPU
from memopt.measure.allocator import MIN_BLOCK_BYTES
from memopt.measure.memory import CUDA_WARMUP, clean
from memopt.measure.predict import predict
from memopt.measure.step import TrainingStep, on_device, seeded

Request = tuple[int, str]
"""Rounded size, and where it comes from."""
HUNK = re.compile(r"(\d+)(?:,(\d+))?([acd])(\d+)(?:,(\d+))?$")
MOST_ENTRIES = 5_000_000


def rounded(size_bytes: int) -> int:
    """As the allocator counts it."""
    return -(-size_bytes // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES


def predicted(model: str, variant: str) -> list[Request]:
    """In order, without a GPU."""
    work = WORKS[model]
    target = replace(GPU, gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None)
    trace = predict(work.make_model, work.inputs(), target, amp=work.amp, apply=change_of(variant)).trace
    served = [event for event in trace.events if event.size_bytes and not event.is_bound]
    return [(rounded(event.size_bytes), str(trace.origins[event.number])) for event in served]


def measured(model: str, variant: str) -> tuple[list[Request], list[tuple[int, int]]]:
    """In order, on the GPU; and the address and size of each segment, likewise."""
    work, cuda = WORKS[model], torch.device("cuda")
    clean(cuda)
    torch.cuda.memory._record_memory_history(stacks="python", max_entries=MOST_ENTRIES)
    try:
        with seeded(0, cuda):
            made = change_of(variant)(work.make_model().to(cuda))
            step = TrainingStep(made, on_device(work.inputs(), cuda), work.amp)
            for _ in range(CUDA_WARMUP):
                step.run()
        entries = torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    assert len(entries) < MOST_ENTRIES
    requests = [(rounded(entry["size"]), _origin(entry)) for entry in entries if entry["action"] == "alloc"]
    return requests, [(entry["addr"], entry["size"]) for entry in entries if entry["action"] == "segment_alloc"]


def _origin(entry: dict[str, Any]) -> str:
    frames = [f"{Path(frame['filename']).name}:{frame['line']} {frame['name']}" for frame in entry["frames"]]
    return " < ".join(frames[:3])


def differences(one: Sequence[Request], other: Sequence[Request]) -> list[tuple[Sequence[Request], Sequence[Request]]]:
    """Runs of requests that only one of the two has, as far as the sizes tell."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("one", "other")]
        for file, requests in zip(files, (one, other), strict=True):
            file.write_text("".join(f"{size}\n" for size, _ in requests))
        found = subprocess.run(["diff", *map(str, files)], capture_output=True, text=True, check=False).stdout
    hunks = [match for match in map(HUNK.match, found.splitlines()) if match]

    def part(requests: Sequence[Request], first: str, last: str | None, is_empty: bool) -> Sequence[Request]:
        return [] if is_empty else requests[int(first) - 1 : int(last or first)]

    return [(part(one, m[1], m[2], m[3] == "a"), part(other, m[4], m[5], m[3] == "d")) for m in hunks]


def main() -> None:
    """Write the requests and print the differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=WORKS)
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    parser.add_argument("--only-prediction", action="store_true")
    parser.add_argument("--most", type=int, default=40, help="differences that are printed; default: %(default)s")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    found = {"predicted": predicted(options.model, options.variant)}
    if not options.only_prediction:
        found["measured"], segments = measured(options.model, options.variant)
        (options.out / "segments.txt").write_text("".join(f"{address:#x}\t{size}\n" for address, size in segments))
        below = sum(later < earlier for (earlier, _), (later, _) in pairwise(segments))
        print(f"{len(segments)} segments, {below} of them below the one before")
    for name, requests in found.items():
        lines = (f"{size}\t{origin}\n" for size, origin in requests)
        (options.out / f"{name}.txt").write_text("".join(lines))
        print(f"{name}: {len(requests)} requests, {sum(size for size, _ in requests) / 2**20:,.1f} MiB in all")
    for mine, theirs in differences(found["measured"], found["predicted"])[: options.most] if len(found) > 1 else ():
        print("", *(f"only measured   {size:>12,}  {origin}" for size, origin in mine), sep="\n")
        print(*(f"only predicted  {size:>12,}  {origin}" for size, origin in theirs), sep="\n")


if __name__ == "__main__":
    main()
