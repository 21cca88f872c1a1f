"""Inputs that are tensors with something written on them: MONAI's MetaTensor, torchvision's and fastai's images.

They compute as plain tensors do, and hand on what is written on them from operation to operation, each class by its
own `__torch_function__`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

_HOMES = ("monai", "torchvision", "fastai")


def is_carrier(value: Any) -> bool:
    """Whether a value is such a tensor."""
    if not isinstance(value, torch.Tensor) or type(value) is torch.Tensor:
        return False
    return any(cls.__module__.partition(".")[0] in _HOMES for cls in type(value).__mro__)


def without_carriers(values: Any) -> Any:
    """The same tree with plain tensors in their places, which share their memory and gradients."""
    return pytree.tree_map(lambda leaf: leaf.as_subclass(torch.Tensor) if is_carrier(leaf) else leaf, values)


def handed_on(result: Any, carriers: Sequence[torch.Tensor]) -> Any:
    """What an operation that read the carriers makes of its result: a tensor that carries the same, or a plain one."""
    if not isinstance(result, torch.Tensor):
        return result
    kind: Any = type(carriers[0])
    return kind.__torch_function__(_result, tuple({type(one) for one in carriers}), (result, *carriers), {})


def _result(result: torch.Tensor, *carriers: torch.Tensor) -> torch.Tensor:
    """In place of the operation."""
    return result
