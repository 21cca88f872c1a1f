"""Predicted memory of a training step on a GPU, and what the allocator's segments hold when it has reserved most.

    PYTHONPATH=. python tests/bench/segments.py densenet_models/bc.py:DenseNet --batch-size 512 --numerics fast

Takes what `memopt optimize` takes (see `memopt optimize --help`), and needs no GPU.
"""

import argparse
from collections import Counter
from dataclasses import replace

from memopt_cli.job import make_job
from memopt_cli.options import parse

import memopt
from memopt.ir import MIB
from memopt.measure import GPU
from memopt.measure.allocator import SegmentView
from memopt.measure.memory import leave
from memopt.measure.predict import Prediction, predict
from memopt.measure.trace import Trace, segments_after


def main() -> None:
    """Predict for the model named on the command line and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--naive", action="store_true", help="without memopt")
    parser.add_argument("--expandable-segments", action="store_true", help="as PYTORCH_CUDA_ALLOC_CONF can ask for")
    parser.add_argument("--lines", type=int, default=6, help="origins shown of each segment; default: %(default)s")
    own, rest = parser.parse_known_args()
    options = parse(["optimize", *rest])
    job = make_job(options)
    config = replace(job.config, numerics="fast" if job.config.numerics == "auto" else job.config.numerics)
    prediction = predict(
        job.make_model,
        job.inputs,
        replace(GPU, expandable_segments=own.expandable_segments),
        amp=job.amp,
        apply=leave if own.naive else lambda model: memopt.apply(model, config=config),
    )
    assert prediction.served is not None
    _print_figures(prediction)
    _print_moment("allocated", prediction.trace, prediction.served.peak_at, own)
    _print_moment("reserved", prediction.trace, prediction.served.reserved_at, own)


def _print_figures(prediction: Prediction) -> None:
    figures = prediction.figures
    assert figures.peak_allocated_bytes is not None
    assert figures.peak_reserved_bytes is not None
    for name in ("activation_peak_bytes", "saved_bytes", "peak_allocated_bytes", "peak_reserved_bytes"):
        print(f"{name.removesuffix('_bytes').replace('_', ' '):20s} {getattr(figures, name) / MIB:10,.1f} MiB")
    if prediction.unmeasured:
        largest = prediction.largest
        assert largest.peak_allocated_bytes is not None
        print(
            f"{len(prediction.unmeasured)} workspaces of convolutions were never measured and are estimated; "
            f"upper bound of the peak allocated {largest.peak_allocated_bytes / MIB:,.1f} MiB"
        )
    print(f"{'reserved / allocated':20s} {figures.peak_reserved_bytes / figures.peak_allocated_bytes:10.3f}")


def _print_moment(what: str, trace: Trace, at: int, own: argparse.Namespace) -> None:
    segments = segments_after(trace, at, expandable_segments=own.expandable_segments)
    free_bytes = sum(segment.free_bytes for segment in segments)
    print(f"\nAt the peak {what}: event {at} of {len(trace.events)}, after {trace.origins[trace.events[at].number]}")
    print(f"{len(segments)} segments, {free_bytes / MIB:,.1f} MiB of them free")
    for segment in sorted(segments, key=lambda segment: -segment.size_bytes):
        if segment.size_bytes > 2 * MIB:
            _print_segment(segment, trace, own.lines)
    small = [segment for segment in segments if segment.size_bytes <= 2 * MIB]
    print(f"  {len(small)} of 2 MiB, {sum(s.free_bytes for s in small) / MIB:,.1f} MiB of them free")


def _print_segment(segment: SegmentView, trace: Trace, lines: int) -> None:
    largest_free = max((block.size_bytes for block in segment.blocks if block.owner is None), default=0)
    print(
        f"  segment {segment.number}: {segment.size_bytes / MIB:,.1f} MiB, {segment.free_bytes / MIB:,.1f} MiB free "
        f"(largest piece {largest_free / MIB:,.1f} MiB)"
    )
    sizes: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for block in segment.blocks:
        if block.owner is not None:
            origin = str(trace.origins[block.owner])
            sizes[origin] += block.size_bytes
            counts[origin] += 1
    for origin, size_bytes in sizes.most_common(lines):
        print(f"    {size_bytes / MIB:10,.2f} MiB in {counts[origin]:3d}  {origin}")


if __name__ == "__main__":
    main()
