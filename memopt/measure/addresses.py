"""Where a device's driver puts what the caching allocator takes from it.

Of free blocks of one size the allocator takes the one with the lowest address, so what is reserved depends on where
the device's driver puts segments. That is not written down anywhere; the addresses of fresh processes (CUDA 13.0 on an
H200, printed by `tests/bench/allocations.py`) follow one rule. The driver reserves addresses in ranges of whole 32 MiB,
each below those before it, and puts a segment at the lowest place that it fits in, at the beginning of a new range
where there is none. Before the first segment there are some holes between what CUDA's own libraries hold.
"""

from bisect import insort

from memopt.ir import MIB

ADDRESS_RANGE_BYTES = 32 * MIB
"""Addresses are reserved in multiples of this."""

HOLES_AT_FIRST = ((-350 * MIB, 32 * MIB), (-254 * MIB, 254 * MIB), (0, 2 * MIB), (74 * MIB, 24 * MIB))
"""Address, from where a process's first segment lies, and size of what is free among what CUDA's libraries hold."""


class Addresses:
    """The addresses of one device, as a process finds them."""

    def __init__(self) -> None:
        self._holes = list(HOLES_AT_FIRST)  # by address
        self._lowest = HOLES_AT_FIRST[0][0] // ADDRESS_RANGE_BYTES * ADDRESS_RANGE_BYTES

    def take(self, size_bytes: int) -> int:
        """The address of so many bytes, no longer free."""
        for place, (address, hole_bytes) in enumerate(self._holes):
            if hole_bytes >= size_bytes:
                self._holes[place : place + 1] = _hole(address + size_bytes, hole_bytes - size_bytes)
                return address
        range_bytes = -(-size_bytes // ADDRESS_RANGE_BYTES) * ADDRESS_RANGE_BYTES
        self._lowest -= range_bytes
        self._holes[:0] = _hole(self._lowest + size_bytes, range_bytes - size_bytes)
        return self._lowest

    def give_back(self, address: int, size_bytes: int) -> None:
        """Make them free."""
        insort(self._holes, (address, size_bytes))
        joined: list[tuple[int, int]] = []
        for begin, hole_bytes in self._holes:
            if joined and sum(joined[-1]) == begin:
                begin, hole_bytes = joined[-1][0], joined.pop()[1] + hole_bytes
            joined.append((begin, hole_bytes))
        self._holes = joined


def _hole(address: int, size_bytes: int) -> list[tuple[int, int]]:
    return [(address, size_bytes)] if size_bytes else []
