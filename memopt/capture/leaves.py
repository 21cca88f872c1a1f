"""Modules that a recording does not look into."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from memopt.ir import PLAIN, has_hooks

_BatchNorm = nn.modules.batchnorm._BatchNorm


@contextmanager
def without_batch_counter(module: nn.Module) -> Iterator[None]:
    """With `momentum=None` a norm reads the value of its counter, which a fake tensor does not have.

    Its result does not depend on it, and the counter belongs to the real forward alone.
    """
    if not isinstance(module, nn.modules.batchnorm._NormBase) or module.momentum is not None:
        yield
        return
    module.momentum = 0.0
    try:
        yield
    finally:
        module.momentum = None


def settings(module: nn.Module) -> dict[str, Any]:
    """The plain attributes of a module."""
    return {name: value for name, value in vars(module).items() if isinstance(value, PLAIN)}


def is_leaf(module: nn.Module) -> bool:
    """Torch's own modules, and whatever has hooks that inlining would skip."""
    return has_hooks(module) or is_torchs(module)


def is_torchs(module: nn.Module) -> bool:
    """Whether a module runs torch's own forward: there is nothing of the user's inside."""
    if isinstance(module, (torch.jit.ScriptModule, fx.GraphModule)):
        return True
    if isinstance(module, _BatchNorm) and type(module).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
        return True  # a subclass that changes something else, as how it is trained
    home = type(module).__module__
    return (home.startswith("torch.nn.") or home.startswith("torch._dynamo")) and not isinstance(module, nn.Sequential)
