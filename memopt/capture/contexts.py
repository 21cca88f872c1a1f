"""What a recording does about gradients and autocast: blocks inside forward become calls that a graph can hold."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from memopt.capture.source import user_line
from memopt.errors import CaptureError

AutocastSettings = tuple[str, torch.dtype, bool, bool]
"""Device type, dtype, whether it is on, whether casts are cached."""

_open = threading.local()


def context() -> tuple[Any, ...]:
    """The modes that decide about casts, gradients and kernels."""
    devices = ("cpu", "cuda")
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *(torch.is_autocast_enabled(d) for d in devices),
        *(torch.get_autocast_dtype(d) for d in devices),
        *(flag() for flag in _FLAGS),
    )


_FLAGS: tuple[Callable[[], bool], ...] = (
    torch._C._get_cudnn_enabled,
    torch._C._get_cudnn_benchmark,
    torch._C._get_cudnn_deterministic,
    torch._C._get_mkldnn_enabled,
)
"""Of `torch.backends`: they choose kernels, and a graph cannot set them."""


def refuse_switch(before: tuple[Any, ...], source: str) -> None:
    """A graph holds blocks, but nothing that is switched by a call.

    Raises:
        CaptureError: the modes are not those of `before`.
    """
    now = context()
    if now == before:
        return
    if now[-len(_FLAGS) :] != before[-len(_FLAGS) :]:
        raise CaptureError(
            f"{source}: forward sets a flag of torch.backends while it runs. Set it around the call of the model."
        )
    raise CaptureError(
        f"{source}: forward switches autocast or inference mode on or off by a call. Write a block "
        "(with torch.autocast(...), with torch.no_grad())."
    )


@contextmanager
def same_context_after() -> Iterator[None]:
    """A forward that fails may leave a mode switched, which its caller would then meet."""
    devices = ("cpu", "cuda")
    gradients = torch.is_grad_enabled()
    casts = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices]
    try:
        yield
    finally:
        torch._C._set_grad_enabled(gradients)
        for device, enabled, dtype in casts:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)


def without_backward() -> AbstractContextManager[None]:
    """There is no backward of a recording. Fake activations that its graph held would count as memory where a step
    on fake tensors is measured, and the hooks of a checkpoint or an offloader around this call must not see them."""
    return torch.autograd.graph.saved_tensors_hooks(_save_nothing, _nothing_saved)


def _save_nothing(tensor: torch.Tensor) -> None:
    """In place of an activation."""


def _nothing_saved(packed: None) -> torch.Tensor:
    raise CaptureError(f"{user_line()}: forward differentiates. Apply memopt to the submodules it calls instead.")


def set_gradients(enabled: bool) -> None:
    """Record gradients from here on, or do not."""
    torch._C._set_grad_enabled(enabled)


def enter_autocast(*settings: Any) -> torch.autocast:
    """Begin an autocast block."""
    device, dtype, enabled, cached = settings
    block = torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cached)
    block.__enter__()  # type: ignore[no-untyped-call]
    _blocks().append(block)
    return block


def exit_autocast(block: torch.autocast) -> None:
    """End an autocast block."""
    _blocks().remove(block)
    block.__exit__(None, None, None)


def restoring_context(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that leaves the modes as they were, also where it fails in the middle of a block."""

    def run(*args: Any) -> Any:
        gradients, outer = torch.is_grad_enabled(), len(_blocks())
        try:
            return function(*args)
        finally:
            for block in reversed(_blocks()[outer:]):
                exit_autocast(block)
            torch._C._set_grad_enabled(gradients)

    return run


def _blocks() -> list[torch.autocast]:
    if not hasattr(_open, "blocks"):
        _open.blocks = []
    blocks: list[torch.autocast] = _open.blocks
    return blocks
