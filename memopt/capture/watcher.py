"""What the operations beneath one recorded call do: draw random numbers, write to memory, read an input twice."""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor, disable_fake_tensor_cache
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from memopt.capture.calls import tensors_in
from memopt.fake import shape_rule

_MOST_NODES = 50


class _Operator(NamedTuple):
    """What is known of an operator beforehand: the arguments that it writes to, and how its result is made quickly."""

    is_random: bool
    writes: tuple[tuple[int, str], ...]
    rule: Callable[..., Any] | None


@cache
def _known(func: Any) -> _Operator:
    arguments = enumerate(func._schema.arguments)
    writes = tuple((n, a.name) for n, a in arguments if a.alias_info is not None and a.alias_info.is_write)
    return _Operator(torch.Tag.nondeterministic_seeded in func.tags, writes, shape_rule(func))


class Watcher(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what happened since `take` was called last."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._random = False
        self._written: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        operator = _known(func)
        self._random |= operator.is_random
        for position, name in operator.writes:
            self._written |= _storages(args[position] if position < len(args) else kwargs.get(name))
        made = None if operator.rule is None or kwargs else operator.rule(*args)
        if made is not None:
            return made
        if func is torch.ops.aten.cat.default and isinstance(args[0][0], FakeTensor):
            # Results of fake operators are cached under all that they read: a key as long as the list, which never
            # comes again. In a dense block that is quadratic in the depth, in time and in memory.
            with disable_fake_tensor_cache(args[0][0].fake_mode):
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def take(self) -> tuple[bool, frozenset[int]]:
        """Whether random numbers were drawn, and the storages that were written to."""
        noted = self._random, frozenset(self._written)
        self._random, self._written = False, set()
        return noted


def reads_once(result: Any, arguments: tuple[Any, ...]) -> bool:
    """Whether a call reads each tensor it is given no more often than it is given it.

    Else its gradient is a sum, which autograd adds up term by term among those of other readers.
    """
    if not isinstance(result, torch.Tensor) or result.grad_fn is None:
        return True
    given: dict[Any, int] = {}
    with torch._C.DisableTorchFunction():  # a leaf's edge is found by a view_as, which is no part of forward
        for tensor in tensors_in(arguments):
            if tensor.requires_grad:
                edge = _edge(tensor)
                given[edge] = given.get(edge, 0) + 1
    sources = {node for node, _ in given}
    todo: list[Any] = [result.grad_fn]
    seen: set[Any] = {result.grad_fn}
    while todo and len(seen) < _MOST_NODES:
        node = todo.pop()
        for edge in node.next_functions if node not in sources else ():
            if edge in given:
                given[edge] -= 1
            if edge[0] is not None and edge[0] not in seen:
                seen.add(edge[0])
                todo.append(edge[0])
    return not todo and all(count >= 0 for count in given.values())


def _edge(tensor: torch.Tensor) -> tuple[Any, int]:
    node = tensor.grad_fn
    if node is None:
        node, *_ = torch.autograd.graph.get_gradient_edge(tensor)
    return node, tensor.output_nr


def _storages(value: Any) -> set[int]:
    leaves = pytree.tree_leaves(value)
    return {leaf.untyped_storage()._cdata for leaf in leaves if isinstance(leaf, torch.Tensor)}
