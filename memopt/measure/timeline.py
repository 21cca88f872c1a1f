"""Where the memory of a predicted step goes: bytes by category at every moment, and what is alive at the peak."""

from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter
from pathlib import Path

from memopt.measure.allocator import CachingAllocator
from memopt.measure.trace import (
    BACKWARD_BEGINS,
    FORWARD_BEGINS,
    GRADIENTS,
    OPTIMIZER_STATE,
    PARAMETERS,
    STEP_ENDS,
    Origin,
    Trace,
    replay,
)

ACTIVATIONS, ARENAS, SCRATCH, WORKSPACES = "activations", "arenas", "scratch", "workspaces"
CATEGORIES = (PARAMETERS, OPTIMIZER_STATE, GRADIENTS, WORKSPACES, ARENAS, ACTIVATIONS, SCRATCH)
"""What memory is for. Activations: what forward leaves for backward, the batch included. Arenas: buffers that memopt's
runtime asks for itself (features, their gradients, scratch of a region). Scratch: what forward or backward makes and
gives back on the way, gradients of activations included."""

_RUNTIME = str(Path(__file__).parents[1] / "runtime")
_FACTORIES = ("aten.empty", "aten.zeros", "aten.new_empty", "aten.new_zeros")


@dataclass(frozen=True, slots=True)
class Holding:
    """What one place in the code holds at the peak.

    Attributes:
        category: one of `CATEGORIES`.
        origin: operator that asked for it, and the line, or, where memopt's runtime did, for which of its regions.
        count: of requests.
        size_bytes: of all of them.
    """

    category: str
    origin: str
    count: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Timeline:
    """Allocated memory over one step.

    Attributes:
        moments: bytes by category, in the order of `CATEGORIES`, after each request or return.
        phases: names of the step's phases, with the moment at which each begins.
        peak_at: the moment of the peak allocated.
        holdings: what is alive then, the largest first.
    """

    moments: tuple[tuple[int, ...], ...]
    phases: tuple[tuple[str, int], ...]
    peak_at: int
    holdings: tuple[Holding, ...]

    @property
    def peak_bytes(self) -> int:
        """Peak allocated."""
        return sum(self.moments[self.peak_at])

    @property
    def at_peak(self) -> dict[str, int]:
        """Bytes by category at the peak."""
        return dict(zip(CATEGORIES, self.moments[self.peak_at], strict=True))


def timeline(trace: Trace, step_from: int, expandable_segments: bool = False) -> Timeline:
    """The last step of a trace, which begins with the event `step_from`."""
    categories = categorised(trace)
    places = [CATEGORIES.index(category) for category in categories]
    now = [0] * len(CATEGORIES)
    moments: list[tuple[int, ...]] = []
    step_to = trace.marks[-1][1]
    for index, change in replay(trace, CachingAllocator(expandable_segments)):
        if index == step_to:
            break
        now[places[trace.events[index].number]] += change
        if index >= step_from:
            moments.append(tuple(now))
    peak_at = max(range(len(moments)), key=lambda moment: sum(moments[moment]))
    phases = tuple(
        (name, at - step_from) for name, at in trace.marks if step_from <= at < step_to and name != STEP_ENDS
    )
    holdings = _holdings(trace, step_from, peak_at, expandable_segments, categories)
    return Timeline(tuple(moments), phases, peak_at, holdings)


def categorised(trace: Trace) -> list[str]:
    """A category for each request, by number."""
    given_back = {event.number: index for index, event in enumerate(trace.events) if not event.size_bytes}
    ends = [at for name, at in trace.marks if name == BACKWARD_BEGINS]
    begins = [at for name, at in trace.marks if name == FORWARD_BEGINS]
    forwards = list(zip(begins, ends, strict=True))
    categories = [ACTIVATIONS] * len(trace.origins)
    forward = iter([*forwards, (len(trace.events) + 1, len(trace.events) + 1)])
    begin, end = next(forward, (0, 0))
    for index, event in enumerate(trace.events):
        if not event.size_bytes:
            continue
        while index >= end and end <= len(trace.events):
            begin, end = next(forward)
        outlives = given_back.get(event.number, len(trace.events)) >= end
        in_forward = begin <= index < end or not forwards or index < forwards[0][0]
        categories[event.number] = _category(trace, event.number, in_forward and outlives)
    return categories


def _category(trace: Trace, number: int, outlives_forward: bool) -> str:
    origin = trace.origins[number]
    if number in trace.tags:
        return trace.tags[number]
    if origin.operator.startswith("workspace"):
        return WORKSPACES
    if _is_arena(origin):
        return ARENAS
    return ACTIVATIONS if outlives_forward else SCRATCH


def _is_arena(origin: Origin) -> bool:
    return _is_of_runtime(origin) and origin.operator.startswith(_FACTORIES)


def _is_of_runtime(origin: Origin) -> bool:
    return origin.code is not None and origin.code.co_filename.startswith(_RUNTIME)


def _holdings(
    trace: Trace, step_from: int, peak_at: int, expandable_segments: bool, categories: list[str]
) -> tuple[Holding, ...]:
    sizes: Counter[tuple[str, str]] = Counter()
    counts: Counter[tuple[str, str]] = Counter()
    alive: dict[int, tuple[int, int]] = {}
    for index, change in replay(trace, CachingAllocator(expandable_segments)):
        number = trace.events[index].number
        if change > 0:
            alive[number] = index, change
        elif change < 0:
            del alive[number]
        if index == step_from + peak_at:
            break
    regions = _Regions(trace, step_from)
    for number, (index, size_bytes) in alive.items():
        key = (categories[number], regions.told(trace.origins[number], index))
        sizes[key] += size_bytes
        counts[key] += 1
    return tuple(Holding(*key, counts[key], size_bytes) for key, size_bytes in sizes.most_common())


class _Regions:
    """Those of a step, by when they run. A line of memopt's own tells a user nothing: its region does."""

    def __init__(self, trace: Trace, step_from: int) -> None:
        self._step_from = step_from
        names = dict.fromkeys(name for name, _, _ in trace.regions)
        self._ordinals = {name: ordinal for ordinal, name in enumerate(names, 1)}
        self._ends = sorted((at, name, phase) for name, phase, at in trace.regions)

    def told(self, origin: Origin, index: int) -> str:
        """An origin of the event `index` in words: the region is the first whose forward or backward ends after it."""
        place = bisect_right(self._ends, index, key=itemgetter(0))
        if not _is_of_runtime(origin) or index < self._step_from or place == len(self._ends):
            return str(origin)
        _, name, phase = self._ends[place]
        return f"{origin.operator}  {phase} of memopt's region {self._ordinals[name]}"


def thinned(line: Timeline, count: int) -> Timeline:
    """The same with about `count` moments: of neighbouring ones, the one with most allocated."""
    if len(line.moments) <= count:
        return line
    edges = [round(index * len(line.moments) / count) for index in range(count + 1)]
    kept = [max(range(first, last), key=lambda moment: sum(line.moments[moment])) for first, last in pairwise(edges)]
    at_least = [sum(moment < at for moment in kept) for _, at in line.phases]
    return Timeline(
        tuple(line.moments[moment] for moment in kept),
        tuple((name, moment) for (name, _), moment in zip(line.phases, at_least, strict=True)),
        kept.index(line.peak_at),
        line.holdings,
    )
