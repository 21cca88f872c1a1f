"""The command `memopt`: parse, run, print, exit status."""

import argparse
import io
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TextIO

import memopt
from memopt.api import NOT_RUN_YET
from memopt.measure import Comparison, StepError
from memopt.measure.compare import shapes_of
from memopt.measure.memory import is_out_of_memory
from memopt.measure.step import autocast, on_device
from memopt.report import (
    comparison_document,
    equivalence_line,
    explanation_document,
    print_comparison,
    print_explanation,
    shape_text,
    stage_display,
)
from memopt.report.pictures import PictureError

from .diff import diff
from .drawing import draw, require_different, require_drawable
from .errors import CommandError, describe
from .job import make_job
from .limits import limits
from .options import parse
from .output import STDOUT, alone_on_stdout, require_writable, write_document
from .sweep import sweep

DONE, NOT_EQUIVALENT, UNUSABLE, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; None for the process's own.

    Returns:
        0 done, 1 the rewritten model is not equivalent, 2 the target or an option cannot be used.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    _never_fail_to_encode(sys.stdout, sys.stderr)
    try:
        options = parse(arguments)
        return _COMMANDS[options.command](options)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc(file=sys.stderr)
        print(f"memopt: {_process()}{_line(error)}", file=sys.stderr)
        return UNUSABLE


def _optimize(options: argparse.Namespace) -> int:
    stdout = sys.stdout
    if options.json is not None:
        require_writable(options.json)
    require_drawable(options)
    require_different(options)
    with alone_on_stdout(options.json), stage_display(sys.stderr, quiet=options.quiet) as on_stage:
        comparison = _comparison(options, on_stage)
    if options.json is not None:
        asked = {name: getattr(options, name) for name in ("numerics", "recompute", "budget")}
        write_document(comparison_document(comparison, options.target, options.arg, asked), options.json, stdout)
    draw(options, comparison)
    if options.json != STDOUT and not options.quiet:
        print_comparison(comparison, options.target, stdout)
    elif not comparison.equivalence.passed:
        print(f"memopt: {equivalence_line(comparison.equivalence)}", file=sys.stderr)
    return DONE if comparison.equivalence.passed else NOT_EQUIVALENT


def _comparison(options: argparse.Namespace, on_stage: Callable[[str], None]) -> Comparison:
    on_stage("loading the model")
    job = make_job(options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "memopt left .* as it is", UserWarning)  # a note of the report says so
        return memopt.compare(
            job.make_model,
            job.inputs,
            config=job.config,
            device=job.device,
            amp=job.amp,
            measure=options.report,
            on_stage=on_stage,
        )


def _explain(options: argparse.Namespace) -> int:
    stdout = sys.stdout
    if options.json is not None:
        require_writable(options.json)
    with alone_on_stdout(options.json), stage_display(sys.stderr) as on_stage:
        on_stage("loading the model")
        job = make_job(options)
        on_stage("looking for chains")
        model = job.make_model().to(job.device)
        with autocast(model, job.amp):
            memopt.apply(model, on_device(job.inputs, job.device), config=job.config)
    explanation = _without_a_step(memopt.explain(model))
    if options.json is not None:
        write_document(explanation_document(explanation, options.target), options.json, stdout)
    if options.json != STDOUT:
        shapes = " and ".join(map(shape_text, shapes_of(job.inputs)))
        print_explanation(explanation, f"{options.target}, input {shapes}", stdout)
    return DONE


def _train(options: argparse.Namespace) -> int:
    from .train.command import train  # FSDP with it, which takes a third of what importing torch does

    return train(options)


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "optimize": _optimize,
    "explain": _explain,
    "limits": limits,
    "sweep": sweep,
    "diff": diff,
    "train": _train,
}


def _without_a_step(explanation: memopt.Explanation) -> memopt.Explanation:
    """Here the rewritten forward never runs, which is then not worth a note."""
    return replace(explanation, notes=tuple(note for note in explanation.notes if note != NOT_RUN_YET))


def _process() -> str:
    """Which of the processes that a launcher started speaks."""
    return f"process {os.environ['RANK']}: " if "RANK" in os.environ else ""


def _line(error: Exception) -> str:
    if isinstance(error, CommandError | StepError | PictureError | memopt.MemoptError):
        return " ".join(str(error).split())
    if is_out_of_memory(error):
        return "There is not enough memory even for a few samples. Choose a smaller --input or another --device."
    return f"{describe(error)}. Run again with --debug for the traceback; report it if the model trains without memopt."


def _never_fail_to_encode(*streams: TextIO) -> None:
    """Where a stream cannot encode a character (a dash, a rule), print a substitute instead of failing."""
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
