"""What a tape does step by step: make a tensor, fill it, run an operator, start kernels."""

from array import array
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from memopt.runtime.kernels.driver import Driver, cuda_driver
from memopt.runtime.kernels.launches import Address, Launched, Outline, Packed, Relaunch, observed, pack
from memopt.runtime.kernels.library import LAUNCHES
from memopt.runtime.tape.burst import Burst
from memopt.runtime.tape.layout import Layout
from memopt.runtime.tape.program import Place


class At:
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


class Now:
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
        self.addresses = array("q")
        if self.by_address:
            self.stream = torch._C._cuda_getCurrentRawStream(self.device.index)
            self.addresses.extend([t.data_ptr() for t in externals])
            self.addresses.extend([0] * (layout.buffer_count - len(externals)))
            self.address_tensor = torch.frombuffer(self.addresses, dtype=torch.int64)  # the same memory
            driver = cuda_driver()
            if driver is not None:
                driver.enter(self.device.index)
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

    def tensor(self, at: At) -> torch.Tensor:
        base = self.buffer(at.buffer)
        if not at.whole and base.dtype != at.dtype:
            key = (at.buffer, at.dtype)
            if key not in self._typed:
                self._typed[key] = base.view(at.dtype)
            base = self._typed[key]
        return at.of(base)

    def filled(self, argument: Any) -> Any:
        """An argument with its tensors."""
        if isinstance(argument, At):
            return self.tensor(argument)
        if isinstance(argument, (list, tuple)):
            return type(argument)(self.filled(item) for item in argument)
        return argument


class Allocate:
    """A tensor of its own."""

    __slots__ = ("buffer", "place")

    def __init__(self, buffer: int, place: Place) -> None:
        self.buffer, self.place = buffer, place

    def run(self, now: Now) -> None:
        now.put(self.buffer, now.empty(self.place.size, self.place.stride, self.place.dtype))


class Zero:
    """Fill a tensor with zeros."""

    __slots__ = ("at",)

    def __init__(self, at: At) -> None:
        self.at = at

    def run(self, now: Now) -> None:
        now.tensor(self.at).zero_()


class Operate:
    """An operator of torch's own."""

    __slots__ = ("_named", "_placed", "args", "dead", "kwargs", "made", "operator")

    def __init__(
        self,
        operator: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        made: tuple[At | None, ...],
        dead: tuple[int, ...],
    ) -> None:
        self.operator, self.args, self.kwargs, self.made, self.dead = operator, args, kwargs, made, dead
        self._placed = [number for number, arg in enumerate(args) if _holds_places(arg)]
        self._named = [name for name, value in kwargs.items() if _holds_places(value)]

    def run(self, now: Now) -> None:
        args, kwargs = list(self.args), self.kwargs
        for number in self._placed:
            args[number] = now.filled(args[number])
        if self._named:
            kwargs = {**kwargs, **{name: now.filled(kwargs[name]) for name in self._named}}
        result = self.operator(*args, **kwargs)
        if self.made:
            # An operator may make more than its fake does: what nobody asked for stays where it is.
            results = result if isinstance(result, (tuple, list)) else (result,)
            for at, tensor in zip(self.made, results, strict=True):
                if at is not None:
                    now.put(at.buffer, _laid_out(tensor, at, now))
        for number in self.dead:
            now.drop(number)


class Start:
    """An operator of memopt's own: on a GPU kernels, started by address from the second time on."""

    __slots__ = ("args", "dead", "launches", "operator")

    def __init__(self, operator: Any, args: tuple[Any, ...], dead: tuple[int, ...]) -> None:
        self.operator, self.args, self.dead = operator, args, dead
        self.launches: list[Relaunch] | None = None

    def run(self, now: Now) -> None:
        if self.launches is not None and now.by_address:
            for launch in self.launches:
                launch.start(now.stream, now.addresses)
        elif not now.skips_kernels:
            arguments = [now.filled(arg) for arg in self.args]
            if now.by_address:
                with observed() as launches:
                    self.operator(*arguments)
                self.launches = [self._with_addresses(one, arguments) for one in launches]
            else:
                self.operator(*arguments)
        for number in self.dead:
            now.drop(number)

    def compile(self) -> None:
        """Have its kernels compiled, if `compile_ahead` collects that."""
        LAUNCHES[self.operator.name().removeprefix("memopt::")](*[_without_data(arg) for arg in self.args])

    def _with_addresses(self, launched: Launched, arguments: list[Any]) -> Relaunch:
        places = {id(t): at for t, at in zip(arguments, self.args, strict=True) if isinstance(at, At)}

        def address(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            at = places[id(value)]
            return Address(at.buffer, at.bytes)

        return Relaunch(launched, [address(value) for value in launched.arguments])


class StartAll:
    """Kernels one after another."""

    __slots__ = ("burst", "dead")

    def __init__(self, launches: list[Packed], dead: list[int], driver: Driver) -> None:
        self.dead = dead
        self.burst = Burst(launches, driver)

    def run(self, now: Now) -> None:
        self.burst.run(now.stream, now.address_tensor)
        for number in self.dead:
            now.drop(number)


Step = Allocate | Zero | Operate | Start | StartAll


def gathered(steps: list[Step]) -> list[Step]:
    """The same steps in the order in which bursts run them: what a run of kernels writes into is allocated before the
    first of them, and what they were the last to read is dropped after the last."""
    result: list[Step] = []
    starts: list[Start] = []

    def close() -> None:
        if starts:
            *others, last = starts
            dead = tuple(number for start in starts for number in start.dead)
            result.extend(Start(start.operator, start.args, ()) for start in others)
            result.append(Start(last.operator, last.args, dead))
        starts.clear()

    for step in steps:
        if isinstance(step, Start):
            starts.append(step)
        else:
            if not isinstance(step, Allocate):
                close()
            result.append(step)
    close()
    return result


def in_bursts(steps: list[Step], driver: Driver) -> list[Step]:
    """Steps as `gathered` orders them, with a burst for each run of kernels; as they are where the driver does not know
    a kernel."""
    result: list[Step] = []
    launches: list[Packed] = []
    dead: list[int] = []
    sizes = cache(driver.parameter_sizes)  # a function is launched for many layers

    def close() -> None:
        if launches:
            result.append(StartAll(launches[:], dead[:], driver))
        launches.clear()
        dead.clear()

    for step in steps:
        if not isinstance(step, Start):
            close()
            result.append(step)
            continue
        made = [pack(launch, sizes(launch.compiled.function)) for launch in step.launches or ()]
        if None in made or step.launches is None:
            return steps
        launches += [one for one in made if one is not None]
        dead += step.dead
    close()
    return result


def _holds_places(argument: Any) -> bool:
    if isinstance(argument, (list, tuple)):
        return any(map(_holds_places, argument))
    return isinstance(argument, At)


def _without_data(argument: Any) -> Any:
    """The outline of a tensor that lies as `At` says; another argument as it is."""
    if isinstance(argument, At):
        return Outline(argument.dtype, argument.size, argument.stride, argument.bytes)
    if isinstance(argument, (list, tuple)):
        return type(argument)(_without_data(item) for item in argument)
    return argument


def _laid_out(tensor: torch.Tensor, at: At, now: Now) -> torch.Tensor:
    """A result as the recording expects it to lie: an operator may choose another layout than its fake did."""
    if tensor.stride() == at.stride:
        return tensor
    return now.empty(at.size, at.stride, at.dtype).copy_(tensor)
