"""What cuDNN's convolutions take for the time of a call: measured where it was, else an upper bound.

The table, `workspaces.csv`, is made on a GPU by `tests/bench/measure_workspaces.py`. A convolution that is not in it
may take nothing, or as much as copies of all its operands in another layout: that is the bound.
"""

import csv
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch

_aten = torch.ops.aten
TABLE = Path(__file__).with_name("workspaces.csv")
FORWARD, DATA_GRADIENT, WEIGHT_GRADIENT = "forward", "data gradient", "weight gradient"


@dataclass(frozen=True, slots=True)
class ConvolutionCall:
    """One pass of a convolution, as far as its workspace may depend on it. Sizes are joined by "x".

    Attributes:
        operation: "forward", "data gradient" or "weight gradient".
        dtype: of all operands, "float32".
        layout: of input and output, "contiguous" or "channels_last".
        input: its shape.
        weight: its shape.
        stride, padding, dilation: one size for each spatial dimension.
        groups: as `torch.nn.Conv2d` has it.
    """

    operation: str
    dtype: str
    layout: str
    input: str
    weight: str
    stride: str
    padding: str
    dilation: str
    groups: str


def convolution_calls(func: Any, args: Sequence[Any]) -> tuple[tuple[ConvolutionCall, int], ...]:
    """The passes of a convolution that an operator makes, each with its upper bound in bytes; none of another's.

    Args:
        func: the operator, as a dispatch mode sees it.
        args: its positional arguments.
    """
    if func is _aten.convolution.default and not args[6] and args[0].numel():
        x, weight = args[:2]
        return ((_call(FORWARD, x, weight, args[3], args[4], args[5], args[8]), _forward_bound(args)),)
    if func is _aten.convolution_backward.default and not args[7]:
        grad, x, weight = args[:3]
        bound = _bytes(grad) + _bytes(x) + _bytes(weight)
        wanted = zip((DATA_GRADIENT, WEIGHT_GRADIENT), args[10], strict=False)
        stride, padding, dilation = args[4:7]
        names = [name for name, wants in wanted if wants]
        return tuple((_call(name, x, weight, stride, padding, dilation, args[9]), bound) for name in names)
    return ()


@cache
def measured() -> dict[ConvolutionCall, int]:
    """Bytes by call, as far as they were measured."""
    names = [field.name for field in fields(ConvolutionCall)]
    with TABLE.open(newline="", encoding="ascii") as file:
        rows = [row for row in csv.DictReader(file) if row["workspace_bytes"]]
    return {ConvolutionCall(*(row[name] for name in names)): int(row["workspace_bytes"]) for row in rows}


def as_row(call: ConvolutionCall) -> dict[str, str]:
    """A call as a row of the table."""
    return dict(zip((field.name for field in fields(call)), astuple(call), strict=True))


def lies_channels_last(x: torch.Tensor) -> bool:
    """Whether kernels take a tensor for one whose channels lie innermost."""
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    return layout is not None and x.is_contiguous(memory_format=layout) and not x.is_contiguous()


def _call(
    operation: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> ConvolutionCall:
    return ConvolutionCall(
        operation=operation,
        dtype=str(x.dtype).removeprefix("torch."),
        layout="channels_last" if lies_channels_last(x) else "contiguous",
        input=_joined(x.shape),
        weight=_joined(weight.shape),
        stride=_joined(stride),
        padding=_joined(padding),
        dilation=_joined(dilation),
        groups=str(groups),
    )


def _joined(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def _forward_bound(args: Sequence[Any]) -> int:
    x, weight, _, stride, padding, dilation = args[:6]
    positions = int(x.shape[0])
    for size, window, *rest in zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True):
        step, pad, spread = rest
        positions *= (size + 2 * pad - spread * (window - 1) - 1) // step + 1
    result_bytes: int = positions * weight.shape[0] * x.element_size()
    return _bytes(x) + _bytes(weight) + result_bytes


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
