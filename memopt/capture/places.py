"""Where forward can find Python values: attributes of modules, and what their code refers to outside of them.

Read off the code without running it: globals, variables of enclosing functions, default arguments, attributes of
classes and of the user's own Python modules, and the same of every function that is called by its name.
"""

import dis
import functools
import inspect
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from memopt.capture.frozen import CONTAINERS, Same, attributes_inside, frozen, has_users_code, is_users, owner_of
from memopt.ir import PLAIN

_DEEPEST, _MOST_PARTS = 3, 1000
"""How far into containers functions are looked for."""
_DEEPEST_WRAPPED = 20
_Cache: Any = type(functools.cache(int))
_MODULE_INTERNALS = frozenset(vars(nn.Module()))
OF_RNNS = ("_flat_weights", "_flat_weight_refs")
"""Where `nn.LSTM` and its like list their parameters, anew whenever others have come in their places."""


@dataclass(frozen=True, slots=True)
class Place:
    """A name that Python code can read and write.

    Attributes:
        label: as a user would write it.
        read: the present value; raises LookupError, AttributeError or ValueError where there is none.
        write: put a value there.
    """

    label: str
    read: Callable[[], Any]
    write: Callable[[Any], None]


def module_places(root: nn.Module) -> list[Place]:
    """The attributes of every module, apart from parameters, buffers, submodules and hooks."""
    return [
        entry(vars(module), name, f"self.{path}.{name}" if path else f"self.{name}")
        for path, module in root.named_modules()
        for name, value in vars(module).items()
        if (name not in _MODULE_INTERNALS or name == "training") and not isinstance(value, (torch.Tensor, nn.Module))
        if not (isinstance(module, nn.RNNBase) and name in OF_RNNS)
    ]


def tensor_stores(module: nn.Module) -> tuple[dict[str, Any], ...]:
    """Where a module holds tensors."""
    return module._parameters, module._buffers, vars(module)


def outside_places(root: nn.Module) -> list[Place]:
    """What the code of the modules' classes refers to besides the modules."""
    return searched(root).places


def searched(root: nn.Module, given: Iterable[Any] = ()) -> "Search":
    """All that the code of the modules' classes refers to; and `given`, which are arguments of forward."""
    search = Search()
    for value in given:
        if not isinstance(value, (*PLAIN, torch.Tensor)):
            search.visit_value(value, _fixed(value, "one of its arguments"))
    for cls in dict.fromkeys(type(module) for module in root.modules()):
        search.visit_class(cls)
    for module in root.modules():
        if has_users_code(module):
            for name, value in vars(module).items():
                if name not in _MODULE_INTERNALS and not isinstance(value, (*PLAIN, torch.Tensor)):
                    search.visit_inside(value)
    return search


def where_used(root: nn.Module, *labels: str) -> str:
    """ "file.py:line" at which the code of the modules' classes writes, or else reads, one of these names.

    Where none does, that of the model's own forward.
    """
    search = searched(root)
    wanted = {label.split()[-1].rpartition(".")[2] for label in labels}
    wanted |= {label.removeprefix("default ").split()[0] for label in labels if label.startswith("default ")}
    reads: list[str] = []
    for function in search.functions:
        for instruction in dis.get_instructions(function):
            if instruction.argval in wanted and instruction.positions is not None:
                line = f"{function.__code__.co_filename}:{instruction.positions.lineno}"
                if instruction.opname.startswith("STORE"):
                    return line
                reads.append(line)
    code = inspect.unwrap(type(root).forward).__code__
    return reads[0] if reads else f"{code.co_filename}:{code.co_firstlineno}"


def type_comparison(functions: Iterable[types.FunctionType]) -> str | None:
    """ "file.py:line" of a comparison of a type with torch.Tensor, which is another while forward is recorded."""
    for function in functions:
        names = _names_in(function.__code__)
        if "Tensor" not in names or not {"type", "__class__"} & names:
            continue
        latest: list[Any] = []
        for instruction in dis.get_instructions(function):
            if instruction.opname in ("IS_OP", "COMPARE_OP", "CONTAINS_OP"):
                if "Tensor" in latest and {"type", "__class__"} & set(latest) and instruction.positions is not None:
                    return f"{function.__code__.co_filename}:{instruction.positions.lineno}"
                latest.clear()
            elif instruction.opname.startswith("STORE") or "JUMP" in instruction.opname:
                latest.clear()
            elif instruction.argval in ("Tensor", "type", "__class__"):
                latest.append(instruction.argval)
    return None


def outside_signature(places: Iterable[Place]) -> tuple[Any, ...]:
    """The present values, to be compared with those at another time."""
    return tuple(_read(place) for place in places)


def values_read(root: nn.Module) -> dict[str, Any]:
    """What a module and its code hold now, by the names of the places, to be compared with that at another time."""
    return {place.label: _read(place) for place in (*module_places(root), *outside_places(root))}


def _read(place: Place) -> Any:
    try:
        return frozen(place.read())
    except (AttributeError, LookupError, ValueError):
        return None


