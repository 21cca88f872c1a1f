"""What every operation of a region offers.

An operation is bound anew at every forward: modules are read live, so a changed `eps` or a replaced weight is
honoured. The object that lives until backward holds settings only; tensors are saved by the region through
`save_for_backward`, where hooks (checkpointing, offloading) and version checks see them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

Stash = tuple[torch.Tensor, ...]
Params = tuple[torch.Tensor | None, ...]


class Operation(Protocol):
    """One differentiable operation on one tensor."""

    def forward(self, x: torch.Tensor, params: Params, out: torch.Tensor | None) -> tuple[torch.Tensor, Stash]:
        """The first run, with its side effects. Returns the result and the small tensors that backward needs."""
        ...

    def recompute(self, x: torch.Tensor, params: Params, stash: Stash, out: torch.Tensor | None) -> torch.Tensor:
        """The same result again, bit for bit, with no side effect."""
        ...

    def backward(
        self,
        grad: torch.Tensor,
        x: torch.Tensor | None,
        y: torch.Tensor | None,
        params: Params,
        stash: Stash,
        needs: tuple[bool, ...],
        grad_owned: bool,
    ) -> tuple[torch.Tensor | None, ...]:
        """Gradients of (x, *params); `needs` says which are wanted.

        `x` and `y` are given where the kind needs them (`memopt.ir.NEEDS_INPUT`, `NEEDS_OUTPUT`). `grad` may be
        overwritten if `grad_owned`.
        """
        ...


@dataclass(slots=True)
class Bound:
    """An operation with the tensors it found on its module: `params` receive gradients.

    `counter` is a norm's `num_batches_tracked`, to be advanced by one when the forward runs; `after_count` is called
    then, where the operation depends on the new count.
    """

    op: Operation
    params: Params
    counter: torch.Tensor | None = None
    after_count: Callable[[], None] | None = None
