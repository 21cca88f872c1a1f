"""What the operations of a chain are called: the vocabulary that find, plan, rewrite and runtime share.

An operation is matched by what it does (the function it runs), never by the name of the user's class.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Kind(StrEnum):
    """Kinds of operation a region can hold."""

    CONCAT = "concat"  # torch.cat along the channel dimension
    BATCH_NORM = "batch_norm"  # normalisation that may update running statistics
    SYNC_BATCH_NORM = "sync_batch_norm"  # the same with the statistics of all processes of a group
    RELU = "relu"  # its gradient needs only its output
    CONVOLUTION = "convolution"  # zero-padded, not transposed
    DROPOUT = "dropout"  # draws random numbers once, keeps its mask
    AVG_POOL = "avg_pool"  # its gradient needs only its input's shape
    PURE = "pure"  # any other deterministic function of one tensor (and parameters)
    JOINT = "joint"  # a deterministic function of several tensors (and parameters)


class Role(StrEnum):
    """What an operation means inside a chain."""

    CONCAT = "concat"
    NORM = "norm"
    ACTIVATION = "activation"
    CONSUMER = "consumer"  # convolution: ends a chain
    DROPOUT = "dropout"
    POOL = "pool"  # changes the spatial size: ends a region
    IDENTITY = "identity"  # returns its input
    GLUE = "glue"  # anything else between the parts of a chain: a gate, a sum, a view


@dataclass(frozen=True, slots=True)
class Activation:
    """A pointwise function that fused kernels know.

    Attributes:
        name: "identity", "relu", "leaky_relu", "relu6", "elu", "silu", "gelu", "gelu_tanh", "hardswish", "sigmoid" or
            "tanh".
        parameter: the negative slope or alpha of those that have one.
    """

    name: str
    parameter: float = 0.0


IDENTITY = Activation("identity")


@dataclass(frozen=True, slots=True)
class OpSpec:
    """How one graph node is run inside a region.

    Attributes:
        kind: which runtime operation runs it.
        role: what it means in a chain.
        from_module: True when the node calls a module (whose live attributes are read at every forward), False
            when it calls a function (whose arguments are `args`/`kwargs`, with `Operand` in place of tensors).
        target: the function of a functional node; None for a module.
        args: positional arguments after the input.
        kwargs: keyword arguments.
        writes_out: it can write its result into a given buffer by eager's own kernel.
        activation: which activation it is, where fused kernels know it.
        window: kernel size of a convolution whose result is as large as its input: stride, dilation and groups of 1,
            zeros around. None for any other.
        pool: window of an average pooling whose windows lie side by side: as far apart as they are large, nothing
            padded, every position counted alike. None for anything else.
        aliases: its result is a view of an input.
    """

    kind: Kind
    role: Role
    from_module: bool
    target: Any = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    writes_out: bool = False
    activation: Activation | None = None
    window: tuple[int, ...] | None = None
    pool: tuple[int, ...] | None = None
    aliases: bool = False


@dataclass(frozen=True, slots=True)
class Operand:
    """Stands in `OpSpec.args` for the n-th tensor handed to the region with the node; for a JOINT, its inputs first."""

    index: int


NEEDS_INPUT: frozenset[Kind] = frozenset(
    {Kind.BATCH_NORM, Kind.SYNC_BATCH_NORM, Kind.CONVOLUTION, Kind.PURE, Kind.JOINT}
)
"""Kinds whose gradient reads the operation's input."""

NEEDS_OUTPUT: frozenset[Kind] = frozenset({Kind.RELU})
"""Kinds whose gradient reads the operation's output."""
