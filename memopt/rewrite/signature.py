"""When a recorded forward may be used again: same inputs, same state of the modules."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed, nn

from memopt.capture import frozen, has_users_code

_INTERNALS = frozenset(vars(nn.Module()))

Signature = tuple[Any, ...]

_SCALARS = (bool, int, float, str, type(None), torch.dtype)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def input_signature(leaves: list[Any]) -> Signature:
    """Shape, strides, dtype, device and gradient flag of tensors, and which of them are one; other values as is."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return (*map(_describe, leaves), _first_of_each(tensors) if len(tensors) > 1 else None)


def _first_of_each(tensors: list[torch.Tensor]) -> Signature:
    """For each tensor the first that is the same object, and the first that lies in the same memory."""
    objects: dict[int, int] = {}
    storages: dict[int, int] = {}
    return tuple(
        (objects.setdefault(id(t), i), storages.setdefault(t.untyped_storage()._cdata, i))
        for i, t in enumerate(tensors)
    )


def _describe(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device, leaf.requires_grad
    return (type(leaf), leaf if isinstance(leaf, _SCALARS) else frozen(leaf))


def mode_signature(device_type: str) -> Signature:
    """Global modes that choose kernels or casts, and the processes that norms may share their statistics with."""
    autocast = torch.is_autocast_enabled(device_type)
    return (
        autocast,
        torch.get_autocast_dtype(device_type) if autocast else None,
        torch.backends.cudnn.enabled,
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        distributed.group.WORLD if distributed.is_available() and distributed.is_initialized() else None,
    )


def module_signature(root: nn.Module) -> Signature:
    """What a recording froze of the modules: classes, flags, plain settings, hooks, which parameters are trained.

    Values of parameters and buffers are not part of it: they are read live.
    """
    entries: list[Any] = []
    todo = [root]
    while todo:
        module = todo.pop()
        state = module.__dict__
        entries += (type(module), _settings_of(module)(state))
        for hooks in _HOOKS:
            if state[hooks]:
                entries.append(hooks)
        children = state["_modules"]
        entries += [None if p is None else p.requires_grad for p in state["_parameters"].values()]
        if children:
            entries += children
            todo += [child for child in children.values() if child is not None]
    return tuple(entries)


_Reader = Callable[[dict[str, Any]], Any]
_readers: dict[tuple[Any, ...], _Reader] = {}
_of_several_types: set[type] = set()
"""Classes of torch's whose instances hold values of several types by the same name: numbers and lists of them."""


def with_lists(root: nn.Module) -> None:
    """From now on read settings of torch's modules that are lists in some of them: `kernel_size=[2, 2]`."""
    held = {type(module) for module in root.modules() if any(map(_is_plain_list, vars(module).values()))}
    _of_several_types.update(held)


def _settings_of(module: nn.Module) -> _Reader:
    """Reads the plain attributes of a module. Which ones they are is worked out once per class and set of names:
    this runs for every module at every forward."""
    state = module.__dict__
    kind = type(module)
    key: tuple[Any, ...] = (kind, *state)
    if kind in _of_several_types or not kind.__module__.startswith("torch.nn."):  # a list where there was a number
        key = (*key, *map(type, state.values()))
    reader = _readers.get(key)
    if reader is None:
        if kind not in _of_several_types and any(map(_is_plain_list, state.values())):
            _of_several_types.add(kind)
            return _settings_of(module)
        names = [n for n, value in state.items() if isinstance(value, _SCALARS) or _is_plain_tuple(value)]
        tensors = [n for n, value in state.items() if isinstance(value, torch.Tensor)]
        reader = operator.itemgetter(*names) if names else lambda _: None
        others = [
            n for n, v in state.items() if n not in names and (_is_looked_into(module, n, v) or _is_plain_list(v))
        ]
        if others:
            reader = _with_contents(reader, others)
        if tensors:  # parameters of nn.DataParallel's replicas are plain attributes
            reader = _with_gradient_flags(reader, tensors)
        _readers[key] = reader
    return reader


def _with_gradient_flags(reader: _Reader, tensors: list[str]) -> _Reader:
    def read(state: dict[str, Any]) -> Any:
        values = (state[name] for name in tensors)
        return reader(state), *(isinstance(v, torch.Tensor) and v.requires_grad for v in values)

    return read


def _with_contents(reader: _Reader, names: list[str]) -> _Reader:
    """Containers and objects are compared by what is in them."""

    def read(state: dict[str, Any]) -> Any:
        return reader(state), *(frozen(state[name]) for name in names)

    return read


def _is_looked_into(module: nn.Module, name: str, value: Any) -> bool:
    """Torch's own modules keep lists that nobody changes."""
    return name not in _INTERNALS and has_users_code(module) and not isinstance(value, (torch.Tensor, nn.Module))


def _is_plain_list(value: Any) -> bool:
    return type(value) is list and all(isinstance(item, _SCALARS) for item in value)


def _is_plain_tuple(value: Any) -> bool:
    return type(value) is tuple and all(isinstance(item, _SCALARS) for item in value)
