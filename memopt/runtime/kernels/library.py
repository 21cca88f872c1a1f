"""Registration of the operators. Through `torch.library.Library`: a mutating `custom_op` costs several times as much
at every call, and a step makes thousands."""

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("memopt", "DEF")
LAUNCHES: dict[str, Callable[..., None]] = {}
"""By the name of each operator defined, what launches its kernel."""


def define(schema: str, *, cuda: Callable[..., None], reference: Callable[..., None]) -> Callable[..., None]:
    """Define an operator that writes into some of its arguments and returns nothing.

    Args:
        schema: "name(Tensor x, Tensor(a!) out, ...) -> ()".
        cuda: launches the kernel.
        reference: the same in plain torch, which runs on a CPU.

    Returns:
        The operator, to be called.
    """
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, _on_its_device(cuda), "CUDA")
    _LIBRARY.impl(name, reference, "CPU")
    torch.library.register_fake(f"memopt::{name}", _nothing, lib=_LIBRARY)
    LAUNCHES[name] = cuda
    packet: Any = getattr(torch.ops.memopt, name)
    operator: Callable[..., None] = packet.default
    return operator


def _on_its_device(launch: Callable[..., None]) -> Callable[..., None]:
    """Triton launches on the current device, which need not be the one that the tensors are on."""

    def on_its_device(x: torch.Tensor, *rest: Any) -> None:
        if x.device.index == torch.cuda.current_device():
            launch(x, *rest)
        else:
            with torch.cuda.device(x.device):
                launch(x, *rest)

    return on_its_device


def _nothing(*args: Any, **kwargs: Any) -> None:
    """On fake tensors there is nothing to write."""
