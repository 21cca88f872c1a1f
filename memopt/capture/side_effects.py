"""What a forward may change besides tensors, and what a recording would therefore freeze."""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from memopt.errors import CaptureError

_PLAIN = (bool, int, float, str, type(None))
_CONTAINERS = (list, dict, set)


@contextmanager
def refusing_side_effects(root: nn.Module) -> Iterator[None]:
    """Refuse a forward that changes plain attributes or containers of modules, or draws Python's random numbers.

    Recording runs forward once more than the user does: whatever it changed is put back, also when it failed.

    Raises:
        CaptureError: something changed.
    """
    before = _attributes(root)
    random_before, numpy_before = random.getstate(), _numpy_state()
    try:
        yield
    finally:
        changed = _put_back(root, before)
        drew = random.getstate() != random_before or repr(_numpy_state()) != repr(numpy_before)
        random.setstate(random_before)
        if numpy_before is not None:
            sys.modules["numpy"].random.set_state(numpy_before)
    if changed:
        raise CaptureError(
            f"forward changes self.{min(changed)} while it runs, which a recording would freeze. "
            "Move it out of forward."
        )
    if drew:
        raise CaptureError(
            "forward draws random numbers outside torch, which a recording would freeze. Draw them before forward."
        )


def _attributes(root: nn.Module) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Of every module: its path, its dictionary, and its plain values and copies of its containers."""
    return [
        (
            path,
            vars(module),
            {
                name: value.copy() if isinstance(value, _CONTAINERS) else value
                for name, value in vars(module).items()
                if isinstance(value, (*_PLAIN, *_CONTAINERS)) and not name.startswith("_")
            },
        )
        for path, module in root.named_modules()
    ]


def _put_back(root: nn.Module, before: list[tuple[str, dict[str, Any], dict[str, Any]]]) -> list[str]:
    """Undo changes; returns the dotted names of what had changed."""
    changed: list[str] = []
    for path, state, known in before:
        new = [n for n, v in state.items() if isinstance(v, (*_PLAIN, *_CONTAINERS)) and n not in known]
        for name in new:
            if not name.startswith("_"):
                changed.append(f"{path}.{name}" if path else name)
                del state[name]
        for name, value in known.items():
            if name in state and _same(state[name], value):
                continue
            changed.append(f"{path}.{name}" if path else name)
            _restore(state, name, value)
    return changed


def _same(now: Any, before: Any) -> bool:
    if isinstance(before, _CONTAINERS):
        # Elements by identity: comparing tensors would ask for their values.
        return type(now) is type(before) and [id(x) for x in _items(now)] == [id(x) for x in _items(before)]
    return type(now) is type(before) and (now == before or now is before)


def _items(container: Any) -> list[Any]:
    return [*container.keys(), *container.values()] if isinstance(container, dict) else list(container)


def _restore(state: dict[str, Any], name: str, value: Any) -> None:
    now = state.get(name)
    if isinstance(now, list) and isinstance(value, list):
        now[:] = value  # others may hold the same list
    elif isinstance(now, (dict, set)) and type(now) is type(value):
        now.clear()
        now.update(value)
    else:
        state[name] = value


def _numpy_state() -> Any:
    numpy = sys.modules.get("numpy")
    return None if numpy is None else numpy.random.get_state()
