"""What a step asks the allocator for, in order, and what the allocator makes of it."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType

import torch

from memopt.ir import Phase
from memopt.measure.allocator import Block, CachingAllocator, SegmentView

FORWARD_BEGINS, BACKWARD_BEGINS, UPDATE_BEGINS, STEP_ENDS = "forward", "backward", "update", "end"
"""Names of moments of a step."""

PARAMETERS, GRADIENTS, OPTIMIZER_STATE = "parameters", "gradients", "optimizer state"
"""Tags of requests."""

_NOT_NAMED = (*torch.__path__, str(Path(__file__).parent))
_STEP, _PREDICT = (str(Path(__file__).with_name(name)) for name in ("step.py", "predict.py"))


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a request comes from.

    Attributes:
        operator: that made it: "aten.cat.default", or what a library keeps.
        code: of the innermost function outside torch and this room, within the step; None where there is none:
            autograd's own, the optimizer's, the batch.
        line: in the file of `code`.
    """

    operator: str
    code: CodeType | None = None
    line: int = 0

    def __str__(self) -> str:
        if self.code is None:
            return self.operator
        return f"{self.operator}  {Path(self.code.co_filename).name}:{self.line} {self.code.co_qualname}"


def origin_of(operator: object, depth: int = 1) -> Origin:
    """The origin of a request that an operator makes now; `depth` frames up is where to begin to look."""
    frame: FrameType | None = sys._getframe(depth)
    while frame is not None and not _runs_the_step(frame.f_code):
        if not frame.f_code.co_filename.startswith(_NOT_NAMED):
            return Origin(str(operator), frame.f_code, frame.f_lineno)
        frame = frame.f_back
    return Origin(str(operator))


def _runs_the_step(code: CodeType) -> bool:
    """Whether what calls this code asks for nothing itself."""
    return code.co_filename == _STEP or (code.co_filename, code.co_name) == (_PREDICT, "predict")


@dataclass(frozen=True, slots=True)
class Event:
    """Memory asked for or given back.

    Attributes:
        number: of the request; requests are counted from 0.
        size_bytes: asked for; 0 where it is given back.
        is_bound: it may not be asked for at all: a workspace that was never measured, at its largest.
    """

    number: int
    size_bytes: int
    is_bound: bool = False


@dataclass(slots=True)
class Trace:
    """Requests and returns, in order.

    Attributes:
        events: one after another.
        origins: where each request comes from, by its number.
        marks: names of moments, with the index of the event that follows.
        regions: names of regions and which of their phases ended, likewise.
        tags: what is known of a request's purpose, by its number.
    """

    events: list[Event] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)
    marks: list[tuple[str, int]] = field(default_factory=list)
    regions: list[tuple[str, Phase, int]] = field(default_factory=list)
    tags: dict[int, str] = field(default_factory=dict)


class SimulatedDevice:
    """Records what a step asks for and serves it by a model of the caching allocator, as it comes.

    Args:
        expandable_segments: as `CachingAllocator` takes it.

    Attributes:
        trace: everything so far.
    """

    def __init__(self, expandable_segments: bool = False) -> None:
        self.trace = Trace()
        self._allocator = CachingAllocator(expandable_segments)
        self._blocks: dict[int, Block] = {}

    @property
    def current_bytes(self) -> int:
        """Allocated now."""
        return self._allocator.allocated_bytes

    @property
    def peak_bytes(self) -> int:
        """Most allocated since `reset_peak`."""
        return self._allocator.peak_allocated_bytes

    def reset_peak(self) -> None:
        """Start a new peak from what is allocated now."""
        self._allocator.reset_peak()

    def allocate(self, size_bytes: int, origin: Origin) -> int:
        """Serve a request; returns its number."""
        number = len(self.trace.origins)
        self._blocks[number] = self._allocator.allocate(size_bytes, number)
        self.trace.origins.append(origin)
        self.trace.events.append(Event(number, size_bytes))
        return number

    def free(self, number: int) -> None:
        """Take back what was asked for as `number`."""
        self._allocator.free(self._blocks.pop(number))
        self.trace.events.append(Event(number, 0))

    def might_allocate(self, size_bytes: int, origin: Origin) -> None:
        """Note a request that is given back at once and of which only the largest size is known; it is not served."""
        number = len(self.trace.origins)
        self.trace.origins.append(origin)
        self.trace.events += [Event(number, size_bytes, is_bound=True), Event(number, 0, is_bound=True)]

    def tag_all(self, tag: str) -> None:
        """Say what everything asked for so far is."""
        self.trace.tags.update(dict.fromkeys(range(len(self.trace.origins)), tag))

    def mark(self, name: str) -> None:
        """Name this moment."""
        self.trace.marks.append((name, len(self.trace.events)))

    def region_has_run(self, name: str, phase: Phase) -> None:
        """Note that a region's forward or backward ends now."""
        self.trace.regions.append((name, phase, len(self.trace.events)))


def replay(trace: Trace, allocator: CachingAllocator, *, bounds: bool = False) -> Iterator[tuple[int, int]]:
    """Serve a trace by an allocator, yielding each event's index and the bytes that it added to the allocated.

    Args:
        trace: as recorded.
        allocator: a new one; owners of its blocks are requests' numbers.
        bounds: serve the requests that may not be made, too.
    """
    blocks: dict[int, Block] = {}
    for index, event in enumerate(trace.events):
        before_bytes = allocator.allocated_bytes
        if event.is_bound and not bounds:
            pass
        elif event.size_bytes:
            blocks[event.number] = allocator.allocate(event.size_bytes, event.number)
        else:
            allocator.free(blocks.pop(event.number))
        yield index, allocator.allocated_bytes - before_bytes


def segments_after(trace: Trace, last: int, *, expandable_segments: bool = False) -> tuple[SegmentView, ...]:
    """What is reserved, and for which requests, after the event with index `last`."""
    allocator = CachingAllocator(expandable_segments)
    for index, _ in replay(trace, allocator):
        if index == last:
            break
    return allocator.segments()
