"""Modules that a recording does not look into."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from memopt.capture.frozen import PLAIN
from memopt.ir import has_hooks


@contextmanager
def without_batch_counter(module: nn.Module) -> Iterator[None]:
    """With `momentum=None` a norm reads the value of its counter, which a fake tensor does not have.

    Its result does not depend on it, and the counter belongs to the real forward alone.
    """
    if not isinstance(module, nn.modules.batchnorm._NormBase) or module.momentum is not None:
        yield
        return
    counter = module._buffers["num_batches_tracked"]
    module._buffers["num_batches_tracked"] = None
    try:
        yield
    finally:
        module._buffers["num_batches_tracked"] = counter


def settings(module: nn.Module) -> dict[str, Any]:
    """The plain attributes of a module."""
    return {name: value for name, value in vars(module).items() if isinstance(value, PLAIN)}


def is_leaf(module: nn.Module) -> bool:
    """Torch's own modules, and whatever has hooks that inlining would skip."""
    if isinstance(module, (torch.jit.ScriptModule, fx.GraphModule)) or has_hooks(module):
        return True
    norm = nn.modules.batchnorm._BatchNorm
    if isinstance(module, norm) and type(module).forward is norm.forward:
        return True  # a subclass that changes something else, as how it is trained
    home = type(module).__module__
    return (home.startswith("torch.nn.") or home.startswith("torch._dynamo")) and not isinstance(module, nn.Sequential)
