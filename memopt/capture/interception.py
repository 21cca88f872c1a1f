"""While a forward is recorded, this thread's module calls go to the recorder, checkpoints are looked through, and
torch's own log is quiet."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules import batchnorm
from torch.utils import checkpoint

from memopt.capture.source import user_line
from memopt.errors import CaptureError
from memopt.ir import synchronised_batch_norm


class Recorder(Protocol):
    """Takes module calls."""

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a module and write down what happens."""
        ...

    def custom(self, function: Any, apply: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a `torch.autograd.Function` by `apply`, its own."""
        ...

    def enter_autocast(self, block: torch.autocast) -> None:
        """An autocast block has begun."""
        ...

    def exit_autocast(self) -> None:
        """The block that began last is about to end."""
        ...


_active = threading.local()
_INSIDE_LEAF = object()
"""In place of a recorder: modules run as usual, but their hooks must not see tensors without data."""


def is_recording() -> bool:
    """Whether this thread is inside `recording`."""
    return getattr(_active, "recorder", None) is not None


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Route this thread's module calls through `recorder`, and those that a checkpoint makes.

    What the user checkpointed is recomputed by memopt instead, or kept; twice would be once too many.
    """
    with _in_place(recorder), _calls_intercepted():
        yield


@contextmanager
def through_checkpoints() -> Iterator[None]:
    """This thread's checkpoints just call their functions, as they do in a recording."""
    before = getattr(_active, "through", False)
    _active.through = True
    try:
        with _calls_intercepted():
            yield
    finally:
        _active.through = before


@contextmanager
def inside_leaf() -> Iterator[None]:
    """Modules that a module of torch's own calls are not recorded."""
    with _in_place(_INSIDE_LEAF):
        yield


@contextmanager
def quiet_torch() -> Iterator[None]:
    """Torch logs a traceback where an operation fails on fake tensors; the error that follows says it in one line."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


@contextmanager
def _in_place(recorder: object) -> Iterator[None]:
    outer = getattr(_active, "recorder", None)
    _active.recorder = recorder
    try:
        yield
    finally:
        _active.recorder = outer


_interception_lock = threading.Lock()
_interceptions = 0
_plain_call = nn.Module.__call__
_plain_apply: Any = torch.autograd.Function.apply.__func__  # type: ignore[attr-defined]
_plain_enter, _plain_exit = torch.autocast.__enter__, torch.autocast.__exit__
_plain_reentrant = checkpoint.CheckpointFunction
_plain_generator = checkpoint._checkpoint_without_reentrant_generator
_norms: Any = batchnorm
_plain_sync = _norms.sync_batch_norm


@contextmanager
def _calls_intercepted() -> Iterator[None]:
    global _interceptions
    with _interception_lock:
        _interceptions += 1
        nn.Module.__call__ = _call_module  # type: ignore[method-assign]
        # Inside `checkpoint`, which users have imported by name already.
        checkpoint.CheckpointFunction = _Reentrant  # type: ignore[assignment,misc]
        checkpoint._checkpoint_without_reentrant_generator = _around_checkpoint
        _norms.sync_batch_norm = _Synchronised
        torch.random.default_generator = _Generator()  # type: ignore[attr-defined,assignment]
        torch.autograd.Function.apply = classmethod(_apply_function)  # type: ignore[method-assign,assignment]
        torch.autocast.__enter__ = _enter_autocast  # type: ignore[method-assign]
        torch.autocast.__exit__ = _exit_autocast  # type: ignore[method-assign]
    try:
        yield
    finally:
        with _interception_lock:
            _interceptions -= 1
            if not _interceptions:
                nn.Module.__call__ = _plain_call  # type: ignore[method-assign]
                checkpoint.CheckpointFunction = _plain_reentrant  # type: ignore[misc]
                checkpoint._checkpoint_without_reentrant_generator = _plain_generator
                _norms.sync_batch_norm = _plain_sync
                torch.random.default_generator = torch.default_generator  # type: ignore[attr-defined]
                torch.autograd.Function.apply = classmethod(_plain_apply)  # type: ignore[method-assign,assignment]
                torch.autocast.__enter__ = _plain_enter  # type: ignore[method-assign]
                torch.autocast.__exit__ = _plain_exit  # type: ignore[method-assign]


class _Generator:
    """Stands for torch's generator where `torch.manual_seed` and the like look it up."""

    def __getattr__(self, name: str) -> Any:
        if name in ("manual_seed", "seed", "set_state") and is_recording():
            raise CaptureError(
                f"{user_line()}: forward seeds torch's random numbers, which a recording would not. "
                "Seed before forward."
            )
        return getattr(torch.default_generator, name)


def _looks_through() -> bool:
    return is_recording() or getattr(_active, "through", False)


class _Reentrant:
    """Stands for `CheckpointFunction`."""

    @staticmethod
    def apply(function: Any, preserve: bool, *args: Any) -> Any:
        return function(*args) if _looks_through() else _plain_reentrant.apply(function, preserve, *args)  # type: ignore[no-untyped-call]


class _Synchronised:
    """Stands for autograd's function inside `nn.SyncBatchNorm`, whose collectives must not run for a recording."""

    apply = staticmethod(synchronised_batch_norm)


def _around_checkpoint(*args: Any, **kwargs: Any) -> Iterator[Any]:
    """What `checkpoint` does before and after it calls the function: nothing while that is recorded."""
    if _looks_through():
        yield
    else:
        yield from _plain_generator(*args, **kwargs)


def _call_module(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    recorder = getattr(_active, "recorder", None)
    if recorder is None:
        return _plain_call(module, *args, **kwargs)
    if recorder is _INSIDE_LEAF:
        return module.forward(*args, **kwargs)
    return recorder.call(module, args, kwargs)


def _apply_function(cls: Any, *args: Any, **kwargs: Any) -> Any:
    recorder = getattr(_active, "recorder", None)
    if recorder is None or recorder is _INSIDE_LEAF:
        return _plain_apply(cls, *args, **kwargs)
    return recorder.custom(cls, partial(_plain_apply, cls), args, kwargs)


def _enter_autocast(block: torch.autocast) -> Any:
    result = _plain_enter(block)  # type: ignore[no-untyped-call]
    if is_recording() and _active.recorder is not _INSIDE_LEAF:
        _active.recorder.enter_autocast(block)
    return result


def _exit_autocast(block: torch.autocast, *error: Any) -> Any:
    result = _plain_exit(block, *error)
    if is_recording() and _active.recorder is not _INSIDE_LEAF:
        _active.recorder.exit_autocast()
    return result
