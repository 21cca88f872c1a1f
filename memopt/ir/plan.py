"""What is to run: regions of a graph as straight-line programs over numbered values. All of it is frozen data.

A region is a contiguous run of chains, executed as one autograd function. Its values are numbered; the first
`len(inputs)` of them come from outside. Forward runs `steps` in order. Backward follows `backward`, in which
values that were not kept are computed again just before they are needed.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from memopt.ir.ops import OpSpec

Level = Literal["keep", "concat", "layer"]
"""How much of a layer is computed again: nothing, up to its first convolution, everything."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A place in a region's scratch: where a value lives while it is needed.

    Attributes:
        lane: which scratch buffer; the value starts at its beginning.
        size: shape of the value. Its memory format is that of what it is computed from, as in eager.
    """

    lane: int
    size: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One operation of a region.

    Attributes:
        op: how it is run.
        inputs: value numbers it reads (several for a concat, else one).
        leaves: for a concat, the values it is made of when nested concats are flattened; else `inputs`.
        widths: for a concat, the channels of each of `inputs` (0 for a legacy empty tensor); else empty.
        output: value number it defines.
        in_place: it may overwrite its input, which nobody else reads.
        name: the graph node's name, for messages.
        level: how much of its chain is computed again.
    """

    op: OpSpec
    inputs: tuple[int, ...]
    leaves: tuple[int, ...]
    widths: tuple[int, ...]
    output: int
    in_place: bool
    name: str
    level: Level = "layer"


@dataclass(frozen=True, slots=True)
class Extent:
    """How much room a value takes and how it lies: its shape, the bytes of its elements, their dtype, its layout."""

    size: tuple[int, ...]
    size_bytes: int
    dtype: torch.dtype = torch.float32
    channels_last: bool = False


@dataclass(frozen=True, slots=True)
class RegionDraft:
    """A region before anything is decided: what is computed, not what is kept.

    Attributes:
        steps: the operations in eager's order; `in_place` says what is allowed.
        input_count: how many values come from outside.
        passed_through: inputs that later readers must read through the region.
        outputs: values read outside.
        requires_grad: values that have a gradient.
        extents: of every value.
    """

    steps: tuple[Step, ...]
    input_count: int
    passed_through: tuple[int, ...]
    outputs: tuple[int, ...]
    requires_grad: frozenset[int]
    extents: dict[int, Extent]


@dataclass(frozen=True, slots=True)
class Compute:
    """Run a step's operation (in backward: again), writing to `slot` of the scratch if there is one."""

    step: int
    slot: Slot | None
    free: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Gradient:
    """Turn the gradient of a step's output into those of its inputs and parameters."""

    step: int
    free: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RegionPlan:
    """One autograd function: what it computes, keeps, computes again, and where.

    Attributes:
        steps: the operations in eager's order.
        input_count: how many values come from outside.
        passed_through: inputs handed on to later readers, so that eager's order of summing gradients is kept.
        outputs: values that are read outside, in the order in which the region returns them.
        kept: values saved for backward.
        forward: the program of forward.
        backward: the program of backward.
        forward_lanes_bytes: sizes of the scratch buffers of forward.
        backward_lanes_bytes: sizes of the scratch buffers of backward.
    """

    steps: tuple[Step, ...]
    input_count: int
    passed_through: tuple[int, ...]
    outputs: tuple[int, ...]
    kept: tuple[int, ...]
    forward: tuple[Compute, ...]
    backward: tuple[Compute | Gradient, ...]
    forward_lanes_bytes: tuple[int, ...]
    backward_lanes_bytes: tuple[int, ...]
