"""Python values as something that can be compared later: what a recording depends on besides tensors."""

import argparse
import functools
import random
import sys
import sysconfig
import types
import weakref
from collections import ChainMap, UserDict, UserList, deque
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from memopt.ir import PLAIN, attributes_of

CONTAINERS = (list, dict, set, deque)
"""What can change in place."""
_NAMESPACES = (types.SimpleNamespace, argparse.Namespace, UserDict, UserList, ChainMap)
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial)
_LIBRARIES = ("torch", "numpy", "builtins", "memopt", "networkx", "pytest", "_pytest", "hypothesis")
_STANDARD_LIBRARY = sysconfig.get_paths()["stdlib"]
_MOST_PARTS = 10_000
"""Parts of one value that are looked at; what lies beyond is compared by identity."""


def frozen(value: Any) -> Any:
    """A value that is equal to an earlier one of the same thing if nothing in it has changed.

    Looks into containers, into objects of classes that are neither torch's nor Python's own, into what methods belong
    to, and at the state of random generators. Of modules, the plain attributes are compared; tensors and functions by
    identity.
    """
    return value if isinstance(value, PLAIN) else _Freezer().freeze(value)


class Same:
    """Equal to what was made of the same object, which it does not keep alive if that can be helped."""

    __slots__ = ("_hash", "_refer")

    def __init__(self, value: Any) -> None:
        self._hash = id(value)
        try:
            self._refer: Callable[[], Any] = weakref.ref(value)
        except TypeError:
            self._refer = lambda: value

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        """Another object at the same address is not the same."""
        if not isinstance(other, Same) or self._hash != other._hash:
            return False
        mine = self._refer()
        return mine is not None and mine is other._refer()


class _Freezer:
    def __init__(self) -> None:
        self._seen: set[int] = set()

    def freeze(self, value: Any) -> Any:
        if isinstance(value, PLAIN):
            return type(value), value
        if id(value) in self._seen or len(self._seen) > _MOST_PARTS:
            return id(value)
        self._seen.add(id(value))
        if isinstance(value, (tuple, list, deque)):
            return type(value), *map(self.freeze, value)
        if isinstance(value, dict):
            return type(value), *((self.freeze(key), self.freeze(item)) for key, item in value.items())
        if isinstance(value, (set, frozenset)):
            return type(value), frozenset(map(self.freeze, value))
        state = generator_state(value)
        if state is not None:
            return type(value), state
        if _is_array(value):
            return value.shape, str(value.dtype), value.tobytes()
        if isinstance(value, nn.Module):  # one that is no part of the model: a parent, a teacher
            return Same(value), *((name, item) for name, item in vars(value).items() if isinstance(item, PLAIN))
        if isinstance(value, functools.partial):
            return functools.partial, *map(self.freeze, (value.func, value.args, value.keywords))
        owner = owner_of(value)
        if owner is not None:
            return getattr(value, "__func__", value.__name__), self.freeze(owner)
        inside = attributes_inside(value)
        return Same(value) if inside is None else (type(value), self.freeze(inside))


def owner_of(value: Any) -> Any:
    """The object that a method belongs to, which may hold something; None of anything else."""
    owner = value.__self__ if isinstance(value, (types.MethodType, types.BuiltinMethodType)) else None
    return None if isinstance(owner, (type, types.ModuleType, torch.Tensor)) else owner


def attributes_inside(value: Any) -> dict[str, Any] | None:
    """As `namespace_of`, with slots: to be looked at only."""
    namespace = namespace_of(value)
    if namespace is None and _is_plain_object(value) and hasattr(type(value), "__slots__"):
        return attributes_of(value)
    return namespace


def generator_state(value: Any) -> Any:
    """The state of a generator of random numbers outside torch; None for anything else."""
    if isinstance(value, random.Random):
        return value.getstate()
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.random.Generator):
        return repr(value.bit_generator.state)
    if numpy is not None and isinstance(value, numpy.random.RandomState):
        return repr(value.get_state())
    return None


def namespace_of(value: Any) -> dict[str, Any] | None:
    """The attributes of a plain object of the user's: a configuration, a scheduler. None where none are looked at."""
    if isinstance(value, _NAMESPACES):
        return vars(value)
    state = getattr(value, "__dict__", None) if _is_plain_object(value) else None
    return state if isinstance(state, dict) else None


def _is_plain_object(value: Any) -> bool:
    closed = (torch.Tensor, nn.Module, type, types.ModuleType, *_FUNCTIONS)
    return not isinstance(value, closed) and is_users(type(value))


def is_users(thing: Any) -> bool:
    """Whether a class, function or module is neither torch's, numpy's nor Python's own."""
    name = thing.__name__ if isinstance(thing, types.ModuleType) else getattr(thing, "__module__", None)
    top = str(name).partition(".")[0]
    if name is None or top in _LIBRARIES or top in sys.builtin_module_names:
        return False
    file = getattr(sys.modules.get(top), "__file__", None) or ""
    return not (file.startswith(_STANDARD_LIBRARY) and "site-packages" not in file)


def has_users_code(module: nn.Module) -> bool:
    """Whether a module's class is the user's, or made of one: FSDP2 derives classes of its own from it."""
    return any(map(is_users, type(module).__mro__))


def changeable_parts(value: Any) -> list[tuple[Any, Any]]:
    """Every container or object with slots inside a value that can change in place, with a copy of what it holds."""
    parts: list[tuple[Any, Any]] = []
    todo, seen = [value], set[int]()
    while todo and len(seen) <= _MOST_PARTS:
        current = todo.pop()
        if isinstance(current, PLAIN) or id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, nn.Module):
            parts.append((vars(current), vars(current).copy()))
            continue
        namespace, inside = namespace_of(current), attributes_inside(current)
        container = current if namespace is None else namespace
        if isinstance(container, CONTAINERS):
            parts.append((container, container.copy()))
        elif inside is not None:
            parts.append((current, inside))  # it has slots
        todo += _items(container if inside is None else inside)
        todo += _behind(current)
    return parts


def restore_part(container: Any, before: Any) -> None:
    """Make a container hold again what it held; others may hold the same container."""
    if not isinstance(container, CONTAINERS):
        for name, held in before.items():
            object.__setattr__(container, name, held)
        return
    container.clear()
    (container.update if isinstance(container, (dict, set)) else container.extend)(before)


def _behind(value: Any) -> list[Any]:
    """What a method belongs to, and what a partial function was given."""
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    owner = owner_of(value)
    return [] if owner is None else [owner]


def restore_generator(value: Any) -> Callable[[], None] | None:
    """A function that puts a random generator back to where it is now."""
    if isinstance(value, random.Random):
        state = value.getstate()
        return lambda: value.setstate(state)
    if generator_state(value) is None:
        return None
    if hasattr(value, "bit_generator"):
        current = value.bit_generator.state
        return lambda: setattr(value.bit_generator, "state", current)
    legacy = value.get_state()
    return lambda: value.set_state(legacy)


def _items(container: Any) -> list[Any]:
    if isinstance(container, dict):
        return list(container.values())
    return list(container) if isinstance(container, (list, tuple, set, frozenset, deque)) else []


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray) and value.dtype != object
