"""Where the tensors of a recording lie: those that pass share one buffer; those that are small and kept, another."""

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass
from math import lcm

from memopt.runtime.tape.program import Make, Place, Recording, Run

ALIGNMENT_BYTES = 512
"""As the caching allocator aligns: kernels are compiled for addresses that are multiples of 16."""
SMALL_BYTES = 2**18
"""Kept tensors below this share a buffer; an allocation each would cost more time than the room it saves."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Buffers of a call: first its arguments, then `packed`, `scratch`, and one for each tensor that lies alone.

    Attributes:
        location: of each slot that is used, its buffer and the offset there in bytes.
        packed: number of the buffer of small kept tensors; `scratch`, the next, that of passing ones.
        packed_bytes, scratch_bytes: their sizes.
        zeroed_bytes: from its beginning, so much of `scratch` is zeros when a call begins.
        buffer_count: of all.
        last_use: of each buffer of a tensor that lies alone and passes, the last action that uses it.
    """

    location: dict[int, tuple[int, int]]
    packed: int
    packed_bytes: int
    scratch_bytes: int
    zeroed_bytes: int
    buffer_count: int
    last_use: dict[int, int]

    @property
    def scratch(self) -> int:
        return self.packed + 1


def arrange(recording: Recording) -> Layout:
    """Decide where every slot of a recording lies."""
    used = _uses(recording)
    outputs = {place.slot for place in recording.outputs if place is not None}
    saved = {place.slot for place in recording.saved}
    sizes = recording.sizes_bytes
    packed = len(recording.externals)
    location = {slot: (slot, 0) for slot in range(packed)}
    alone: list[int] = []
    packed_bytes = 0
    passing: dict[int, Span] = {}
    zeros: list[int] = []
    rows = {a.place.slot: _row_bytes(a.place) for a in recording.actions if isinstance(a, Make)}
    for index, action in enumerate(recording.actions):
        for slot in _made(action):
            if slot not in used and slot not in outputs and slot not in saved:
                continue
            first, last = used.get(slot, (index, index))
            if isinstance(action, Run) or slot in outputs or (slot in saved and sizes[slot] > SMALL_BYTES):
                alone.append(slot)
            elif slot in saved:
                location[slot] = (packed, _aligned(packed_bytes, rows[slot]))
                packed_bytes = location[slot][1] + sizes[slot]
            elif action.zeros and sizes[slot] <= SMALL_BYTES:
                zeros.append(slot)
            else:
                passing[slot] = Span(index if action.zeros else first, last, sizes[slot], rows[slot])
    zeroed_bytes = 0
    for slot in zeros:
        location[slot] = (packed + 1, _aligned(zeroed_bytes, rows[slot]))
        zeroed_bytes = location[slot][1] + sizes[slot]
    offsets, scratch_bytes = pack(passing, start_bytes=zeroed_bytes)
    location.update({slot: (packed + 1, offset) for slot, offset in offsets.items()})
    location.update({slot: (packed + 2 + n, 0) for n, slot in enumerate(alone)})
    last_use = {location[s][0]: used[s][1] for s in alone if s in used and s not in outputs and s not in saved}
    return Layout(location, packed, packed_bytes, scratch_bytes, zeroed_bytes, packed + 2 + len(alone), last_use)


@dataclass(frozen=True, slots=True)
class Span:
    """A tensor that passes: alive from action `first` to action `last`, both included.

    Attributes:
        row_bytes: how far apart its rows are. It begins at a multiple of that: kernels tell by a matrix's offset in
            its storage at which column of a row it begins.
    """

    first: int
    last: int
    size_bytes: int
    row_bytes: int = 1


def pack(spans: dict[int, Span], start_bytes: int = 0) -> tuple[dict[int, int], int]:
    """Offsets in one buffer such that no two spans that overlap in time overlap there, and the buffer's size.

    Best fit in order of birth, into what earlier spans have left.

    Args:
        spans: by name.
        start_bytes: of the buffer, that are taken already.
    """
    ends: dict[int, list[int]] = {}
    free: list[tuple[int, int]] = []  # offset and size of gaps, in order, none touching another
    offsets: dict[int, int] = {}
    total = start_bytes
    done = 0
    instants = sorted({span.last for span in spans.values()})
    for name in sorted(spans, key=lambda n: (spans[n].first, n)):
        span = spans[name]
        while done < len(instants) and instants[done] < span.first:
            for dead in ends.pop(instants[done], ()):
                _give_back(free, offsets[dead], max(spans[dead].size_bytes, 1))
            done += 1
        offsets[name], total = _take(free, span, total)
        ends.setdefault(span.last, []).append(name)
    return offsets, total


def _take(free: list[tuple[int, int]], span: Span, total: int) -> tuple[int, int]:
    """An offset for a span, and the size of the buffer then."""
    wanted = max(span.size_bytes, 1)

    def waste(gap: tuple[int, int]) -> int:
        return _aligned(gap[0], span.row_bytes) - gap[0]

    fitting = min(((size, offset) for offset, size in free if size >= wanted + waste((offset, size))), default=None)
    if fitting is None and free and sum(free[-1]) == total:  # the last gap grows
        fitting = free[-1][::-1]
        total = max(total, _aligned(free[-1][0], span.row_bytes) + wanted)
    if fitting is None:
        free.append((total, 0))
        fitting = (0, total)
        total = _aligned(total, span.row_bytes) + wanted
    size, gap = fitting
    free.remove((gap, size))
    offset = _aligned(gap, span.row_bytes)
    for begin, end in ((gap, offset), (offset + wanted, gap + size)):
        if end > begin:
            insort(free, (begin, end - begin))
    return offset, total


def _give_back(free: list[tuple[int, int]], offset: int, size: int) -> None:
    insort(free, (offset, size))
    index = free.index((offset, size))
    if index + 1 < len(free) and offset + size == free[index + 1][0]:
        size += free.pop(index + 1)[1]
        free[index] = (offset, size)
    if index and sum(free[index - 1]) == offset:
        before = free[index - 1]
        free[index - 1 : index + 1] = [(before[0], before[1] + size)]


def _uses(recording: Recording) -> dict[int, tuple[int, int]]:
    """First and last action that reads or writes a slot."""
    spans: dict[int, tuple[int, int]] = {}
    for index, action in enumerate(recording.actions):
        if isinstance(action, Run):
            for slot in (*(place.slot for place in action.places()), *_made(action)):
                spans[slot] = (spans.get(slot, (index, index))[0], index)
    return spans


def _made(action: Make | Run) -> Iterable[int]:
    if isinstance(action, Make):
        return (action.place.slot,)
    return tuple(place.slot for place in action.made if place is not None)


def _row_bytes(place: Place) -> int:
    is_matrix = len(place.size) == 2 and place.stride[0] > 0
    return place.stride[0] * place.dtype.itemsize if is_matrix else 1


def _aligned(offset_bytes: int, row_bytes: int) -> int:
    """The next offset that is a multiple of a row, and of what the caching allocator aligns to."""
    unit = lcm(ALIGNMENT_BYTES, row_bytes)
    return -(-offset_bytes // unit) * unit
