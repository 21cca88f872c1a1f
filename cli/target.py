"""TARGET: `path/file.py:Name` or `package.module:Name`, Name a class, a factory or a module instance."""

import ast
import copy
import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from .errors import CommandError, describe, kind_of

FORM = "Write TARGET as path/file.py:Name or package.module:Name"
NAMES_SHOWN = 8

# How people write these; literal_eval would leave them as (true) strings.
_WORDS = {"true": True, "false": False, "none": None}


@dataclass(frozen=True, slots=True)
class Target:
    """A model that can be made as often as it is needed.

    Attributes:
        text: as the user wrote it.
        name: the part after the colon.
        file: the user's source file.
        make: builds a fresh model on the CPU; raises CommandError where the user's code fails.
    """

    text: str
    name: str
    file: str
    make: Callable[[], nn.Module]


def load_target(text: str, arguments: dict[str, Any]) -> Target:
    """Find what `text` names and bind `arguments` to it.

    Args:
        text: TARGET.
        arguments: keyword arguments of the class or factory; from `parse_arguments`.

    Raises:
        CommandError: no such file, module or name; importing it fails; the arguments do not fit.
    """
    place, colon, name = text.rpartition(":")
    if not colon or not place or not name:
        raise CommandError(f"TARGET {text!r} names no model. {FORM}.")
    namespace = _load_file(Path(place)) if _is_file(place) else _load_module(place)
    found = _find(namespace, place, name)
    file = namespace.__file__ or place
    if isinstance(found, nn.Module):
        if arguments:
            raise CommandError(f"{text} is a module already and takes no arguments. Leave --arg out.")
        return Target(text, name, file, lambda: copy.deepcopy(found))
    if not callable(found):
        raise CommandError(
            f"{text} is {kind_of(found)}. Name a class, a function that returns a torch.nn.Module, or a module "
            "instance."
        )
    return bind(found, text, file, arguments)


def bind(found: Callable[..., Any], text: str, file: str, arguments: dict[str, Any]) -> Target:
    """A class or factory with its arguments.

    Args:
        found: the class or factory.
        text: as the user wrote it.
        file: where it is defined.
        arguments: keyword arguments.

    Raises:
        CommandError: the arguments do not fit.
    """
    name = text.rpartition(":")[2]
    _require_fitting(found, name, arguments)
    return Target(text, name, file, lambda: _build(found, name, arguments, file))


def load_function(text: str) -> Callable[[Any], Any]:
    """The function that `path/file.py:name` or `package.module:name` names.

    Raises:
        CommandError: no such file, module or name, or it cannot be called.
    """
    place, colon, name = text.rpartition(":")
    if not colon or not place or not name:
        raise CommandError(f"{text!r} names no function. Write path/file.py:name or package.module:name.")
    found = _find(_load_file(Path(place)) if _is_file(place) else _load_module(place), place, name)
    if not callable(found):
        raise CommandError(f"{text} is {kind_of(found)}. Name a function that takes and returns a model.")
    return found


def takes_argument(text: str, argument: str) -> bool:
    """Whether the class or factory that TARGET names has an argument of this name."""
    place, _, name = text.rpartition(":")
    found = _find(_load_file(Path(place)) if _is_file(place) else _load_module(place), place, name)
    try:
        return not isinstance(found, nn.Module) and argument in inspect.signature(found).parameters  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False


def parse_arguments(pairs: Sequence[str]) -> dict[str, Any]:
    """Turn `key=value` texts into keyword arguments, values read as Python literals where they are one.

    Raises:
        CommandError: a text has no key, or opens a bracket or quote that it does not close.
    """
    arguments = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip().isidentifier():
            raise CommandError(f"--arg {pair!r} does not parse. Write it as key=value, for example depth=40.")
        arguments[key.strip()] = _literal(value.strip(), pair)
    return arguments


def _literal(value: str, pair: str) -> Any:
    if value.lower() in _WORDS:
        return _WORDS[value.lower()]
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        if value.startswith(("(", "[", "{", "'", '"')):
            raise CommandError(
                f"--arg {pair!r} does not parse: {value} is no Python value. Close what it opens, and quote "
                "the argument from the shell."
            ) from None
        return value


def _is_file(place: str) -> bool:
    return place.endswith(".py") or "/" in place or "\\" in place


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise CommandError(f"There is no file {path}. {FORM}, with a path that exists from here.")
    path = path.resolve()
    # A name of its own: the file may be called like a module that torch or memopt imports (signal.py).
    name = f"memopt_target_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise CommandError(f"{path} is not a Python source file. {FORM}.")
    module = importlib.util.module_from_spec(spec)
    # Files import their neighbours; last in the path for the same reason.
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    # SystemExit too: a script that ends itself must not end the command without a word.
    except BaseException as error:
        raise CommandError(_import_failure(str(path), error)) from error
    return module


def _load_module(name: str) -> ModuleType:
    # As `python -m` does, which a console script does not.
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            raise CommandError(f"There is no module {name} to import from here. {FORM}.") from error
        raise CommandError(_import_failure(name, error)) from error


def _import_failure(place: str, error: BaseException) -> str:
    remedy = "Mend it"
    if isinstance(error, SystemExit):
        remedy = "Put what it runs under if __name__ == '__main__'"
    elif "relative import" in str(error):
        remedy = "Name it as package.module:Name, from the folder that holds the package"
    elif isinstance(error, ImportError):
        remedy = "Install what it imports, or mend it"
    return f"Importing {place} failed: {describe(error, place)}. {remedy}."


def _find(namespace: ModuleType, place: str, name: str) -> object:
    found: object = namespace
    for part in name.split("."):
        if not hasattr(found, part):
            raise CommandError(f"{place} has no {name}. {_offer(namespace, name)}")
        found = getattr(found, part)
    return found


def _offer(namespace: ModuleType, name: str) -> str:
    own = [
        key
        for key, value in vars(namespace).items()
        if not key.startswith("_")
        and (isinstance(value, nn.Module) or (callable(value) and value.__module__ == namespace.__name__))
    ]
    likely = difflib.get_close_matches(name, own, n=NAMES_SHOWN, cutoff=0.4) or own[:NAMES_SHOWN]
    more = " and others" if len(likely) < len(own) else ""
    return f"It has {', '.join(likely)}{more}." if likely else "It defines no class, function or module."


def _require_fitting(found: Callable[..., Any], name: str, arguments: dict[str, Any]) -> None:
    try:
        parameters = inspect.signature(found).parameters
    except (TypeError, ValueError):
        return
    named = [p for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    unknown = [key for key in arguments if key not in {p.name for p in named}]
    if unknown and not takes_any:
        takes = ", ".join(p.name for p in named) or "none"
        raise CommandError(f"{name} has no argument {', '.join(unknown)}. It takes: {takes}.")
    missing = [p.name for p in named if p.default is p.empty and p.name not in arguments]
    if missing:
        given = " ".join(f"--arg {key}=VALUE" for key in missing)
        have = "has" if len(missing) == 1 else "have"
        raise CommandError(f"{name} needs {', '.join(missing)}, which {have} no default. Give {given}.")


def _build(found: Callable[..., Any], name: str, arguments: dict[str, Any], file: str) -> nn.Module:
    call = f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"
    try:
        model = found(**arguments)
    except Exception as error:
        raise CommandError(f"{call} raised {describe(error, file)}. Mend the model or its --arg.") from error
    if not isinstance(model, nn.Module):
        raise CommandError(f"{call} returned {kind_of(model)}, not a torch.nn.Module. Name what makes the model.")
    return model
