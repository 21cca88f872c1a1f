"""What the public calls take: checked, and in one form."""

from typing import Any

import torch
from torch import nn

from memopt.config import Config
from memopt.errors import CaptureError, ConfigError, ModelError
from memopt.ir import without_carriers


def checked(config: object, example_inputs: object) -> Config:
    """The configuration, if that is what was given.

    Raises:
        ConfigError: something else was given.
    """
    if isinstance(example_inputs, Config):
        raise ConfigError(
            "memopt.apply takes example inputs in the second place. Pass config=memopt.Config(...) by name."
        )
    if config is not None and not isinstance(config, Config):
        raise ConfigError(f"config is a {type(config).__name__}. Pass a memopt.Config: memopt.Config(recompute=...).")
    return config or Config()


def as_tuple(example_inputs: tuple[Any, ...] | torch.Tensor) -> tuple[Any, ...]:
    """Positional inputs as `apply` takes them; plain tensors in the places of those that carry metadata."""
    inputs = (example_inputs,) if isinstance(example_inputs, torch.Tensor) else tuple(example_inputs)
    plain: tuple[Any, ...] = without_carriers(inputs)
    return plain


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside the wrappers that memopt looks into.

    Raises:
        ModelError: `model` is no module.
        CaptureError: it is of a kind that cannot be rewritten.
    """
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        inner: nn.Module = model.module
        return inner
    _require_module(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError("The model is a ScriptModule. Apply memopt to the Python module it was made from.")
    if hasattr(model, "_orig_mod"):
        raise CaptureError("The model is compiled already. Call memopt.apply first and torch.compile after it.")
    return model


def require_own_forward(model: nn.Module) -> None:
    """A forward on the instance would run in place of memopt's, which is its class's.

    Raises:
        CaptureError: there is one.
    """
    if "forward" in vars(model):
        raise CaptureError(
            f"The forward of this {type(model).__name__} was replaced on the instance, as accelerate does: memopt's "
            "would never run. Call memopt.apply before that."
        )


def _require_module(model: object) -> None:
    if isinstance(model, type) and issubclass(model, nn.Module):
        name = model.__name__
        raise ModelError(f"{name} is a class. Pass an instance: memopt.apply({name}()).")
    if not isinstance(model, nn.Module):
        raise ModelError(f"memopt needs a torch.nn.Module, not a {type(model).__name__}. Pass the model itself.")
