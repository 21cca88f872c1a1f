"""How a region runs on fused kernels: a feature arena, and chains that read intervals of it. All frozen data."""

from dataclasses import dataclass

import torch

from memopt.ir.ops import Activation
from memopt.ir.plan import Step

MAX_MATMUL_CHANNELS = 128
"""Output channels up to which a 1×1 convolution is fused with the norm before it: its backward keeps the weight
gradient in registers."""

MAX_CONV_CHANNELS = 16
"""Output channels up to which a convolution of a window of three is fused with the norm before it: with more, cuDNN
is faster (`tests/bench/search_tiles.py`)."""


@dataclass(frozen=True, slots=True)
class Interval:
    """Neighbouring channels of an arena: from `start` up to, not including, `stop`."""

    start: int
    stop: int


MAX_WEIGHT_CHANNELS = 32
"""Output channels up to which the weight gradient of a wider convolution of a window of three, which cuDNN runs, is
computed by a kernel that normalises as it loads; at most 64. 0: cuDNN computes that, too."""

MAX_POOL_WINDOW = 16
"""Positions of a window up to which a pooling is fused with the norm before it: the kernel names each one."""


@dataclass(frozen=True, slots=True)
class Pooling:
    """An average over windows that lie side by side.

    It stands behind a 1×1 convolution in eager. Both are linear, and a convolution of one position does the same to all
    in a window: the average goes first, and the convolution has that many fewer positions.

    Attributes:
        step: index of the pooling's step.
        window: its size; every spatial size is a multiple of it.
    """

    step: int
    window: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FusedNorm:
    """Norm and activation in one kernel, with the convolution behind them if that joins.

    Attributes:
        norm: index of the norm's step.
        activation: what follows it, the identity if nothing does.
        matmul: index of the step of a 1×1 convolution, or None.
        conv: index of the step of a convolution with a window of three, or None.
        dtype: of the result.
        pool: what averages the result, or None.
    """

    norm: int
    activation: Activation
    matmul: int | None
    conv: int | None
    dtype: torch.dtype
    pool: Pooling | None = None


@dataclass(frozen=True, slots=True)
class PlainStage:
    """A step that runs by itself, by the operation of the exact runtime.

    Attributes:
        step: its index.
        own_weight_gradient: it is a convolution whose weight gradient is computed from what the `FusedNorm` before it
            reads: that norm's result is not computed again in backward.
    """

    step: int
    own_weight_gradient: bool = False


@dataclass(frozen=True, slots=True)
class FusedChain:
    """What happens between the features that a layer reads and what it makes of them.

    Attributes:
        source: channels of the arena that the first stage, a `FusedNorm`, reads.
        stages: run one after another, each on the result of the one before.
        place: where the result goes in the arena; None where it only leaves the region.
        output: the value that the result is.
        kept: index of the stage whose result is saved for backward; None: all are computed again.
    """

    source: Interval
    stages: tuple[FusedNorm | PlainStage, ...]
    place: Interval | None
    output: int
    kept: int | None


@dataclass(frozen=True, slots=True)
class FusedPlan:
    """One autograd function on fused kernels.

    Attributes:
        steps: the region's operations in eager's order.
        input_count: how many values come from outside.
        passed_through: inputs handed on to later readers.
        outputs: values that are read outside, in the order in which the region returns them.
        requires_grad: values that have a gradient.
        channels: of the arena.
        dtype: of the features.
        placed: where each input goes in the arena.
        chains: in eager's order.
        copied: outputs that are features or concats: they are copied out of these intervals.
        channels_last: values that lie so in eager.
    """

    steps: tuple[Step, ...]
    input_count: int
    passed_through: tuple[int, ...]
    outputs: tuple[int, ...]
    requires_grad: frozenset[int]
    channels: int
    dtype: torch.dtype
    placed: tuple[tuple[int, Interval], ...]
    chains: tuple[FusedChain, ...]
    copied: dict[int, Interval]
    channels_last: frozenset[int]
