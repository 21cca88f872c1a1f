"""What cuDNN's convolutions take for the time of a call: as measured, else estimated, with an upper bound.

The table, `workspaces.csv`, is made by `tests/bench/measure_workspaces.py` on each GPU that it speaks of. cuDNN may
choose otherwise on another: an H100 and an H200 differ in one convolution of a hundred. A convolution that is not in it
is taken for as hungry as the measured one that is most like it, in proportion to their operands, if it may copy them.

Note: [Products copy nothing]
Where channels lie innermost, a convolution with a window of 1 is a product of matrices as they lie. What it takes are
partial sums of what a device computes at a time, which do not grow with the operands: 16 MiB on an H200. Estimated in
proportion, weight gradients of the larger half of the table are 32 MiB off in the mean if the smaller half is known,
and 3 MiB as they are.

Note: [Upper bound]
Most of what cuDNN takes are copies of the operands in another layout, and partial sums of weight gradients, which are
limited by what a device computes at a time. No row of the table needs more than 4/3 of its operands and 64 MiB, nor
more than 8 times its operands; of volumes, than twice its operands and 64 MiB, nor than 10 times its operands.
"""

import csv
import math
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

    @property
    def operands_bytes(self) -> int:
        """Of input, weight and output together."""
        x, weight = _sizes(self.input), _sizes(self.weight)
        settings = (_sizes(text) for text in (self.stride, self.padding, self.dilation))
        made = [
            (size + 2 * pad - spread * (window - 1) - 1) // step + 1
            for size, window, step, pad, spread in zip(x[2:], weight[2:], *settings, strict=True)
        ]
        elements = math.prod(x) + math.prod(weight) + x[0] * weight[0] * math.prod(made)
        return int(elements * getattr(torch, self.dtype).itemsize)

    @property
    def is_product(self) -> bool:
        """See Note: [Products copy nothing]."""
        windows, strides = _sizes(self.weight)[2:], _sizes(self.stride)
        return self.layout == "channels_last" and {*windows, *strides} == {1}

    @property
    def bound_bytes(self) -> int:
        """See Note: [Upper bound]."""
        thirds, times = (6, 10) if len(_sizes(self.input)) == 5 else (4, 8)
        return min(thirds * self.operands_bytes // 3 + 64 * 2**20, times * self.operands_bytes)


def convolution_calls(func: Any, args: Sequence[Any]) -> tuple[ConvolutionCall, ...]:
    """The passes of a convolution that an operator makes; none of another's.

    Args:
        func: the operator, as a dispatch mode sees it.
        args: its positional arguments.
    """
    if func is _aten.convolution.default and not args[6] and args[0].numel():
        x, weight = args[:2]
        return (_call(FORWARD, x, weight, args[3], args[4], args[5], args[8]),)
    if func is _aten.convolution_backward.default and not args[7]:
        x, weight = args[1:3]
        wanted = zip((DATA_GRADIENT, WEIGHT_GRADIENT), args[10], strict=False)
        stride, padding, dilation = args[4:7]
        return tuple(_call(name, x, weight, stride, padding, dilation, args[9]) for name, wants in wanted if wants)
    return ()


@cache
def measured(gpu: str | None = None) -> dict[ConvolutionCall, int]:
    """Bytes by call, as far as they were measured.

    Args:
        gpu: as `torch.cuda.get_device_name` has it. What was not measured on it, or any call where it is None, is what
            the hungriest of the others takes.
    """
    names = [field.name for field in fields(ConvolutionCall)]
    anywhere: dict[ConvolutionCall, int] = {}
    there: dict[ConvolutionCall, int] = {}
    with TABLE.open(newline="", encoding="ascii") as file:
        for row in csv.DictReader(file):
            if not row["workspace_bytes"]:
                continue
            call, size_bytes = ConvolutionCall(*(row[name] for name in names)), int(row["workspace_bytes"])
            anywhere[call] = max(anywhere.get(call, 0), size_bytes)
            if row["gpu"] == gpu:
                there[call] = size_bytes
    return anywhere | there


@cache
def estimated(call: ConvolutionCall, gpu: str | None = None) -> int | None:
    """Bytes of a call that was not measured, by the one most like it; None where none has its window and its kind."""
    alike = _by_kind().get(_kind(call), ())
    if not alike:
        return None
    nearest = min(alike, key=lambda other: _distance(call, other))
    size_bytes = measured(gpu)[nearest]
    return size_bytes if call.is_product else round(size_bytes * call.operands_bytes / nearest.operands_bytes)


@cache
def _by_kind() -> dict[tuple[str, ...], list[ConvolutionCall]]:
    """Measured calls, in an order of their own: of two that are as near, the first is taken."""
    kinds: dict[tuple[str, ...], list[ConvolutionCall]] = {}
    for call in sorted(measured(None), key=astuple):  # by the key that is mostly asked for: the table is read once
        kinds.setdefault(_kind(call), []).append(call)
    return kinds


def _kind(call: ConvolutionCall) -> tuple[str, ...]:
    """What must be the same for two calls to be compared at all."""
    window = _joined(_sizes(call.weight)[2:])
    return (call.operation, call.dtype, call.layout, window, call.stride, call.padding, call.dilation, call.groups)


def _distance(call: ConvolutionCall, other: ConvolutionCall) -> float:
    """How many times larger or smaller channels, batch and images are, in all."""
    here, there = ((*_sizes(c.input), _sizes(c.weight)[0]) for c in (call, other))
    return sum(abs(math.log(a / b)) for a, b in zip(here, there, strict=True))


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


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split("x")))
