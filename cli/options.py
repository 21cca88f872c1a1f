"""What the command line may say."""

import argparse
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, get_args

import torch

import memopt
from memopt.config import Numerics, Recompute

from .errors import CommandError
from .inputs import DEFAULTS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

TARGET_HELP = "path/to/file.py:Name or package.module:Name; Name is a class, a factory or a module instance"
EXIT_STATUS = "Exit status: 0 done, 2 TARGET or an option cannot be used."
NOT_EQUIVALENT = "Exit status: 0 done, 1 the rewritten model is not equivalent, 2 TARGET or an option cannot be used."


class _Parser(argparse.ArgumentParser):
    """Reports a mistake as every other bad input is reported."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # -1GiB and -1x3 are values, if bad ones: what takes them says more of them than that there is none.
        self._negative_number_matcher = re.compile(r"-\d")

    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message[:1].upper()}{message[1:]}. See {self.prog} --help.")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """What was said; `command` names what to run.

    Raises:
        CommandError: it is no command, or one that does not take it.
    """
    options, unknown = _build_parser().parse_known_args(arguments)
    if unknown:
        raise CommandError(
            f"memopt {options.command} has no {' '.join(unknown)}. See memopt {options.command} --help for what it has."
        )
    return options


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="memopt", description="Train any naive DenseNet in memory linear in its depth.")
    parser.add_argument("--version", action="version", version=f"memopt {memopt.__version__}")
    from .train.options import add_train  # builds on this module

    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    optimize = _command(commands, "optimize", "apply memopt to a model and show what that saves")
    optimize.add_argument(
        "--report",
        action="store_true",
        help="run and measure real training steps too, a minute or so on a CPU (without: equivalence and predicted GPU "
        "memory)",
    )
    optimize.add_argument("--json", metavar="FILE", help="write the report as JSON; - writes it to stdout, alone")
    optimize.add_argument(
        "--html", metavar="FILE", help="write the report as one self-contained page (needs matplotlib)"
    )
    optimize.add_argument(
        "--timeline",
        metavar="FILE",
        help="draw predicted memory over one step, before and after, by category; FILE ends in .html, .svg or .png "
        "(needs matplotlib)",
    )
    _add_budget(optimize)
    optimize.add_argument("--quiet", action="store_true", help="print no progress and no tables, only errors")
    explain = _command(commands, "explain", "show every chain of a model, what is done with it and what that saves")
    explain.add_argument("--json", metavar="FILE", help="write that as JSON; - writes it to stdout, alone")
    _add_budget(explain)
    limits = _command(commands, "limits", "the largest batch, and the deepest model, that train in a given memory")
    limits.add_argument("--memory", required=True, metavar="SIZE", help="of the GPU, 12GiB for example")
    limits.add_argument("--json", metavar="FILE", help="write the answers as JSON; - writes it to stdout, alone")
    _add_also(limits)
    sweep = _command(
        commands,
        "sweep",
        "memory over a range of depths, batch sizes or arguments",
        about="One of --depth, --batch-size and --arg KEY= is given a range START:STOP:STEP: every STEP-th number from "
        "START on, up to STOP and including it where a step ends there. 40:160:60 is 40, 100, 160. A range of "
        "--batch-size takes the place of the first size of --input.",
        batch_size=str,
    )
    sweep.add_argument("--depth", metavar="START:STOP:STEP", help="vary the argument depth of the class or factory")
    sweep.add_argument(
        "--out",
        default="sweep",
        metavar="PREFIX",
        help="write PREFIX.csv, PREFIX.svg and PREFIX.png; default: %(default)s, in the working directory",
    )
    sweep.add_argument("--levels", action="store_true", help="memopt at each level instead of the best for memory")
    sweep.add_argument("--measure", action="store_true", help="run real steps on a GPU instead of predicting them")
    _add_also(sweep)
    diff = commands.add_parser(
        "diff",
        help="set JSON reports of optimize side by side",
        description="Set JSON reports of optimize side by side, each figure with its ratio to the first report's.",
        epilog="Exit status: 0 done, 1 --fail-above was given and something got worse, 2 a report cannot be read.",
    )
    diff.add_argument("reports", nargs="+", metavar="FILE", help="of optimize --json; ratios are to the first")
    diff.add_argument(
        "--fail-above",
        type=float,
        metavar="RATIO",
        help="exit status 1 where a figure after memopt is more than RATIO times the first report's, where fewer "
        "chains are rewritten, or where a model is not equivalent",
    )
    diff.add_argument("--debug", action="store_true", help="show the traceback of an error")
    add_train(commands)
    return parser


def _add_budget(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--budget",
        metavar="SIZE",
        help="that a step's peak allocated stays within, 6GiB for example: each layer keeps what there is room for",
    )


def _add_also(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="LABEL=FILE:FUNCTION",
        help="a further variant: what FUNCTION makes of the naive model; repeatable",
    )


def _command(
    commands: Any, name: str, summary: str, about: str = "", batch_size: Callable[[str], Any] | None = None
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[:1].upper()}{summary[1:]}. {about}",
        epilog=f"{DEFAULTS} {NOT_EQUIVALENT if name == 'optimize' else EXIT_STATUS}",
    )
    parser.add_argument("target", metavar="TARGET", help=TARGET_HELP)
    parser.add_argument(
        "--arg",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="argument of the class or factory, a Python value or else a string; repeatable",
    )
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="SHAPE",
        help="shape of the input, 64x3x32x32; repeat for a forward with several arguments",
    )
    parser.add_argument("--batch-size", type=batch_size or positive, metavar="N", help="batch of the inferred input")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of model and input; default: %(default)s")
    parser.add_argument("--amp", choices=AMP_DTYPES, help="run under autocast in this dtype; weights stay fp32")
    parser.add_argument(
        "--numerics",
        choices=get_args(Numerics),
        default="auto",
        help="exact: eager's kernels, the same bits; fast: fused kernels, no farther from float64 than eager; auto: "
        "fast on a GPU, where the model has fused kernels; default: %(default)s",
    )
    parser.add_argument(
        "--recompute",
        choices=get_args(Recompute),
        default="auto",
        help="layer: keep the features alone; concat: each layer's bottleneck output, too; keep: what eager keeps; "
        "auto: layer, or what a memory budget has room for; default: %(default)s",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def positive(text: str) -> int:
    """An option's value, a whole number above 0."""
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return number
