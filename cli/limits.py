"""`memopt limits`: the largest batch, and the deepest model, that train in a given memory."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from memopt.ir import parse_size, whole_mebibytes
from memopt.measure import StepFigures
from memopt.measure.compare import shapes_of
from memopt.measure.scaling import largest_fitting
from memopt.report import SCHEMA, print_as_found, shape_text, stage_display

from .errors import CommandError
from .job import Job, make_job
from .output import alone_on_stdout, require_writable, write_document
from .target import load_target, parse_arguments, takes_argument
from .variants import NAIVE, Variant, kernels_of, levels, measured, other_variants, predicted_within, with_batch

DEPTH = "depth"
# A deep model takes long to predict: the depth found is at most this share too small.
DEPTH_TOLERANCE = 0.02
# What is predicted to fit and does not train on the GPU here is made smaller by this share at first.
STEP_DOWN = 0.02
# So many larger batches are tried, if the largest that has room by what is allocated is larger by this share.
LOOKS, WORTH_LOOKING = 32, 0.1
# Depths that a factory takes lie at most this far apart (6n + 4 for DenseNet-BC).
DEPTHS_TRIED = 64


@dataclass(frozen=True, slots=True)
class Limit:
    """The largest size of a variant that fits.

    Attributes:
        size: None where not even the smallest fits.
        figures: predicted for it.
        largest_bytes: peak allocated, if estimated workspaces take as much as they may; None where none is estimated.
        trained: whether it trained within the memory on the GPU here; None without one.
        predicted_size: what is predicted to fit; larger than `size` where that much ran out of memory on the GPU here.
    """

    size: int | None = None
    figures: StepFigures | None = None
    largest_bytes: int | None = None
    trained: bool | None = None
    predicted_size: int | None = None


@dataclass(frozen=True, slots=True)
class _Question:
    """What is made as large as fits.

    Attributes:
        name: how the table calls it.
        job: the job of a number that is tried.
        start: the first number tried.
        tolerance: share of the number by which the answer may be too small.
        size: what a number stands for.
    """

    name: str
    job: Callable[[int], Job]
    start: int
    tolerance: float = 0.0
    size: Callable[[int], int] = int


def limits(options: argparse.Namespace) -> int:
    """Run the command."""
    memory_bytes, stdout = parse_size(options.memory, "--memory"), sys.stdout
    if options.json is not None:
        require_writable(options.json)
    with alone_on_stdout(options.json), stage_display(sys.stderr) as on_stage:
        on_stage("loading the model")
        job = make_job(options)
        variants = (NAIVE, *other_variants(options.also), *levels(job.config))
        questions = [_Question("batch size", lambda batch: with_batch(job, batch), job.inputs[0].shape[0])]
        if takes_argument(options.target, DEPTH):
            depths = _Depths(options, job)
            questions.append(_Question(DEPTH, depths.job, depths.first, DEPTH_TOLERANCE, depths.depth))
        answers = _print(questions, variants, memory_bytes, job, on_stage)
    if options.json is not None:
        document = {
            "schema": SCHEMA,
            "target": job.target.text,
            "arguments": options.arg,
            "memory_bytes": memory_bytes,
            "numerics": options.numerics,
            "input_shape": list(job.inputs[0].shape),
            "input_shapes": [list(shape) for shape in shapes_of(job.inputs)],
            "limits": answers,
        }
        write_document(document, options.json, stdout)
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


def _limit(variant: Variant, question: _Question, memory_bytes: int, device: torch.device) -> Limit:
    predictions: dict[int, tuple[StepFigures, int | None]] = {}

    def cost(number: int) -> int:
        """What is allocated, which grows evenly, unless so much must be reserved that the memory does not suffice."""
        figures, _ = predictions[number] = predicted_within(question.job(number), variant, memory_bytes)
        allocated, reserved = figures.peak_allocated_bytes, figures.peak_reserved_bytes
        assert allocated is not None
        assert reserved is not None
        return allocated if reserved <= memory_bytes else reserved

    predicted = largest_fitting(cost, memory_bytes, question.start, question.tolerance)
    if predicted is None:
        return Limit()
    if not question.tolerance:
        allocated = {n: figures.peak_allocated_bytes or 0 for n, (figures, _) in predictions.items()}
        beyond = _beyond(predicted, allocated, memory_bytes)
        predicted = next((n for n in beyond if cost(n) <= memory_bytes), predicted)
    number: int | None = predicted
    if device.type == "cuda":
        steps = down_from(predicted)
        number = next((n for n in steps if trains(question.job(n), variant, memory_bytes, device)), None)
    if number is None:
        return Limit(trained=False, predicted_size=question.size(predicted))
    if number not in predictions:
        cost(number)
    trained = True if device.type == "cuda" else None
    return Limit(question.size(number), *predictions[number], trained, question.size(predicted))


def _beyond(number: int, allocated: dict[int, int], memory_bytes: int) -> Iterator[int]:
    """Larger numbers that might fit although the next does not, the largest first.

    What is reserved does not grow evenly, for blocks of some sizes fill segments better than others. What is allocated
    does, so there is nothing to look for where that would not fit.

    Args:
        number: fits.
        allocated: bytes by number, as far as they are known.
        memory_bytes: what there is.
    """
    first = min(allocated)
    if first == number:
        return
    growth = (allocated[number] - allocated[first]) / (number - first)
    most = number + int((memory_bytes - allocated[number]) / growth) if growth > 0 else number
    if most > (1 + WORTH_LOOKING) * number:
        yield from sorted({number + (most - number) * place // LOOKS for place in range(1, LOOKS + 1)}, reverse=True)


def down_from(number: int) -> Iterator[int]:
    """A number and smaller ones, in steps that double: training tells late that it runs out of memory."""
    step = STEP_DOWN * number
    yield number
    while number > 1:
        number = max(min(round(number - step), number - 1), 1)
        yield number
        step *= 2


def trains(job: Job, variant: Variant, memory_bytes: int, device: torch.device) -> bool:
    """Whether steps run on the GPU while torch may take no more of it than that."""
    total_bytes = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, memory_bytes / total_bytes), device)
    try:
        return not measured(job, variant, device, warmup=1, steps=1).out_of_memory
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def _print(
    questions: Sequence[_Question],
    variants: Sequence[Variant],
    memory_bytes: int,
    job: Job,
    on_stage: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Each answer as soon as it is found: a large model takes minutes for all of them. All of them as data."""
    verified = job.device.type == "cuda"
    answers: list[dict[str, Any]] = []
    beyond: list[str] = []
    smaller: list[str] = []

    def notes() -> Iterator[str]:
        """Below the rows, when those are known."""
        yield (
            f"Predicted for a GPU, memopt with {kernels_of(job.config)}: what the caching allocator reserves fits the "
            "memory, if need be by giving free memory back first, which takes time. The CUDA context takes some "
            "hundred MiB of a card beside that."
        )
        if any(answer["predicted_size"] is None for answer in answers):
            yield "none: the smallest takes more already; the workspaces of cuBLAS alone are some 64 MiB."
        if smaller:
            yield f"Predicted to fit, but out of memory on the GPU here: {', '.join(smaller)}."
        if beyond:
            yield (
                "Workspaces of convolutions that were never measured on a GPU are estimated. If they take as much as "
                f"they may, more than the memory is allocated: {', '.join(beyond)}."
            )

    def rows() -> Iterator[list[str]]:
        for question, variant in product(questions, variants):
            on_stage(f"largest {question.name}: {variant.label}")
            limit = _limit(variant, question, memory_bytes, job.device)
            answers.append(_answer(question.name, variant.label, limit))
            if limit.largest_bytes is not None and limit.largest_bytes > memory_bytes:
                largest = whole_mebibytes(limit.largest_bytes)
                beyond.append(f"{largest} (largest {question.name}, {variant.label})")
            if limit.predicted_size != limit.size:
                smaller.append(f"{limit.predicted_size:,} (largest {question.name}, {variant.label})")
            row = _row(question.name, variant.label, limit)
            yield row if verified else row[:-1]

    shapes = " and ".join(shape_text(shape[1:]) for shape in shapes_of(job.inputs))
    depths = f", depths at batch {job.inputs[0].shape[0]}" if len(questions) > 1 else ""
    columns = {
        "": max(len(f"largest {question.name}") for question in questions),
        "variant": max(len(variant.label) for variant in variants),
        "fits": len("999,999"),
        "peak allocated": 0,
        "peak reserved": 0,
    }
    print_as_found(
        f"{job.target.text} in {whole_mebibytes(memory_bytes)}, input {shapes}{depths}",
        columns | ({"trained here": 0} if verified else {}),
        rows(),
        notes(),
        sys.stdout,
    )
    return answers


def _answer(name: str, label: str, limit: Limit) -> dict[str, Any]:
    figures = limit.figures or StepFigures()
    return {
        "largest": name,
        "variant": label,
        "size": limit.size,
        "peak_allocated_bytes": figures.peak_allocated_bytes,
        "peak_reserved_bytes": figures.peak_reserved_bytes,
        "largest_peak_allocated_bytes": limit.largest_bytes,
        "trained": limit.trained,
        "predicted_size": limit.predicted_size,
    }


def _row(name: str, label: str, limit: Limit) -> list[str]:
    figures = limit.figures or StepFigures()
    sizes = (figures.peak_allocated_bytes, figures.peak_reserved_bytes)
    shown = ["—" if size is None else whole_mebibytes(size) for size in sizes]
    words = {True: "yes", False: "no: out of memory", None: "—"}
    return [f"largest {name}", label, "none" if limit.size is None else f"{limit.size:,}", *shown, words[limit.trained]]
