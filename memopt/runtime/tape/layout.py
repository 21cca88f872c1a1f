"""Where the tensors of a recording lie: those that pass share one buffer; those that are small and kept, another."""

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass

from memopt.runtime.tape.program import Make, Recording, Run

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
    passing: dict[int, tuple[int, int]] = {}
    zeros: list[int] = []
    for index, action in enumerate(recording.actions):
        for slot in _made(action):
            if slot not in used and slot not in outputs and slot not in saved:
                continue
            first, last = used.get(slot, (index, index))
            if isinstance(action, Run) or slot in outputs or (slot in saved and sizes[slot] > SMALL_BYTES):
                alone.append(slot)
            elif slot in saved:
                location[slot] = (packed, packed_bytes)
                packed_bytes += _aligned(sizes[slot])
            elif action.zeros and sizes[slot] <= SMALL_BYTES:
                zeros.append(slot)
            else:
                passing[slot] = (index if action.zeros else first, last)
    zeroed_bytes = 0
    for slot in zeros:
        location[slot] = (packed + 1, zeroed_bytes)
        zeroed_bytes += _aligned(sizes[slot])
    offsets, passing_bytes = pack({slot: (*span, sizes[slot]) for slot, span in passing.items()})
    location.update({slot: (packed + 1, zeroed_bytes + offset) for slot, offset in offsets.items()})
    location.update({slot: (packed + 2 + n, 0) for n, slot in enumerate(alone)})
    last_use = {location[s][0]: used[s][1] for s in alone if s in used and s not in outputs and s not in saved}
    return Layout(
        location, packed, packed_bytes, zeroed_bytes + passing_bytes, zeroed_bytes, packed + 2 + len(alone), last_use
    )


def pack(spans: dict[int, tuple[int, int, int]]) -> tuple[dict[int, int], int]:
    """Offsets in one buffer such that no two spans that overlap in time overlap there, and the buffer's size.

    Best fit in order of birth, into what earlier spans have left.

    Args:
        spans: by name, the first and the last instant (both included) and the size in bytes.
    """
    ends: dict[int, list[int]] = {}
    free: list[tuple[int, int]] = []  # offset and size of gaps, in order, none touching another
    offsets: dict[int, int] = {}
    total = 0
    done = 0
    instants = sorted({last for _, last, _ in spans.values()})
    for name in sorted(spans, key=lambda n: (spans[n][0], n)):
        first, last, size_bytes = spans[name]
        while done < len(instants) and instants[done] < first:
            for dead in ends.pop(instants[done], ()):
                _give_back(free, offsets[dead], _aligned(spans[dead][2]))
            done += 1
        wanted = _aligned(size_bytes)
        offsets[name], total = _take(free, wanted, total)
        ends.setdefault(last, []).append(name)
    return offsets, total


def _take(free: list[tuple[int, int]], wanted: int, total: int) -> tuple[int, int]:
    """An offset for `wanted` bytes, and the size of the buffer then."""
    fitting = min(((size, offset) for offset, size in free if size >= wanted), default=None)
    if fitting is not None:
        size, offset = fitting
        free.remove((offset, size))
        if size > wanted:
            insort(free, (offset + wanted, size - wanted))
        return offset, total
    if free and sum(free[-1]) == total:  # the last gap grows
        offset, _ = free.pop()
        return offset, offset + wanted
    return total, total + wanted


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


def _aligned(size_bytes: int) -> int:
    return -(-max(size_bytes, 1) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
