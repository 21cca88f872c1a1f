"""Run a recording on real tensors (or fake ones, to see what it allocates)."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from memopt.runtime.kernels.launches import Launched, observed, starter
from memopt.runtime.tape.layout import Layout, arrange
from memopt.runtime.tape.program import Make, Place, Recording, Run


class Tape:
    """A recording with every tensor's place settled.

    Attributes:
        scratch_bytes: of the buffer that lives while the tape plays.
    """

    def __init__(self, recording: Recording) -> None:
        self._layout = layout = arrange(recording)
        self.scratch_bytes = layout.scratch_bytes
        self._packed, self._scratch = layout.packed, layout.scratch
        resolve = _Resolver(recording, layout)
        self._steps = [step for index, a in enumerate(recording.actions) for step in resolve.steps(index, a)]
        self._outputs = [None if place is None else resolve.at(place) for place in recording.outputs]
        self._saved = [resolve.at(place) for place in recording.saved]
        self._kept = tuple(dict.fromkeys(at.buffer for at in self._saved))

    def play(self, externals: list[torch.Tensor]) -> tuple[list[torch.Tensor | None], list[torch.Tensor]]:
        """What the recorded function hands out, and the buffers in which `saved` finds what it kept."""
        now = _Now(externals, self._layout)
        with now.device_guard():
            for step in self._steps:
                step.run(now)
        outputs = [None if at is None else now.tensor(at) for at in self._outputs]
        return outputs, [now.buffer(number) for number in self._kept]

    def saved(self, buffers: list[torch.Tensor]) -> list[torch.Tensor]:
        """What the recorded function kept, of the buffers that `play` returned."""
        by_number = dict(zip(self._kept, buffers, strict=True))
        return [at.of(by_number[at.buffer]) for at in self._saved]


class _At:
    """A tensor as a part of a buffer."""

    __slots__ = ("buffer", "bytes", "dtype", "size", "stride", "whole")

    def __init__(self, buffer: int, offset_bytes: int, place: Place, whole: bool) -> None:
        self.buffer, self.bytes, self.whole = buffer, offset_bytes, whole
        self.size, self.stride, self.dtype = place.size, place.stride, place.dtype

    def of(self, base: torch.Tensor) -> torch.Tensor:
        """The tensor, given its buffer."""
        if self.whole:
            return base
        if base.dtype != self.dtype:
            base = base.view(self.dtype)
        offset = base.storage_offset() + self.bytes // self.dtype.itemsize
        return base.as_strided(self.size, self.stride, offset)


class _Resolver:
    """Turns places in slots into places in buffers."""

    def __init__(self, recording: Recording, layout: Layout) -> None:
        self._layout = layout
        self._actions = recording.actions
        # How each buffer of its own lies: as it leaves the tape where it does so whole.
        self._whole: dict[int, Place] = {place.slot: place for place in recording.externals}
        outputs = [p for p in recording.outputs if p is not None and _covers(p, recording.sizes_bytes[p.slot])]
        for action in recording.actions:
            for place in (action.place,) if isinstance(action, Make) else action.made:
                if place is not None:
                    self._whole[place.slot] = place
        made = {a.place.slot for a in recording.actions if isinstance(a, Make)}
        self._whole.update({place.slot: place for place in outputs if place.slot in made})
        self._dying: dict[int, list[int]] = {}
        for buffer, index in layout.last_use.items():
            self._dying.setdefault(index, []).append(buffer)

    def at(self, place: Place) -> _At:
        buffer, offset_bytes = self._layout.location[place.slot]
        alone = buffer not in (self._layout.packed, self._layout.scratch)
        start = offset_bytes + place.offset * place.dtype.itemsize
        return _At(buffer, start, place, alone and place == self._whole[place.slot])

    def steps(self, index: int, action: Make | Run) -> "list[_Allocate | _Zero | _Operate | _Start]":
        """What to do for one action."""
        if isinstance(action, Make):
            return self._make(action)
        dead = tuple(self._dying.get(index, ()))
        args = tuple(self._resolved(arg) for arg in action.args)
        kwargs = {key: self._resolved(arg) for key, arg in action.kwargs.items()}
        if action.operator.namespace == "memopt":
            return [_Start(action.operator, args, dead)]
        made = tuple(None if place is None else self.at(place) for place in action.made)
        return [_Operate(action.operator, args, kwargs, made, dead)]

    def _make(self, action: Make) -> "list[_Allocate | _Zero | _Operate | _Start]":
        slot = action.place.slot
        if slot not in self._layout.location:
            return []
        buffer, offset_bytes = self._layout.location[slot]
        alone = buffer not in (self._layout.packed, self._layout.scratch)
        steps: list[_Allocate | _Zero | _Operate | _Start] = [_Allocate(buffer, self._whole[slot])] if alone else []
        zeros_already = buffer == self._layout.scratch and offset_bytes < self._layout.zeroed_bytes
        if action.zeros and not zeros_already:
            steps.append(_Zero(self.at(action.place)))
        return steps

    def _resolved(self, argument: Any) -> Any:
        if isinstance(argument, Place):
            return self.at(argument)
        if isinstance(argument, (list, tuple)):
            return type(argument)(self._resolved(item) for item in argument)
        return argument


class _Now:
    """The buffers of one playing."""

    def __init__(self, externals: list[torch.Tensor], layout: Layout) -> None:
        first = externals[0]
        self.device = first.device
        fake = isinstance(first, FakeTensor)
        self._first = first if fake else None
        modes = torch._C._len_torch_dispatch_stack() > 0 or torch._C._autograd._profiler_enabled()
        self.stream = 0
        # Where somebody watches operators, they are called as such.
        self.by_address = first.is_cuda and not fake and not modes
        self.skips_kernels = fake
        self._buffers: list[torch.Tensor | None] = [*externals, *[None] * (layout.buffer_count - len(externals))]
        self._typed: dict[tuple[int, torch.dtype], torch.Tensor] = {}
        self.addresses: list[int] = []
        if self.by_address:
            self.stream = torch._C._cuda_getCurrentRawStream(self.device.index)
            self.addresses = [t.data_ptr() for t in externals] + [0] * (layout.buffer_count - len(externals))
        if layout.packed_bytes:
            self.put(layout.packed, self.empty((layout.packed_bytes,), (1,), torch.uint8))
        if layout.scratch_bytes:
            scratch = self.empty((layout.scratch_bytes,), (1,), torch.uint8)
            self.put(layout.scratch, scratch)
            if layout.zeroed_bytes:
                scratch[: layout.zeroed_bytes].zero_()

    def device_guard(self) -> AbstractContextManager[Any]:
        """Kernels start on the current device, which need not be the tensors'."""
        if not self.by_address or self.device.index == torch.cuda.current_device():
            return nullcontext()
        return torch.cuda.device(self.device)

    def empty(self, size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if self._first is not None:
            made: torch.Tensor = self._first.new_empty_strided(size, stride, dtype=dtype)
            return made
        return torch.empty_strided(size, stride, dtype=dtype, device=self.device)

    def put(self, number: int, tensor: torch.Tensor) -> None:
        self._buffers[number] = tensor
        if self.by_address:
            self.addresses[number] = tensor.data_ptr()

    def drop(self, number: int) -> None:
        self._buffers[number] = None

    def buffer(self, number: int) -> torch.Tensor:
        tensor = self._buffers[number]
        assert tensor is not None
        return tensor

    def tensor(self, at: _At) -> torch.Tensor:
        base = self.buffer(at.buffer)
        if not at.whole and base.dtype != at.dtype:
            key = (at.buffer, at.dtype)
            if key not in self._typed:
                self._typed[key] = base.view(at.dtype)
            base = self._typed[key]
        return at.of(base)

    def filled(self, argument: Any) -> Any:
        """An argument with its tensors."""
        if isinstance(argument, _At):
            return self.tensor(argument)
        if isinstance(argument, (list, tuple)):
            return type(argument)(self.filled(item) for item in argument)
        return argument


class _Allocate:
    """A tensor of its own."""

    __slots__ = ("buffer", "place")

    def __init__(self, buffer: int, place: Place) -> None:
        self.buffer, self.place = buffer, place

    def run(self, now: _Now) -> None:
        now.put(self.buffer, now.empty(self.place.size, self.place.stride, self.place.dtype))


class _Zero:
    """Fill a tensor with zeros."""

    __slots__ = ("at",)

    def __init__(self, at: _At) -> None:
        self.at = at

    def run(self, now: _Now) -> None:
        now.tensor(self.at).zero_()


class _Operate:
    """An operator of torch's own."""

    __slots__ = ("args", "dead", "kwargs", "made", "operator")

    def __init__(
        self,
        operator: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        made: tuple[_At | None, ...],
        dead: tuple[int, ...],
    ) -> None:
        self.operator, self.args, self.kwargs, self.made, self.dead = operator, args, kwargs, made, dead

    def run(self, now: _Now) -> None:
        kwargs = {key: now.filled(value) for key, value in self.kwargs.items()}
        result = self.operator(*[now.filled(arg) for arg in self.args], **kwargs)
        if self.made:
            results = (result,) if isinstance(result, torch.Tensor) else result
            tensors = [r for r in results or () if isinstance(r, torch.Tensor)]
            for at, tensor in zip(self.made, tensors, strict=True):
                if at is not None and at.whole:
                    now.put(at.buffer, _laid_out(tensor, at, now))
        for number in self.dead:
            now.drop(number)


class _Start:
    """An operator of memopt's own: on a GPU one kernel, started by address from the second time on."""

    __slots__ = ("args", "dead", "launched", "operator")

    def __init__(self, operator: Any, args: tuple[Any, ...], dead: tuple[int, ...]) -> None:
        self.operator, self.args, self.dead = operator, args, dead
        self.launched: list[Any] | None = None

    def run(self, now: _Now) -> None:
        if self.launched is not None and now.by_address:
            for start in self.launched:
                start(now.stream, now.addresses)
        elif not now.skips_kernels:
            tensors = [now.filled(arg) for arg in self.args]
            if now.by_address:
                with observed() as launched:
                    self.operator(*tensors)
                self.launched = [self._starter(one, tensors) for one in launched]
            else:
                self.operator(*tensors)
        for number in self.dead:
            now.drop(number)

    def _starter(self, launched: Launched, tensors: list[Any]) -> Any:
        """The same launch with an address wherever it had a tensor."""
        places = {id(t): at for t, at in zip(tensors, self.args, strict=True) if isinstance(at, _At)}
        arguments = []
        for value in launched.arguments:
            at = places[id(value)] if isinstance(value, torch.Tensor) else None
            arguments.append((-1, value) if at is None else (at.buffer, at.bytes))
        return starter(launched, arguments)


def _covers(place: Place, size_bytes: int) -> bool:
    """Whether a tensor is all of its slot, without gaps."""
    count = 1
    for extent in place.size:
        count *= extent
    return place.offset == 0 and count * place.dtype.itemsize == size_bytes


def _laid_out(tensor: torch.Tensor, at: _At, now: _Now) -> torch.Tensor:
    """A result as the recording expects it to lie: an operator may choose another layout than its fake did."""
    if tensor.stride() == at.stride:
        return tensor
    return now.empty(at.size, at.stride, at.dtype).copy_(tensor)
