"""Lifetimes to lanes: which scratch buffer each passing value lives in.

A lane is one buffer that values of different sizes share one after another, sized for the largest. Lanes are separate
allocations, each of about the size of a block's features: what backward allocates later fits into the same blocks of
the caching allocator. One buffer with offsets would be as small, but leaves a block that nothing else fills.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Lifetime:
    """A buffer of `size_bytes` that is alive from instant `start` to instant `end`, both included."""

    start: int
    end: int
    size_bytes: int


def assign_lanes(lifetimes: list[Lifetime]) -> tuple[list[int], list[int]]:
    """A lane for each lifetime such that no two in one lane overlap, and the size of each lane in bytes.

    First fit in order of birth uses the fewest lanes possible, as for any set of intervals.
    """
    lanes: list[int] = [0] * len(lifetimes)
    free_from: list[int] = []
    sizes: list[int] = []
    for index in sorted(range(len(lifetimes)), key=lambda i: (lifetimes[i].start, i)):
        wanted = lifetimes[index]
        lane = next((n for n, instant in enumerate(free_from) if instant <= wanted.start), len(free_from))
        if lane == len(free_from):
            free_from.append(0)
            sizes.append(0)
        free_from[lane] = wanted.end + 1
        sizes[lane] = max(sizes[lane], wanted.size_bytes)
        lanes[index] = lane
    return lanes, sizes
