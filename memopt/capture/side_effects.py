"""What a forward may change besides tensors, and what a recording would therefore freeze."""

import inspect
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from memopt.capture.frozen import (
    changeable_parts,
    frozen,
    generator_state,
    restore_generator,
    restore_part,
)
from memopt.capture.places import Place, module_places, outside_places, where_used
from memopt.capture.source import user_line
from memopt.errors import CaptureError
from memopt.ir import PLAIN, flattened


@contextmanager
def refusing_side_effects(root: nn.Module) -> Iterator[None]:
    """Refuse a forward that changes Python values that it can reach, or draws random numbers outside torch.

    Recording runs forward once more than the user does: whatever it changed is put back, also when it failed.

    Raises:
        CaptureError: something changed, or would change beyond repair.
    """
    before = [_remember(place) for place in (*module_places(root), *outside_places(root))]
    known = {id(module): set(vars(module)) for module in root.modules()}
    random_before, numpy_before = random.getstate(), _numpy_state()
    try:
        yield
    finally:
        changed = [memory.place.label for memory in before if memory.put_back()]
        changed += _remove_new(root, known)
        drew = random.getstate() != random_before or repr(_numpy_state()) != repr(numpy_before)
        random.setstate(random_before)
        if numpy_before is not None:
            sys.modules["numpy"].random.set_state(numpy_before)
    drew |= any(memory.drew for memory in before)
    if changed:
        label = min(changed)
        raise CaptureError(
            f"{where_used(root, label)}: forward changes {label} while it runs, which a recording would freeze. "
            "Move it out of forward."
        )
    if drew:
        raise CaptureError(
            f"{where_used(root, 'random', 'rng')}: forward draws random numbers outside torch, which a recording would "
            "freeze. Draw them before forward."
        )


def require_unchanged(root: nn.Module, given: tuple[list[Any], Any], now: Any, same_objects: bool) -> None:
    """A list that forward appends to, or an object that it writes to, would stay as it is in a replay.

    Raises:
        CaptureError: forward changed one of its arguments.
    """
    leaves, spec = flattened(now)
    same = len(leaves) == len(given[0]) and all(a is b for a, b in zip(leaves, given[0], strict=True))
    if not same or spec != given[1] or not same_objects:
        code = inspect.unwrap(type(root).forward).__code__
        raise CaptureError(
            f"{code.co_filename}:{code.co_firstlineno}: forward changes one of its arguments, which a recording would "
            "not. Return what it makes instead."
        )


@contextmanager
def keeping_python_values(root: nn.Module) -> Iterator[None]:
    """Put back whatever Python values forward of `root` changes while it really runs."""
    before = [_remember(place, guard=False) for place in (*module_places(root), *outside_places(root))]
    try:
        yield
    finally:
        for memory in before:
            memory.put_back()


@dataclass(slots=True)
class _Memory:
    """A place with the value that it had."""

    place: Place
    value: Any
    print_: Any
    parts: list[tuple[Any, Any]]
    rewind: list[Callable[[], None]]
    drew: bool = False

    def put_back(self) -> bool:
        """Undo what was changed; whether anything was."""
        try:
            now = self.place.read()
        except (AttributeError, KeyError, ValueError):
            now = _Missing
        if isinstance(now, _Guard):
            self.place.write(self.value)
            return False
        if now is self.value and (isinstance(now, PLAIN) or frozen(now) == self.print_):
            return False
        same = type(now) is type(self.value) and frozen(now) == self.print_
        for container, held in self.parts:
            restore_part(container, held)
        for rewind in self.rewind:
            rewind()
        self.drew = bool(self.rewind)
        if now is not self.value:
            self.place.write(self.value)
        return not same and not self.drew


class _Guard:
    """In place of an iterator: what recording took from it could not be put back."""

    def __init__(self, label: str) -> None:
        self._label = label

    def __iter__(self) -> "_Guard":
        return self

    def __next__(self) -> Any:
        raise CaptureError(f"{user_line()}: forward advances {self._label}. Hand in what it yields instead.")


class _Missing:
    """Stands for the value of a name that was deleted."""


def _remember(place: Place, guard: bool = True) -> _Memory:
    value = place.read()
    if isinstance(value, PLAIN):
        return _Memory(place, value, value, [], [])
    if guard and hasattr(value, "__next__"):
        place.write(_Guard(place.label))
        return _Memory(place, value, None, [], [])
    parts = changeable_parts(value)
    inside = (part for _, held in parts for part in (held.values() if isinstance(held, dict) else held))
    generators = [part for part in (value, *inside) if generator_state(part) is not None]
    rewind = [again for generator in generators if (again := restore_generator(generator)) is not None]
    return _Memory(place, value, frozen(value), parts, rewind)


def _remove_new(root: nn.Module, known: dict[int, set[str]]) -> list[str]:
    """Take away attributes that modules did not have; tensors among them are somebody else's care."""
    added: list[str] = []
    for path, module in root.named_modules():
        names = vars(module).keys() - known.get(id(module), vars(module).keys())
        for name in [name for name in names if not isinstance(vars(module)[name], torch.Tensor)]:
            added.append(f"self.{path}.{name}" if path else f"self.{name}")
            del vars(module)[name]
    return added


def _numpy_state() -> Any:
    numpy = sys.modules.get("numpy")
    return None if numpy is None else numpy.random.get_state()
