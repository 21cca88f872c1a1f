"""Any deterministic function of several tensors: autograd differentiates it on the recomputed inputs."""

import copy
from typing import Any, cast

import torch
from torch.utils._pytree import tree_map_only

from memopt.ir import Operand
from memopt.runtime.ops.base import Bound, Operation, Params

Tensors = tuple[torch.Tensor, ...]


class Joint:
    """function(*inputs, *params), both in places of their own among other arguments."""

    def __init__(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._function = getattr(torch.Tensor, target) if isinstance(target, str) else target
        self._arguments = args, kwargs
        self._autocast: tuple[str, torch.dtype, bool] = ("cpu", torch.bfloat16, False)

    def forward(self, inputs: Tensors, params: Params) -> torch.Tensor:
        """The first run."""
        device = inputs[0].device.type
        self._autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        return self.recompute(inputs, params)

    def recompute(self, inputs: Tensors, params: Params) -> torch.Tensor:
        """The same again."""
        device, dtype, enabled = self._autocast
        given = (*inputs, *params)

        def fill(operand: Operand) -> Any:
            return given[operand.index]

        args, kwargs = tree_map_only(Operand, fill, copy.copy(self._arguments))
        with torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False):
            result: torch.Tensor = self._function(*args, **kwargs)
        return result

    def backward(
        self, grad: torch.Tensor, inputs: Tensors, params: Params, needs: tuple[bool, ...]
    ) -> tuple[torch.Tensor | None, ...]:
        """Gradients of (*inputs, *params); `needs` says which are wanted."""
        with torch.enable_grad():
            leaves = [
                None if t is None else t.detach().requires_grad_(need)
                for t, need in zip((*inputs, *params), needs, strict=True)
            ]
            count = len(inputs)
            first = tuple(leaf for leaf in leaves[:count] if leaf is not None)
            result = self.recompute(first, tuple(leaves[count:]))
        wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        gradients = iter(torch.autograd.grad(result, wanted, grad, allow_unused=True))
        return tuple(next(gradients) if leaf is not None and leaf.requires_grad else None for leaf in leaves)


def bind_joint(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], operands: Params) -> Bound:
    """A call whose parameters and buffers are `operands`."""
    return Bound(cast("Operation", Joint(target, args, kwargs)), operands)


def as_joint(op: object) -> Joint | None:
    """An operation that takes several inputs; None for any other."""
    return op if isinstance(op, Joint) else None
