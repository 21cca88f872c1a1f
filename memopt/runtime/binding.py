"""A region's operations as one forward finds them, and which argument of the autograd function each parameter is."""

from typing import Any

import torch
from torch._C import _functions as _autograd_functions

from memopt.ir import Kind, Step
from memopt.runtime.ops import Bound, Operation, Params, bind

Tensors = tuple[torch.Tensor, ...]

_DOUBLE_BACKWARD = (
    "memopt: the gradient of a rewritten dense block was differentiated again. Double backward is not supported; "
    "call memopt.remove(model) before computing higher-order gradients."
)


class Binding:
    """The operations of one forward: an `Operation` (a `Joint` passes for one), None for a concat.

    Every use of a parameter is an argument of its own. The latest use comes first: the engine adds the gradients of a
    parameter that is used several times, here and elsewhere, in the order in which they are handed to it, and this is
    eager's.

    Args:
        steps: of the region.
        operands: for each step what it is bound to: a live module, or the tensors of a function call.
    """

    def __init__(self, steps: tuple[Step, ...], operands: tuple[tuple[object, ...], ...]) -> None:
        pairs = zip(steps, operands, strict=True)
        self._bound: list[Bound | None] = [
            None if s.op.kind is Kind.CONCAT else bind(s.op, given) for s, given in pairs
        ]
        self._steps = steps
        self.ops: list[Operation | None] = [None if b is None else b.op for b in self._bound]
        parameters: list[torch.Tensor] = []
        index: list[tuple[int | None, ...]] = []
        spans: list[slice | None] = []
        for binding in reversed(self._bound):
            places: list[int | None] = []
            start = len(parameters)
            for tensor in () if binding is None else binding.params:
                places.append(None if tensor is None else len(parameters))
                parameters += () if tensor is None else (tensor,)
            index.append(tuple(places))
            spans.append(None if None in places else slice(start, len(parameters)))
        self.parameters: Tensors = tuple(parameters)
        self.index = tuple(index[::-1])
        self._spans = spans[::-1]

    @property
    def depends_on_counters(self) -> bool:
        """Whether a norm averages over all batches so far (`momentum=None`)."""
        return any(b is not None and b.after_count is not None for b in self._bound)

    def parameters_of(self, step: int, parameters: Tensors) -> Params:
        """A step's own among all arguments."""
        span = self._spans[step]
        if span is not None:
            return parameters[span]
        return tuple(None if p is None else parameters[p] for p in self.index[step])

    def requires_grad(self, input_count: int, needs: tuple[bool, ...]) -> set[int]:
        """Which values have a gradient, given which arguments do. Parameter p is written ~p, beside value numbers."""
        requires = {n for n in range(input_count) if needs[n]}
        requires |= {~p for p in range(len(self.parameters)) if needs[input_count + p]}
        for step, places in zip(self._steps, self.index, strict=True):
            if any(n in requires for n in step.inputs) or any(p is not None and ~p in requires for p in places):
                requires.add(step.output)
        return requires

    def count_batches(self) -> None:
        """Advance the norms' batch counters, in one kernel instead of one a norm."""
        counters = [b.counter for b in self._bound if b is not None and b.counter is not None and not b.after_count]
        once = {id(counter): counter for counter in counters}
        if once:
            torch._foreach_add_(list(once.values()), 1)
        for counter in counters:  # a norm that runs at several places counts each time
            if once.pop(id(counter), None) is None:
                counter.add_(1)

    def count_own_batch(self, step: int) -> None:
        """Advance a counter that the operation itself depends on (`momentum=None`)."""
        binding = self._bound[step]
        if binding is not None and binding.counter is not None and binding.after_count is not None:
            binding.counter.add_(1)
            binding.after_count()

    def forget_modules(self) -> None:
        """After forward: what lives until backward holds no buffer."""
        self._bound = []


def device_type(tensors: tuple[torch.Tensor | None, ...]) -> str:
    """Where tensors are, some of which may be absent."""
    return next((t.device.type for t in tensors if t is not None), "cpu")


def guarded(gradients: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor | None, ...]:
    """Gradients made with `create_graph=True`: they can be used, and fail only if they are differentiated."""
    present = [g for g in gradients if g is not None]
    fail = _autograd_functions.DelayedError(_DOUBLE_BACKWARD.encode(), len(present))
    result: Any = fail(*[t.detach().requires_grad_() for t in present])
    delayed = iter((result,) if isinstance(result, torch.Tensor) else result)
    return tuple(None if g is None else next(delayed) for g in gradients)
