"""Counting the bytes of live tensor storages, real or fake, without an allocator to ask."""

from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Self
from weakref import ref

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

Trackable = torch.Tensor | nn.Module | Optimizer | Iterable[Any] | Mapping[Any, Any] | None


class _Live(ref[torch.UntypedStorage]):
    """A counted storage: its identity and what it was counted with."""

    __slots__ = ("counted_bytes", "key")

    key: int
    counted_bytes: int


class StorageTracker(TorchDispatchMode):
    """Counts the storages that operators return while the mode is on, each once however many views it has.

    `torch.distributed._tools.mem_tracker.MemTracker` counts in the same way, but rounds only on CUDA devices,
    hooks every module (which a rewritten forward can notice), refuses a second step, and copies a snapshot at
    each operator.

    A storage is counted from the operator that made it, or from `track`, until it is freed, also when it is
    freed by C++ autograd and also after the mode was left. Memory that a kernel takes and frees within one
    operator is not seen.

    Args:
        rounding_bytes: each storage counts as the next multiple of this; 1 for its exact size, 512 as the
            CUDA caching allocator does.
        fake_mode: count the fake tensors of this mode and nothing else; None counts real tensors and nothing
            else, so that a tracer's fake tensors are not taken for memory.
    """

    def __init__(self, rounding_bytes: int = 1, fake_mode: FakeTensorMode | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rounding_bytes = rounding_bytes
        self.fake_mode = fake_mode
        self.current_bytes = 0
        self.peak_bytes = 0
        self._live: dict[int, _Live] = {}
        self._torch_resize = torch.UntypedStorage.resize_

    def reset_peak(self) -> None:
        """Start a new peak from what is live now."""
        self.peak_bytes = self.current_bytes

    def track(self, *things: Trackable) -> None:
        """Count what was made before the mode was entered.

        Args:
            things: tensors (with their gradients), modules (parameters, buffers, gradients), optimizers
                (their state), and containers of these, at any depth. Anything else is ignored.
        """
        for thing in things:
            if isinstance(thing, torch.Tensor):
                self._count(thing)
                # Reading `.grad` of a tensor inside a graph warns; only leaves have one.
                if thing.is_leaf and thing.grad is not None:
                    self._count(thing.grad)
            elif isinstance(thing, nn.Module):
                self.track(*thing.parameters(), *thing.buffers())
            elif isinstance(thing, Optimizer):
                self.track(thing.state)
            elif isinstance(thing, Mapping):
                self.track(*thing.values())
            elif isinstance(thing, list | tuple):
                self.track(*thing)

    def __enter__(self) -> Self:
        # Storage.resize_ reaches no dispatcher, so the mode would not see memory given back through it.
        self._torch_resize = torch.UntypedStorage.resize_
        torch.UntypedStorage.resize_ = self._patched_resize()  # type: ignore[method-assign]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        torch.UntypedStorage.resize_ = self._torch_resize  # type: ignore[method-assign]
        super().__exit__(kind, error, traceback)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator, then count the storages of its results."""
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self._count(result)
        elif isinstance(result, list | tuple):
            for item in result:
                if isinstance(item, torch.Tensor):
                    self._count(item)
        return result

    def _count(self, tensor: torch.Tensor) -> None:
        if not self._is_mine(tensor):
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        live = self._live.get(key)
        if live is None:
            live = _Live(storage, self._forget)
            live.key, live.counted_bytes = key, 0
            self._live[key] = live
        self._resize(live, storage.nbytes())

    def _is_mine(self, tensor: torch.Tensor) -> bool:
        # Opaque layouts (mkldnn, sparse) have no storage of their own.
        if tensor.layout is not torch.strided:
            return False
        if isinstance(tensor, FakeTensor):
            return tensor.fake_mode is self.fake_mode
        return self.fake_mode is None and tensor.device.type != "meta"

    def _resize(self, live: _Live, size_bytes: int) -> None:
        rounded_bytes = -(-size_bytes // self.rounding_bytes) * self.rounding_bytes
        self.current_bytes += rounded_bytes - live.counted_bytes
        live.counted_bytes = rounded_bytes
        self.peak_bytes = max(self.peak_bytes, self.current_bytes)

    def _forget(self, live: ref[torch.UntypedStorage]) -> None:
        assert isinstance(live, _Live)
        del self._live[live.key]
        self.current_bytes -= live.counted_bytes

    def _patched_resize(self) -> Any:
        torch_resize = self._torch_resize

        def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            result: torch.UntypedStorage = torch_resize(storage, size)
            live = self._live.get(storage._cdata)
            if live is not None:
                self._resize(live, storage.nbytes())
            return result

        return resize_
