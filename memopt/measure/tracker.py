"""Counting the bytes of live tensor storages, real or fake, without an allocator to ask."""

from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Protocol, Self
from weakref import ref

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from memopt.measure.trace import Origin, origin_of

MADE_BEFORE = Origin("made before the step")
"""Of what was there when tracking began."""

Trackable = torch.Tensor | nn.Module | Optimizer | Iterable[Any] | Mapping[Any, Any] | None


class _Live(ref[torch.UntypedStorage]):
    """A counted storage: its identity and what it was counted with."""

    __slots__ = ("counted_bytes", "key", "request")

    key: int
    counted_bytes: int
    request: int | None


class Device(Protocol):
    """Something that is told what is asked for and given back, such as a `SimulatedDevice`."""

    def allocate(self, size_bytes: int, origin: Origin) -> int:
        """Memory is asked for; returns the request's number."""

    def free(self, number: int) -> None:
        """What was asked for as `number` is given back."""


class Libraries(Protocol):
    """What an operator asks for beside its results, such as `CudaLibraries`."""

    def before(self, func: Any, args: tuple[Any, ...]) -> list[int]:
        """An operator is about to run."""

    def result(self, func: Any, args: tuple[Any, ...], index: int) -> None:
        """The result with this index, counted among those that are tensors, has been counted."""

    def after(self, held: list[int]) -> None:
        """It has run; `held` is what `before` returned."""


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
        device: told of every storage made and freed; None tells nobody.
        libraries: told of every operator; None tells nobody.
    """

    def __init__(
        self,
        rounding_bytes: int = 1,
        fake_mode: FakeTensorMode | None = None,
        device: Device | None = None,
        libraries: Libraries | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.libraries = libraries
        self.rounding_bytes = rounding_bytes
        self.fake_mode = fake_mode
        self.current_bytes = 0
        self.peak_bytes = 0
        self._live: dict[int, _Live] = {}
        self._torch_resize = torch.UntypedStorage.resize_

    def reset_peak(self) -> None:
        """Start a new peak from what is live now."""
        self.peak_bytes = self.current_bytes

    def request_of(self, tensor: torch.Tensor) -> int | None:
        """The number under which the device was asked for a tensor's storage; None where it was not."""
        live = self._live.get(tensor.untyped_storage()._cdata)
        return None if live is None else live.request

    def track(self, *things: Trackable) -> None:
        """Count what was made before the mode was entered.

        Args:
            things: tensors (with their gradients), modules (parameters, buffers, gradients), optimizers
                (their state), and containers of these, at any depth. Anything else is ignored.
        """
        for thing in things:
            if isinstance(thing, torch.Tensor):
                self._count(thing, MADE_BEFORE)
                # Reading `.grad` of a tensor inside a graph warns; only leaves have one.
                if thing.is_leaf and thing.grad is not None:
                    self._count(thing.grad, MADE_BEFORE)
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
        libraries = self.libraries
        held = libraries.before(func, args) if libraries is not None else []
        result = func(*args, **(kwargs or {}))
        results = result if isinstance(result, list | tuple) else (result,)
        tensors = [item for item in results if isinstance(item, torch.Tensor)]
        for index, tensor in enumerate(tensors):
            self._count(tensor, func)
            if libraries is not None:
                libraries.result(func, args, index)
        if held and libraries is not None:
            libraries.after(held)
        return result

    def _count(self, tensor: torch.Tensor, operator: object) -> None:
        if not self._is_mine(tensor):
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        live = self._live.get(key)
        if live is None:
            live = _Live(storage, self._forget)
            live.key, live.counted_bytes, live.request = key, 0, None
            self._live[key] = live
        if live.counted_bytes != self._rounded(storage.nbytes()):
            self._resize(live, storage.nbytes(), operator)

    def _is_mine(self, tensor: torch.Tensor) -> bool:
        # Opaque layouts (mkldnn, sparse) have no storage of their own.
        if tensor.layout is not torch.strided:
            return False
        if isinstance(tensor, FakeTensor):
            return tensor.fake_mode is self.fake_mode
        return self.fake_mode is None and tensor.device.type != "meta"

    def _rounded(self, size_bytes: int) -> int:
        return -(-size_bytes // self.rounding_bytes) * self.rounding_bytes

    def _resize(self, live: _Live, size_bytes: int, operator: object) -> None:
        self._give_back(live)
        live.counted_bytes = self._rounded(size_bytes)
        self.current_bytes += live.counted_bytes
        self.peak_bytes = max(self.peak_bytes, self.current_bytes)
        if self.device is not None and size_bytes:
            origin = operator if isinstance(operator, Origin) else origin_of(operator)
            live.request = self.device.allocate(size_bytes, origin)

    def _forget(self, live: ref[torch.UntypedStorage]) -> None:
        assert isinstance(live, _Live)
        del self._live[live.key]
        self._give_back(live)

    def _give_back(self, live: _Live) -> None:
        self.current_bytes -= live.counted_bytes
        if self.device is not None and live.request is not None:
            self.device.free(live.request)
            live.request = None

    def _patched_resize(self) -> Any:
        torch_resize = self._torch_resize

        def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            result: torch.UntypedStorage = torch_resize(storage, size)
            live = self._live.get(storage._cdata)
            if live is not None:
                self._resize(live, storage.nbytes(), "resize_")
            return result

        return resize_
