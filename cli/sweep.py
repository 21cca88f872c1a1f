"""`memopt sweep`: memory, and time where there is a GPU, over a range of depths, batch sizes or arguments."""

import argparse
import csv
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from memopt.ir import duration, mebibytes
from memopt.measure import StepFigures
from memopt.measure.scaling import fitted_exponent
from memopt.report import print_table, stage_display
from memopt.report.pictures import lines_figure, require_matplotlib, save_figure

from .errors import CommandError
from .job import Job, make_job
from .output import require_writable
from .ranges import is_range, parse_range
from .target import load_target, parse_arguments
from .variants import (
    NAIVE,
    Variant,
    kernels_of,
    levels,
    measured,
    memopt_variant,
    other_variants,
    predicted,
    with_batch,
)

FIELDS = (
    "target", "variable", "value", "variant", "source",
    "activation_peak_bytes", "peak_allocated_bytes", "peak_reserved_bytes", "largest_peak_allocated_bytes",
    "step_seconds", "device", "torch",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Point:
    """One variant at one value.

    Attributes:
        value: of what is varied.
        variant: its label.
        figures: predicted, or measured on a GPU.
        largest_bytes: peak allocated, if estimated workspaces take as much as they may; None where none is estimated.
    """

    value: int
    variant: str
    figures: StepFigures
    largest_bytes: int | None


@dataclass(frozen=True, slots=True)
class _Range:
    """What is varied, over what, and the job for a value."""

    name: str
    values: tuple[int, ...]
    job: Callable[[Job, int], Job]


def sweep(options: argparse.Namespace) -> int:
    """Run the command."""
    varied = _varied(options)
    table, *pictures = paths = [Path(f"{options.out}{suffix}") for suffix in (".csv", ".svg", ".png")]
    require_matplotlib("sweep")
    for path in paths:
        require_writable(str(path), "--out")
    with stage_display(sys.stderr) as on_stage:
        on_stage("loading the model")
        job = make_job(options)
        if options.measure and job.device.type != "cuda":
            raise CommandError("--measure needs a CUDA device, which torch does not see here. Leave it out to predict.")
        ours = levels(job.config) if options.levels else (memopt_variant(job.config, "memopt"),)
        points = []
        for value in varied.values:
            for variant in (NAIVE, *other_variants(options.also), *ours):
                on_stage(f"{varied.name} {value}: {variant.label}")
                figures, largest_bytes = _figures(varied.job(job, value), variant, options.measure)
                points.append(Point(value, variant.label, figures, largest_bytes))
    _write_csv(points, varied.name, job, options.measure, table)
    _draw(points, varied.name, job, pictures)
    _print(points, varied.name, job, options.measure)
    print(f"Written: {', '.join(map(str, paths))}")  # not by the table's printer, which would break a path
    return 0


def _varied(options: argparse.Namespace) -> _Range:
    arguments = dict(pair.partition("=")[::2] for pair in options.arg)
    ranges = {name: (text, f"--arg {name}=") for name, text in arguments.items() if is_range(text)}
    options.arg = [pair for pair in options.arg if pair.partition("=")[0] not in ranges]
    if options.depth is not None:
        ranges["depth"] = (options.depth, "--depth")
    given = [(name, parse_range(text, option)) for name, (text, option) in ranges.items()]
    found = [_Range(name, values, _argument_varied(options, name)) for name, values in given]
    if options.batch_size is not None and is_range(options.batch_size):
        found.append(_Range("batch size", parse_range(options.batch_size, "--batch-size"), with_batch))
        first = found[-1].values[0]
        # The first size of --input is the batch, which is what varies.
        options.input = [re.sub(r"^\d+", str(first), shape) for shape in options.input]
        options.batch_size = None if options.input else first
    elif options.batch_size is not None:
        options.batch_size = _whole(options.batch_size)
    if len(found) != 1:
        raise CommandError(
            f"sweep varies one thing, not {len(found)}. Give one range START:STOP:STEP, with --depth, --batch-size or "
            "--arg KEY=."
        )
    if found[0].name != "batch size":
        options.arg.append(f"{found[0].name}={found[0].values[0]}")
    return found[0]


def _argument_varied(options: argparse.Namespace, name: str) -> Callable[[Job, int], Job]:
    def vary(job: Job, value: int) -> Job:
        return replace(job, target=load_target(options.target, {**parse_arguments(options.arg), name: value}))

    return vary


def _whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise CommandError(f"--batch-size {text!r} is neither a whole number above 0 nor a range START:STOP:STEP.")
    return int(text)


def _figures(job: Job, variant: Variant, measure: bool) -> tuple[StepFigures, int | None]:
    return (measured(job, variant, job.device), None) if measure else predicted(job, variant)


def _write_csv(points: list[Point], variable: str, job: Job, measure: bool, path: Path) -> None:
    device = torch.cuda.get_device_name(job.device) if measure else "GPU"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        for point in points:
            writer.writerow(
                {
                    "target": job.target.text,
                    "variable": variable,
                    "value": point.value,
                    "variant": point.variant,
                    "source": "measured" if measure else "predicted",
                    **{name: getattr(point.figures, name) for name in FIELDS if hasattr(point.figures, name)},
                    "largest_peak_allocated_bytes": point.largest_bytes,
                    "device": device,
                    "torch": torch.__version__,
                }
            )


def _series(points: list[Point]) -> dict[str, list[tuple[float, float]]]:
    """Activation peaks in bytes by variant, where there are any."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        peak_bytes = point.figures.activation_peak_bytes
        if peak_bytes:
            lines.setdefault(point.variant, []).append((point.value, peak_bytes))
    return lines


def _draw(points: list[Point], variable: str, job: Job, paths: list[Path]) -> None:
    batch = "" if variable == "batch size" else f", batch {job.inputs[0].shape[0]}"
    lines = {}
    for label, series in _series(points).items():
        exponent = fitted_exponent(series)
        lines[label if exponent is None else f"{label}: grows with exponent {exponent}"] = series
    figure = lines_figure(lines, x_label=f"{variable} of {job.target.name}{batch}", y_label="activation peak")
    for path in paths:
        save_figure(figure, path)


def _print(points: list[Point], variable: str, job: Job, measure: bool) -> None:
    def cells(figures: StepFigures) -> list[str]:
        if figures.out_of_memory:
            return ["out of memory", *["—"] * (len(heads) - 3)]
        sizes = (figures.activation_peak_bytes, figures.peak_allocated_bytes, figures.peak_reserved_bytes)
        shown = ["—" if size is None else mebibytes(size) for size in sizes]
        return shown if figures.step_seconds is None else [*shown, duration(figures.step_seconds)]

    heads = [variable, "variant", "activation peak", "peak allocated", "peak reserved", *(["step"] if measure else [])]
    source = (
        f"measured on {torch.cuda.get_device_name(job.device)}"
        if measure
        else f"predicted for a GPU, memopt with {kernels_of(job.config)}"
    )
    exponents = [(label, fitted_exponent(series)) for label, series in _series(points).items()]
    notes = [f"{label}: the activation peak grows with {variable} to the power {e}." for label, e in exponents if e]
    estimated = [point for point in points if point.largest_bytes is not None]
    if estimated:
        notes.append(
            f"Workspaces of convolutions that were never measured on a GPU are estimated in {len(estimated)} of "
            f"{len(points)} rows. The CSV file says what is allocated if they take as much as they may."
        )
    print_table(
        f"{job.target.text}, {source}",
        heads,
        [[str(point.value), point.variant, *cells(point.figures)] for point in points],
        notes,
        sys.stdout,
    )
