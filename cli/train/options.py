"""What `memopt train` may be told."""

import argparse
from collections.abc import Callable
from typing import Any, get_args

from memopt.config import Numerics, Recompute

from ..options import AMP_DTYPES, TARGET_HELP, positive
from .settings import AUTO, DEFAULTS

SUMMARY = "train a DenseNet on images, with memopt applied"
EPILOG = (
    "Several GPUs: torchrun --nproc-per-node=N -m memopt_cli train ... trains with DistributedDataParallel. Exit "
    "status: 0 done, 2 an option or the data cannot be used, 130 interrupted (143 terminated): what was reached is "
    "saved, and --resume goes on."
)


def add_train(commands: Any) -> None:
    """Add the command to the parser's commands."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "train", help=SUMMARY, description=f"{SUMMARY[:1].upper()}{SUMMARY[1:]}.", epilog=EPILOG
    )
    _add_data(parser.add_argument_group("data"))
    _add_model(parser.add_argument_group("model"))
    _add_recipe(parser.add_argument_group("training"))
    _add_machine(parser.add_argument_group("machine"))
    _add_memopt(parser.add_argument_group("memopt"))
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _add_data(group: Any) -> None:
    group.add_argument(
        "--data",
        metavar="PATH",
        help="folder of CIFAR-10 or CIFAR-100 as published, or of images in one folder a class, optionally below "
        "train and test; default: the 1797 handwritten digits that come with memopt, enlarged to 32x32",
    )
    _add(group, "--image-size", positive, "N", "height and width that images of a folder are brought to")
    group.add_argument(
        "--valid-size", type=positive, metavar="N", help="images kept for validation; default: a tenth of them"
    )
    group.add_argument(
        "--augment",
        choices=("yes", "no"),
        help="move images by up to 4 pixels and, digits apart, mirror half of them; default: yes",
    )
    group.add_argument("--workers", type=_whole, metavar="N", help="processes that read image files; default: 2 or 0")


def _add_model(group: Any) -> None:
    group.add_argument("--model", metavar="TARGET", help=f"default: DenseNet-BC; {TARGET_HELP}")
    group.add_argument("--arg", action="append", default=[], metavar="KEY=VALUE", help="argument of it; repeatable")
    _add(group, "--depth", positive, "N", "of DenseNet-BC, 6n + 4")
    _add(group, "--growth-rate", positive, "K", "of DenseNet-BC")


def _add_recipe(group: Any) -> None:
    _add(group, "--epochs", positive, "N", "passes over the training images")
    _add(group, "--batch-size", _positive_or_auto, "N", "images a step over all processes, or auto: all that fit")
    _add(
        group, "--lr", _above_zero, "RATE", "learning rate, divided by ten after half and three quarters of the epochs"
    )
    _add(group, "--momentum", _share, "SHARE", "of SGD, Nesterov's")
    _add(group, "--weight-decay", _share, "SHARE", "of SGD")
    _add(group, "--seed", _whole, "N", "of every random number")
    group.add_argument("--amp", choices=AMP_DTYPES, help="run under autocast in this dtype; weights stay fp32")
    kept = group.add_mutually_exclusive_group()
    kept.add_argument("--save", metavar="DIR", help="folder of the new run; default: the next free one of runs/1, 2, …")
    kept.add_argument("--resume", metavar="DIR", help="go on with the run in this folder, with its options")


def _add_machine(group: Any) -> None:
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    group.add_argument("--channels-last", action="store_true", help="keep images and weights in this memory format")
    group.add_argument("--compile", action="store_true", help="torch.compile what memopt leaves")
    group.add_argument("--data-parallel", action="store_true", help="nn.DataParallel over all GPUs, in one process")
    group.add_argument("--fsdp", action="store_true", help="fully_shard the model instead of DistributedDataParallel")
    group.add_argument("--sync-batchnorm", action="store_true", help="take batch statistics over all processes")
    group.add_argument(
        "--timeout",
        type=positive,
        default=50,
        metavar="SECONDS",
        help="give up waiting for another process; default: %(default)s",
    )


def _add_memopt(group: Any) -> None:
    way = group.add_mutually_exclusive_group()
    way.add_argument("--efficient", dest="naive", action="store_false", default=False, help="apply memopt (default)")
    way.add_argument("--naive", dest="naive", action="store_true", help="train the model as it is")
    group.add_argument("--numerics", choices=get_args(Numerics), default="auto", help="default: %(default)s")
    group.add_argument("--recompute", choices=get_args(Recompute), default="auto", help="default: %(default)s")


def _add(group: Any, option: str, kind: Callable[[str], object], metavar: str, text: str) -> None:
    """An option whose default is the settings'; not given, it is None, so that a resumed run keeps its own."""
    default = getattr(DEFAULTS, option[2:].replace("-", "_"))
    group.add_argument(option, type=kind, metavar=metavar, help=f"{text}; default: {default}")


def _positive_or_auto(text: str) -> int | str:
    return AUTO if text == AUTO else positive(text)


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)


def _above_zero(text: str) -> float:
    number = _number(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def _share(text: str) -> float:
    number = _number(text)
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 up to, but not including, 1")
    return number


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")