class Search:
    """Follows names from classes to functions and on; sees each once.

    Attributes:
        places: outside of the modules.
        functions: of the user's.
        caches: `functools.cache`s around some of them.
    """

    def __init__(self) -> None:
        self.places: list[Place] = []
        self.functions: list[types.FunctionType] = []
        self.caches: list[Any] = []
        self._seen: set[Any] = set()

    def visit_class(self, cls: type) -> None:
        for base in cls.__mro__:
            if not is_users(base) or not self._first_time(base):
                continue
            for name, value in list(vars(base).items()):
                functions = _functions_of(value)
                if name == "__init__":
                    continue  # no part of a forward
                if functions:
                    self._visit_functions(functions)
                elif not name.startswith("__") and _is_data(value):
                    self.places.append(_attribute(base, name))

    def _visit_functions(self, functions: list[Any]) -> None:
        for function in functions:
            if not isinstance(function, _Cache):
                self._visit_function(function)
            elif is_users(function) and self._first_time(function):
                self.caches.append(function)

    def _visit_function(self, function: types.FunctionType) -> None:
        if not is_users(function) or not self._first_time(function):
            return
        self.functions.append(function)
        if vars(function).keys() - {"__wrapped__"}:
            self.places.append(_fixed(vars(function), f"an attribute of {function.__qualname__}"))
        for number, cell in enumerate(function.__closure__ or ()):
            self._visit_cell(cell, function.__code__.co_freevars[number])
        for name, value in _defaults(function):
            if not isinstance(value, PLAIN):
                self.visit_value(value, _fixed(value, f"default {name} of {function.__qualname__}"))
        names = _names_in(function.__code__)
        for name in names:
            if name in function.__globals__:
                self.visit_value(function.__globals__[name], entry(function.__globals__, name, name), names)

    def _visit_cell(self, cell: types.CellType, name: str) -> None:
        if cell == types.CellType():
            return

        def write(value: Any) -> None:
            cell.cell_contents = value

        self.visit_value(cell.cell_contents, Place(name, lambda: cell.cell_contents, write))

    def visit_value(self, value: Any, place: Place, names: Iterable[str] = ()) -> None:
        """What is read at a place, and what that leads to; of a Python module, these names."""
        if isinstance(value, (types.FunctionType, _Cache)):
            self.visit_inside(value)
        elif isinstance(value, type):
            self.visit_class(value)
        elif isinstance(value, types.ModuleType):
            self._visit_python_module(value, names)
        elif _is_data(value):
            if (place.label, id(value)) not in self._seen or isinstance(value, PLAIN):
                self._seen.add((place.label, id(value)))
                self.places.append(place)
            self.visit_inside(value)

    def visit_inside(self, value: Any, depth: int = 0) -> None:
        """Functions that a value holds: a table of them, a partial, a method, the methods of an object."""
        if isinstance(value, functools.partial):
            value = value.func
        self._visit_functions(_functions_of(value))
        owner = owner_of(value)
        value = value if owner is None else owner
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, (list, tuple, set, frozenset)) and depth < _DEEPEST:
            for part in list(value)[:_MOST_PARTS]:
                if not isinstance(part, (*PLAIN, torch.Tensor)):
                    self.visit_inside(part, depth + 1)
        elif attributes_inside(value) is not None:
            self.visit_class(type(value))

    def _visit_python_module(self, module: types.ModuleType, names: Iterable[str]) -> None:
        if not is_users(module):
            return
        for name in names:
            if name in vars(module) and self._first_time((id(module), name)):
                inner = vars(module)[name]
                if not isinstance(inner, types.ModuleType):
                    self.visit_value(inner, entry(vars(module), name, f"{module.__name__}.{name}"), names)

    def _first_time(self, thing: Any) -> bool:
        if thing in self._seen:
            return False
        self._seen.add(thing)
        return True


def _functions_of(value: Any) -> list[Any]:
    """The function that a value is, and those that it was wrapped around; of a cache, the cache first."""
    value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    found: list[Any] = []
    while callable(value) and len(found) < _DEEPEST_WRAPPED:
        found.append(value)
        value = getattr(value, "__wrapped__", None)
    return [each for each in found if isinstance(each, (types.FunctionType, _Cache))]


def _defaults(function: types.FunctionType) -> list[tuple[str, Any]]:
    code = function.__code__
    names = code.co_varnames[: code.co_argcount]
    given = function.__defaults__ or ()
    last = zip(reversed(names), reversed(given), strict=False)
    return [*last, *(function.__kwdefaults__ or {}).items()]


def _names_in(code: types.CodeType) -> set[str]:
    """Names that code and the functions written inside it look up."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names_in(constant)
    return names


def _is_data(value: Any) -> bool:
    if isinstance(value, (type, types.ModuleType)):
        return False
    plain = (*PLAIN, list, dict, set, tuple, frozenset, torch.Tensor)
    return isinstance(value, plain) or not isinstance(frozen(value), Same) or hasattr(value, "__next__")


def entry(container: Any, key: Any, label: str) -> Place:
    """The place of one value in a container, or in the slot of an object."""
    if not isinstance(container, CONTAINERS):
        return Place(label, lambda: getattr(container, key), lambda value: object.__setattr__(container, key, value))

    held: Any = container

    def write(value: Any) -> None:
        held[key] = value

    return Place(label, lambda: held[key], write)


def _attribute(cls: type, name: str) -> Place:
    return Place(f"{cls.__name__}.{name}", lambda: vars(cls)[name], lambda value: setattr(cls, name, value))


def _fixed(value: Any, label: str) -> Place:
    """A default argument: what is in it may change, itself it stays."""
    return Place(label, lambda: value, lambda _: None)
