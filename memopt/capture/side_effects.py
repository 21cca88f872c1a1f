"""What a forward may change besides tensors, and what a recording would therefore freeze."""

import inspect
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from torch import nn

from memopt.capture.frozen import (
    changeable_parts,
    frozen,
    generator_state,
    restore_generator,
    restore_part,
)
from memopt.capture.places import (
    Place,
    entry,
    module_places,
    outside_places,
    searched,
    tensor_stores,
    type_comparison,
    where_used,
)
from memopt.capture.source import user_line
from memopt.errors import CaptureError
from memopt.ir import PLAIN, flattened


@contextmanager
def refusing_side_effects(root: nn.Module, inputs: list[Any]) -> Iterator[None]:
    """Refuse a forward that changes Python values that it can reach, or draws random numbers outside torch.

    Recording runs forward once more than the user does: whatever it changed is put back, also when it failed.

    Args:
        root: the module.
        inputs: of its forward, tensors and other values.

    Raises:
        CaptureError: something changed, or would change beyond repair.
    """
    search = searched(root, inputs)
    line = type_comparison(search.functions)
    if line is not None:
        raise CaptureError(
            f"{line}: compares a type with torch.Tensor, which is another while forward is recorded. Use isinstance."
        )
    before = [_remember(place) for place in (*module_places(root), *search.places)]
    guards = [guard for memory in before for guard in _guards(memory)]
    known = {id(module): _names_of(module) for module in root.modules()}
    caches = [(cache, cache.cache_info().misses) for cache in search.caches]
    random_before, numpy_before = random.getstate(), _numpy_state()
    try:
        for guard in guards:
            guard.put()
        yield
    finally:
        for guard in guards:
            guard.take_away()
        changed = [memory.place.label for memory in before if memory.put_back()]
        changed += _remove_new(root, known)
        for cache, misses in caches:  # what is cached now was made of tensors without data
            if cache.cache_info().misses != misses:
                cache.cache_clear()
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
    before = [_remember(place) for place in (*module_places(root), *outside_places(root))]
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
        except (AttributeError, LookupError, ValueError):
            now = _Missing
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

    def __init__(self, place: Place) -> None:
        self._place, self._iterator = place, place.read()

    def put(self) -> None:
        """Let nobody advance the iterator."""
        self._place.write(self)

    def take_away(self) -> None:
        """Put the iterator back, unless forward has put something else in its place."""
        with suppress(LookupError, AttributeError, ValueError):
            if self._place.read() is self:
                self._place.write(self._iterator)

    def __iter__(self) -> "_Guard":
        return self

    def __next__(self) -> Any:
        raise CaptureError(f"{user_line()}: forward advances {self._place.label}. Hand in what it yields instead.")


class _Missing:
    """Stands for the value of a name that was deleted."""


def _remember(place: Place) -> _Memory:
    value = place.read()
    if isinstance(value, PLAIN):
        return _Memory(place, value, value, [], [])
    parts = changeable_parts(value)
    inside = (part for _, held in parts for part in (held.values() if isinstance(held, dict) else held))
    owners = (getattr(part, "__self__", part) for part in (value, *inside))  # of methods
    generators = [owner for owner in owners if generator_state(owner) is not None]
    rewind = [again for generator in generators if (again := restore_generator(generator)) is not None]
    return _Memory(place, value, frozen(value), parts, rewind)


def _guards(memory: _Memory) -> Iterator[_Guard]:
    """For the iterator that stands at a place, and for those inside containers and objects there."""
    if _is_iterator(memory.value):
        yield _Guard(memory.place)
    label = f"an iterator in {memory.place.label}"
    for container, held in memory.parts:
        if isinstance(held, dict):
            yield from (_Guard(entry(container, key, label)) for key, item in held.items() if _is_iterator(item))
        elif not isinstance(held, set):
            yield from (_Guard(entry(container, n, label)) for n, item in enumerate(held) if _is_iterator(item))


def _is_iterator(value: Any) -> bool:
    return not isinstance(value, (*PLAIN, _Guard)) and hasattr(value, "__next__")


def _stores(module: nn.Module) -> tuple[dict[str, Any], ...]:
    return *tensor_stores(module), module._modules


def _names_of(module: nn.Module) -> tuple[set[str], ...]:
    return tuple(set(store) for store in _stores(module))


def _remove_new(root: nn.Module, known: dict[int, tuple[set[str], ...]]) -> list[str]:
    """Take away what modules did not have: made from tensors without data, it is of no use to anybody."""
    added: list[str] = []
    for path, module in list(root.named_modules()):
        if id(module) not in known:
            continue  # it goes with the module that it was given to
        for store, names in zip(_stores(module), known[id(module)], strict=True):
            for name in store.keys() - names:
                added.append(f"self.{path}.{name}" if path else f"self.{name}")
                del store[name]
    return added


def _numpy_state() -> Any:
    numpy = sys.modules.get("numpy")
    return None if numpy is None else numpy.random.get_state()
