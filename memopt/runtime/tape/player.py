"""Run a recording on real tensors (or fake ones, to see what it allocates)."""

import threading
from concurrent.futures import Future
from typing import Any

import torch

from memopt.runtime.kernels.driver import cuda_driver
from memopt.runtime.kernels.launches import compile_soon
from memopt.runtime.tape.layout import Layout, arrange
from memopt.runtime.tape.program import Make, Place, Recording, Run
from memopt.runtime.tape.steps import Allocate, At, Now, Operate, Start, Step, Zero, gathered, in_bursts


class Tape:
    """A recording with every tensor's place settled.

    Attributes:
        scratch_bytes: of the buffer that lives while the tape plays.
        strides: of what the recorded function hands out; None where it hands out nothing.
    """

    def __init__(self, recording: Recording) -> None:
        self._layout = layout = arrange(recording)
        self.scratch_bytes = layout.scratch_bytes
        self._packed, self._scratch = layout.packed, layout.scratch
        resolve = _Resolver(recording, layout)
        # As bursts will run them, so that what is predicted without a GPU is allocated as on one.
        self._steps = gathered([s for index, a in enumerate(recording.actions) for s in resolve.steps(index, a)])
        self._outputs = [None if place is None else resolve.at(place) for place in recording.outputs]
        self.strides = [None if at is None else at.stride for at in self._outputs]
        self._saved = [resolve.at(place) for place in recording.saved]
        self._kept = tuple(dict.fromkeys(at.buffer for at in self._saved))
        self._lock = threading.Lock()
        self._bursts: list[Step] | None = None
        self._played = False
        self._compiling: Future[None] | None = None

    def play(self, externals: list[torch.Tensor]) -> tuple[list[torch.Tensor | None], list[torch.Tensor]]:
        """What the recorded function hands out, and the buffers in which `saved` finds what it kept."""
        now = Now(externals, self._layout)
        if now.by_address:
            with self._lock, now.device_guard():
                self._play_by_address(now)
        else:
            for step in self._steps:
                step.run(now)
        outputs = [None if at is None else now.tensor(at) for at in self._outputs]
        return outputs, [now.buffer(number) for number in self._kept]

    def compile_soon(self, device: torch.device) -> Future[None]:
        """Have all kernels of the tape compiled at once in the background, which it would otherwise do one after
        another as it first plays."""
        if self._compiling is None:
            starts = [step for step in self._steps if isinstance(step, Start)]
            self._compiling = compile_soon((step.compile for step in starts), device)
        return self._compiling

    def _play_by_address(self, now: Now) -> None:
        if self._bursts is None and self._played:
            driver = cuda_driver()  # not at first: many a tape is played but once, to verify
            self._bursts = self._steps if driver is None else in_bursts(self._steps, driver)
        if not self._played:
            self.compile_soon(now.device).result()
        for step in self._bursts or self._steps:
            step.run(now)
        self._played = True  # now it is known what each operator launches

    def saved(self, buffers: list[torch.Tensor]) -> list[torch.Tensor]:
        """What the recorded function kept, of the buffers that `play` returned."""
        by_number = dict(zip(self._kept, buffers, strict=True))
        return [at.of(by_number[at.buffer]) for at in self._saved]


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

    def at(self, place: Place) -> At:
        buffer, offset_bytes = self._layout.location[place.slot]
        alone = buffer not in (self._layout.packed, self._layout.scratch)
        start = offset_bytes + place.offset * place.dtype.itemsize
        return At(buffer, start, place, alone and place == self._whole[place.slot])

    def steps(self, index: int, action: Make | Run) -> list[Step]:
        """What to do for one action."""
        if isinstance(action, Make):
            return self._make(action)
        dead = tuple(self._dying.get(index, ()))
        args = tuple(self._resolved(arg) for arg in action.args)
        kwargs = {key: self._resolved(arg) for key, arg in action.kwargs.items()}
        if action.operator.namespace == "memopt":
            return [Start(action.operator, args, dead)]
        made = tuple(None if place is None else self.at(place) for place in action.made)
        return [Operate(action.operator, args, kwargs, made, dead)]

    def _make(self, action: Make) -> list[Step]:
        slot = action.place.slot
        if slot not in self._layout.location:
            return []
        buffer, offset_bytes = self._layout.location[slot]
        alone = buffer not in (self._layout.packed, self._layout.scratch)
        steps: list[Step] = [Allocate(buffer, self._whole[slot])] if alone else []
        zeros_already = buffer == self._layout.scratch and offset_bytes < self._layout.zeroed_bytes
        if action.zeros and not zeros_already:
            steps.append(Zero(self.at(action.place)))
        return steps

    def _resolved(self, argument: Any) -> Any:
        if isinstance(argument, Place):
            return self.at(argument)
        if isinstance(argument, (list, tuple)):
            return type(argument)(self._resolved(item) for item in argument)
        return argument


def _covers(place: Place, size_bytes: int) -> bool:
    """Whether a tensor is all of its slot, without gaps."""
    count = 1
    for extent in place.size:
        count *= extent
    return place.offset == 0 and count * place.dtype.itemsize == size_bytes
