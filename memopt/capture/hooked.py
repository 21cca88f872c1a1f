"""A module whose hooks a recording does not run: what forward makes of its inputs, cast as FSDP2's hooks cast them."""

from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from memopt.capture.source import user_line
from memopt.errors import CaptureError
from memopt.ir import holds_tensor, is_open, sharding_policy

WHOLE_LATER = (
    "The parameters of {} are in pieces (DTensor). Where FSDP2 shards them, apply memopt without example inputs: "
    "forward is then recorded when they are whole. Tensor parallelism is not supported."
)
"""Why a tensor cannot be recorded; filled in with its name."""
STRAY = (
    "{}: uses a tensor that is no input, parameter or buffer of the model. Register it as a buffer, or pass it to "
    "forward as an argument of its own."
)
"""The same of one from elsewhere; filled in with where it is used."""


def call_as_hooked(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a module's forward alone."""
    policy = sharding_policy(module)
    if policy is None:
        return module.forward(*args, **kwargs)
    args, kwargs = _cast((args, kwargs), policy.inputs)
    return _cast(module.forward(*args, **kwargs), policy.outputs)


def _cast(values: Any, dtype: torch.dtype | None) -> Any:
    def cast(value: Any) -> Any:
        is_wanted = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(dtype) if is_wanted else value

    return values if dtype is None else pytree.tree_map(cast, values)


def refuse_closed(result: Any, path: str) -> None:
    """What the module at `path`, which is not looked into, returns has to be something that can be taken apart."""
    if not isinstance(result, (torch.Tensor, tuple, list, dict)) and not is_open(result) and holds_tensor(result):
        raise CaptureError(
            f"{user_line()}: {path} has hooks and returns a {type(result).__name__}, into which a recording cannot "
            "look. Return a tensor, a tuple, a list, a dict or a dataclass."
        )
