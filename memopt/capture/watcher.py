"""What the operations beneath one recorded call do: draw random numbers, write to memory, read an input twice."""

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, disable_fake_tensor_cache
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_MOST_NODES = 50


class Watcher(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what happened since `take` was called last."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._random = False
        self._written: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        self._random |= torch.Tag.nondeterministic_seeded in func.tags
        if func._schema.is_mutable:
            given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
            for argument in func._schema.arguments:
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._written |= _storages(given.get(argument.name))
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


def reads_once(result: Any, arguments: Any) -> bool:
    """Whether a call reads each tensor it is given no more often than it is given it.

    Else its gradient is a sum, which autograd adds up term by term among those of other readers.
    """
    if not isinstance(result, torch.Tensor) or result.grad_fn is None:
        return True
    given: dict[Any, int] = {}
    for tensor in pytree.tree_leaves(arguments):
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
            with torch._C.DisableTorchFunction():  # it calls view_as, which is no part of forward
                node, number, *_ = torch.autograd.graph.get_gradient_edge(tensor)
            given[node, number] = given.get((node, number), 0) + 1
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


def _storages(value: Any) -> set[int]:
    leaves = pytree.tree_leaves(value)
    return {leaf.untyped_storage()._cdata for leaf in leaves if isinstance(leaf, torch.Tensor)}
