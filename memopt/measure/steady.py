"""The figures of a step that was reached after others like it, from a trace of one.

A training step asks for the same memory as the one before it, in the same order. What the allocator reserves settles
only after some, because each finds what the last one left. So one step is recorded and served several times.
"""

from dataclasses import dataclass

from memopt.measure.allocator import CachingAllocator
from memopt.measure.trace import BACKWARD_BEGINS, STEP_ENDS, Event, Trace, replay


@dataclass(frozen=True, slots=True)
class Served:
    """The last step of a trace, as an allocator served it.

    Attributes:
        before_bytes: allocated when it began.
        saved_bytes: allocated when its backward began, less `before_bytes`.
        peak_allocated_bytes: most allocated during the step.
        peak_reserved_bytes: reserved at its end.
        peak_at: index of the event of the peak allocated.
        reserved_at: index of the event, in this or an earlier step, at which reserved memory last grew.
    """

    before_bytes: int
    saved_bytes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    peak_at: int
    reserved_at: int


def served(trace: Trace, step_from: int, expandable_segments: bool, *, bounds: bool = False) -> Served:
    """Serve a trace and look at its last step.

    Args:
        trace: with a mark at the end of the step.
        step_from: index of the event with which the step begins.
        expandable_segments: as `CachingAllocator` takes it.
        bounds: serve the requests that may not be made, too.
    """
    allocator = CachingAllocator(expandable_segments)
    backward_from = next(at for name, at in reversed(trace.marks) if name == BACKWARD_BEGINS)
    step_to = trace.marks[-1][1]
    assert trace.marks[-1][0] == STEP_ENDS
    before_bytes = saved_bytes = peak_at = reserved_at = reserved_bytes = peak_bytes = 0
    for index, _ in replay(trace, allocator, bounds=bounds):
        if allocator.reserved_bytes > reserved_bytes:
            reserved_at, reserved_bytes = index, allocator.reserved_bytes
        if index == step_from - 1:
            allocator.reset_peak()
            before_bytes = peak_bytes = allocator.allocated_bytes
            peak_at = index
        if index == backward_from - 1:
            saved_bytes = allocator.allocated_bytes - before_bytes
        if index >= step_from and allocator.peak_allocated_bytes > peak_bytes:
            peak_at, peak_bytes = index, allocator.peak_allocated_bytes
        if index == step_to - 1:
            break
    return Served(before_bytes, saved_bytes, peak_bytes, reserved_bytes, peak_at, reserved_at)


def reserved_within(trace: Trace, capacity_bytes: int, expandable_segments: bool) -> int:
    """The most that is reserved at a time on a device that has so much: more than that where it does not suffice."""
    allocator = CachingAllocator(expandable_segments, capacity_bytes)
    for _ in replay(trace, allocator):
        pass
    return allocator.peak_reserved_bytes


def repeated(trace: Trace, step_from: int, times: int) -> tuple[Trace, int]:
    """A trace whose last step is preceded by `times` more like it, and where the last one then begins.

    Where the step leaves something allocated that was not before, or frees something that was, in other sizes than it
    found, no other is like it: the trace is returned as it is.
    """
    step_to = trace.marks[-1][1]
    window = trace.events[step_from:step_to]
    made = {event.number: event.size_bytes for event in window if event.size_bytes}
    inherited = [event.number for event in window if not event.size_bytes and event.number not in made]
    freed = {event.number for event in window if not event.size_bytes}
    left = [number for number in made if number not in freed]
    sizes = {event.number: event.size_bytes for event in trace.events if event.size_bytes}
    # In the order in which they were asked for: what replaces what.
    if [sizes[number] for number in sorted(inherited)] != [sizes[number] for number in left]:
        return trace, step_from
    result = Trace(trace.events[:step_from], list(trace.origins), tags=dict(trace.tags))
    successor = dict(zip(sorted(inherited), left, strict=True))
    names = {number: number for number in inherited}  # what the step finds, by its name in the recorded step
    for _ in range(times):
        names = _append(result, window, made, names, successor)
    shift = len(result.events) - step_from
    result.events += [_renamed(event, names, made) for event in trace.events[step_from:]]
    result.marks += [(name, at + (shift if at >= step_from else 0)) for name, at in trace.marks]
    result.regions += [(name, phase, at + shift) for name, phase, at in trace.regions if at >= step_from]
    return result, step_from + shift


def _append(
    result: Trace, window: list[Event], made: dict[int, int], names: dict[int, int], successor: dict[int, int]
) -> dict[int, int]:
    """Adds the step with numbers of its own; returns what the next one finds."""
    own = dict(zip(made, range(len(result.origins), len(result.origins) + len(made)), strict=True))
    for number in made:
        result.origins.append(result.origins[number])
        if number in result.tags:
            result.tags[own[number]] = result.tags[number]
    known = names | own
    result.events += [_renamed(event, known, {}) for event in window]
    return {found: own[left] for found, left in successor.items()}


def _renamed(event: Event, names: dict[int, int], made: dict[int, int]) -> Event:
    number = event.number if event.number in made else names.get(event.number, event.number)
    return Event(number, event.size_bytes, event.is_bound)
