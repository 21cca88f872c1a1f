"""What one call into torch is: how the graph spells it, whether tensors go in or out, whether it changes any."""

from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

_EFFECTS = frozenset({"__setitem__", "register_hook", "retain_grad", "backward"})


def call_of(func: Any, name: str) -> tuple[str, Any]:
    """Methods of Tensor are called by name: some live in places that generated code cannot spell."""
    method = getattr(torch.Tensor, name, None)
    if method is func or (method is not None and not hasattr(torch, name) and not callable(func)):
        return "call_method", name
    return "call_function", func


def tensors_in(values: Any) -> list[torch.Tensor]:
    """Every tensor among the arguments of a call, in order. A concat's are many, and are not taken for a tree."""
    found: list[torch.Tensor] = []
    for value in values.values() if type(values) is dict else values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif type(value) in (list, tuple, dict):
            found += tensors_in(value)
        elif value is not None:
            found += [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return found


def has_tensor(value: Any) -> bool:
    """Whether a value is a tensor or a list, tuple or dict with one in it."""
    if isinstance(value, torch.Tensor):
        return True
    if isinstance(value, (tuple, list)):
        return any(has_tensor(item) for item in value)
    if isinstance(value, dict):
        return any(has_tensor(item) for item in value.values())
    return False


def is_mutation(name: str, kwargs: dict[str, Any]) -> bool:
    """Whether a function changes something, going by its name and arguments."""
    return name in _EFFECTS or (name.endswith("_") and not name.endswith("__")) or "out" in kwargs


def versions(values: Any) -> dict[int, int]:
    """How often each of the tensors in `values` was written to so far, by its id."""
    return {id(tensor): tensor._version for tensor in tensors_in(values)}


def overwritten(node: fx.Node, before: dict[int, int]) -> list[fx.Node]:
    """The inputs of a call that it wrote to, going by their `versions` before it."""
    inputs = [n for n in node.all_input_nodes if isinstance(n.meta["val"], torch.Tensor)]
    return [n for n in inputs if n.meta["val"]._version != before.get(id(n.meta["val"]))]
