"""What goes into a forward and comes out of it, as trees: dataclasses are opened, other objects are not."""

import dataclasses
import functools
import operator
from collections import deque
from collections.abc import Callable, ItemsView, Iterable, Iterator, Mapping, ValuesView
from dataclasses import dataclass
from enum import Enum
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, Enum)
"""Types whose values have no parts and are compared as they are."""
TAKES_PART: tuple[Callable[..., Any], ...] = (operator.getitem, getattr)
"""What takes a part out of a call's result."""
_MOST_PARTS = 1000
"""Objects inside one value that are looked at."""
_CLOSED = (nn.Module, type, ModuleType)
"""Objects that are no trees, whatever they hold."""


@dataclass(frozen=True, slots=True)
class _Opened:
    """A dataclass instance as its class and attributes; as a tree it is built again from them."""

    kind: type
    attributes: dict[str, Any]

    def built(self) -> Any:
        """Another instance: as a copy is made, without `__init__`, which has done its work on these values."""
        instance: Any = object.__new__(self.kind)
        for name, value in self.attributes.items():
            object.__setattr__(instance, name, value)  # also where the class is frozen
        return instance


pytree.register_pytree_node(
    _Opened,
    lambda opened: (list(opened.attributes.values()), (opened.kind, tuple(opened.attributes))),
    lambda values, context: _Opened(context[0], dict(zip(context[1], values, strict=True))).built(),
)


def flattened(value: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """As `pytree.tree_flatten`; instances of dataclasses that hold tensors are trees, too, and are built again."""
    leaves, spec = pytree.tree_flatten(value)
    if all(isinstance(leaf, (torch.Tensor, PLAIN)) for leaf in leaves):
        return leaves, spec
    return pytree.tree_flatten(pytree.tree_map(_opened, value))


def _opened(leaf: Any) -> Any:
    if not is_open(leaf):
        return leaf
    held = {name: pytree.tree_map(_opened, each) for name, each in attributes_of(leaf).items()}
    return _Opened(type(leaf), held)


def parts_of(result: Any) -> Iterator[tuple[Callable[..., Any], Any, Any]]:
    """The parts of a call's result that hold tensors, each with the function and the key that take it out."""
    take: Callable[..., Any] = operator.getitem
    parts: Iterable[tuple[Any, Any]] = ()
    if isinstance(result, dict):
        parts = result.items()
    elif isinstance(result, (tuple, list)):
        parts = enumerate(result)
    elif is_open(result):
        take, parts = getattr, attributes_of(result).items()
    yield from ((take, key, part) for key, part in parts if holds_tensor(part))


def is_open(value: Any) -> bool:
    """Whether a value is an instance of a dataclass of which another can be made, with a tensor somewhere in it."""
    is_instance = dataclasses.is_dataclass(value) and not isinstance(value, (*_CLOSED, dict, list, tuple))
    return is_instance and not isinstance(value, torch.Tensor) and holds_tensor(value)


def attributes_of(value: Any) -> dict[str, Any]:
    """The attributes that an object itself has, in `__dict__` and in slots."""
    slots = [name for kind in type(value).__mro__ for name in _slots(kind) if hasattr(value, name)]
    return {name: getattr(value, name) for name in slots} | getattr(value, "__dict__", {})


def holds_tensor(value: Any) -> bool:
    """Whether a value is a tensor or has one inside: in a container, an object's attributes, a function's variables.

    Of an iterator it is taken for granted.
    """
    todo, seen = [value], set[int]()
    while todo and len(seen) < _MOST_PARTS:
        current = todo.pop()
        if isinstance(current, torch.Tensor):
            return True
        if isinstance(current, (PLAIN, *_CLOSED)) or id(current) in seen:
            continue
        seen.add(id(current))
        if hasattr(current, "__next__"):
            return True  # nobody can look without taking it away
        if isinstance(current, Mapping):
            todo += current.values()
        elif isinstance(current, (tuple, list, set, frozenset, deque, ValuesView, ItemsView)):
            todo += current
        elif isinstance(current, functools.partial):
            todo += (current.func, current.args, current.keywords)
        elif isinstance(current, FunctionType):
            todo += [cell.cell_contents for cell in current.__closure__ or () if cell != CellType()]
        if not isinstance(current, MethodType):
            todo += attributes_of(current).values()
    return False


def _slots(kind: type) -> tuple[str, ...]:
    names = kind.__dict__.get("__slots__", ())
    each = (names,) if isinstance(names, str) else tuple(names)
    return tuple(name for name in each if name not in ("__dict__", "__weakref__"))
