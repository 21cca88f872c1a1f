"""`memopt limits`: the largest batch, and the deepest model, that train in a given memory."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from memopt.ir import parse_size, whole_mebibytes
from memopt.measure import StepFigures
from memopt.measure.scaling import largest_fitting
from memopt.report import print_table, stage_display

from .errors import CommandError
from .job import Job, make_job
from .target import load_target, parse_arguments, takes_argument
from .variants import NAIVE, Variant, levels, measured, other_variants, predicted, with_batch

DEPTH = "depth"
# A deep model takes long to predict: the depth found is at most this share too small.
DEPTH_TOLERANCE = 0.02
# Depths that a factory takes lie at most this far apart (6n + 4 for DenseNet-BC).
DEPTHS_TRIED = 64

Vary = Callable[[int], Job]


@dataclass(frozen=True, slots=True)
class Limit:
    """The largest size of a variant that fits.

    Attributes:
        size: None where not even the smallest fits.
        figures: predicted for it.
        trained: whether it trained within the memory on the GPU here; None without one.
    """

    size: int | None
    figures: StepFigures | None
    trained: bool | None


def limits(options: argparse.Namespace) -> int:
    """Run the command."""
    memory_bytes = parse_size(options.memory, "--memory")
    with stage_display(sys.stderr) as on_stage:
        on_stage("loading the model")
        job = make_job(options)
        variants = (NAIVE, *other_variants(options.also), *levels(job.config))
        questions = [("batch size", lambda batch: with_batch(job, batch), job.inputs[0].shape[0])]
        if takes_argument(options.target, DEPTH):
            depths = _Depths(options, job)
            questions.append((DEPTH, depths.job, depths.first))
        answers = []
        for name, vary, start in questions:
            for variant in variants:
                on_stage(f"largest {name}: {variant.label}")
                tolerance = DEPTH_TOLERANCE if name == DEPTH else 0.0
                limit = _limit(variant, vary, memory_bytes, start, tolerance, job.device)
                if name == DEPTH and limit.size is not None:
                    limit = replace(limit, size=depths.depth(limit.size))
                answers.append((name, variant.label, limit))
    _print(answers, memory_bytes, job)
    return 0


class _Depths:
    """The depths that a factory takes, counted from 1."""

    def __init__(self, options: argparse.Namespace, job: Job) -> None:
        self._options, self._job = options, job
        self._arguments = parse_arguments(options.arg)
        smallest = self._next(1)
        self._smallest, self._step = smallest, self._next(smallest + 1) - smallest
        self.first = max((64 - smallest) // self._step, 1)

    def depth(self, number: int) -> int:
        """The depth with this number."""
        return self._smallest + (number - 1) * self._step

    def job(self, number: int) -> Job:
        """The job with that depth."""
        target = load_target(self._options.target, {**self._arguments, DEPTH: self.depth(number)})
        return replace(self._job, target=target)

    def _next(self, least: int) -> int:
        for depth in range(least, least + DEPTHS_TRIED):
            try:
                load_target(self._options.target, {**self._arguments, DEPTH: depth}).make()
            except CommandError:
                continue
            return depth
        raise CommandError(
            f"{self._options.target} takes an argument depth, but no depth from {least} to "
            f"{least + DEPTHS_TRIED - 1}. Give the others of its arguments that it needs with --arg."
        )


def _limit(
    variant: Variant, vary: Vary, memory_bytes: int, start: int, tolerance: float, device: torch.device
) -> Limit:
    figures: dict[int, StepFigures] = {}

    def reserved_bytes(size: int) -> int:
        figures[size] = predicted(vary(size), variant)
        reserved = figures[size].peak_reserved_bytes
        assert reserved is not None
        return reserved

    size = largest_fitting(reserved_bytes, memory_bytes, start, tolerance)
    if size is None:
        return Limit(None, None, None)
    trained = _trains(vary(size), variant, memory_bytes, device) if device.type == "cuda" else None
    return Limit(size, figures[size], trained)


def _trains(job: Job, variant: Variant, memory_bytes: int, device: torch.device) -> bool:
    """Whether steps run on the GPU while torch may take no more of it than that."""
    total_bytes = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, memory_bytes / total_bytes), device)
    try:
        return not measured(job, variant, device, warmup=1, steps=1).out_of_memory
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def _print(answers: list[tuple[str, str, Limit]], memory_bytes: int, job: Job) -> None:
    def mib(size_bytes: int | None) -> str:
        return "—" if size_bytes is None else whole_mebibytes(size_bytes)

    verified = any(limit.trained is not None for _, _, limit in answers)
    rows = []
    for name, label, limit in answers:
        figures = limit.figures or StepFigures()
        row = [f"largest {name}", label, "none" if limit.size is None else f"{limit.size:,}"]
        row += [mib(figures.peak_allocated_bytes), mib(figures.peak_reserved_bytes)]
        words = {True: "yes", False: "no: out of memory", None: "—"}
        rows.append([*row, words[limit.trained]] if verified else row)
    shape = "x".join(map(str, job.inputs[0].shape[1:]))
    depths = f", depths at batch {job.inputs[0].shape[0]}" if any(name == DEPTH for name, _, _ in answers) else ""
    print_table(
        f"{job.target.text} in {whole_mebibytes(memory_bytes)}, input {shape}{depths}",
        ("", "variant", "fits", "peak allocated", "peak reserved", *(("trained here",) if verified else ())),
        rows,
        (
            "Predicted for a GPU: what the caching allocator reserves fits the memory. The CUDA context takes some "
            "hundred MiB of a card beside that.",
        ),
        sys.stdout,
    )
