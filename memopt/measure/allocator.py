"""A model of the CUDA caching allocator: what it reserves for what it is asked for, without a device.

The rules and constants are those of `DeviceCachingAllocator` in PyTorch's `c10/cuda/CUDACachingAllocator.cpp` with its
default settings: one stream, no limit on splitting, no garbage collection.

Note: [Where memory is lost]
A request takes the smallest free block that it fits in. What is left of that block is split off and can be used again,
except where it is small beside the block (up to 1 MiB of a large one): then it is handed out with it and counts as
allocated. Free blocks of one segment that touch become one; blocks of different segments never do. What no request
fits into stays reserved, and only that makes reserved larger than allocated. Where the device is full, free segments
are given back before one is taken (`release_cached_blocks`); a step runs out of memory where that does not suffice.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from memopt.ir import MIB
from memopt.measure.addresses import Addresses

MIN_BLOCK_BYTES = 512
"""Requests are rounded up to multiples of this."""

SMALL_REQUEST_BYTES = MIB
"""Largest request that the pool of small blocks serves."""

SMALL_SEGMENT_BYTES = 2 * MIB
"""What is taken from the device for small blocks."""

LARGE_SEGMENT_BYTES = 20 * MIB
"""What is taken from the device for large requests below `OWN_SEGMENT_BYTES`."""

OWN_SEGMENT_BYTES = 10 * MIB
"""Requests from here on get a segment of their own size, rounded up to multiples of `SEGMENT_ROUNDING_BYTES`."""

SEGMENT_ROUNDING_BYTES = 2 * MIB

_Free = tuple[int, int, "Block"]


class Block:
    """Neighbouring bytes of one segment, handed out or free.

    Attributes:
        address: of its first byte; a segment's begin where no other segment's end.
        size_bytes: what it takes of its segment.
        segment: where it lies.
        owner: whatever `allocate` was told; None while free.
        is_free: not handed out.
    """

    __slots__ = ("address", "following", "is_free", "owner", "previous", "segment", "size_bytes")

    def __init__(self, address: int, size_bytes: int, segment: "Segment", previous: "Block | None") -> None:
        self.address = address
        self.size_bytes = size_bytes
        self.segment = segment
        self.previous = previous
        self.following: Block | None = None
        self.owner: Any = None
        self.is_free = True


class Segment:
    """Memory taken from the device in one piece, or one that grows.

    Attributes:
        number: segments are counted in the order in which they were taken.
        is_small: of the pool of small blocks.
        first: the block at its beginning.
    """

    __slots__ = ("first", "is_small", "number", "size_bytes")

    def __init__(self, number: int, address: int, size_bytes: int, is_small: bool) -> None:
        self.number = number
        self.size_bytes = size_bytes
        self.is_small = is_small
        self.first = Block(address, size_bytes, self, None)

    def blocks(self) -> Iterator[Block]:
        """Its blocks from the beginning to the end."""
        block: Block | None = self.first
        while block is not None:
            yield block
            block = block.following


class _Pool:
    """Free blocks of one kind, smallest first and then by address."""

    def __init__(self, is_small: bool) -> None:
        self.is_small = is_small
        self.free: list[_Free] = []
        # With expandable segments: the one segment, which grows at its end.
        self.growing: Segment | None = None

    def add(self, block: Block) -> None:
        insort(self.free, (block.size_bytes, block.address, block))

    def discard(self, block: Block) -> None:
        place = bisect_left(self.free, (block.size_bytes, block.address))
        assert self.free[place][2] is block
        del self.free[place]

    def take(self, size_bytes: int) -> Block | None:
        """The smallest free block of at least this size, no longer free."""
        place = bisect_left(self.free, (size_bytes,))
        # The end of a growing segment counts as large as it could become: any other that fits is preferred.
        if self.growing is not None and place + 1 < len(self.free) and self.free[place][2].following is None:
            place += 1
        if place == len(self.free):
            return None
        return self.free.pop(place)[2]


@dataclass(frozen=True, slots=True)
class BlockView:
    """A block as it was at one moment: its size, and its owner or None where it was free."""

    size_bytes: int
    owner: Any


@dataclass(frozen=True, slots=True)
class SegmentView:
    """A segment as it was at one moment.

    Attributes:
        number: segments are counted in the order in which they were taken.
        size_bytes: reserved.
        is_small: of the pool of small blocks.
        blocks: from its beginning to its end.
    """

    number: int
    size_bytes: int
    is_small: bool
    blocks: tuple[BlockView, ...]

    @property
    def free_bytes(self) -> int:
        """Reserved, but not handed out."""
        return sum(block.size_bytes for block in self.blocks if block.owner is None)


class CachingAllocator:
    """Serves requests as the CUDA caching allocator would, and counts.

    Args:
        expandable_segments: as with `PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True`: one segment a pool, grown by
            whole pages, always split.
        capacity_bytes: what the device has; None for one that never runs full. With expandable segments nothing is
            given back.

    Attributes:
        allocated_bytes: handed out now, in whole blocks.
        reserved_bytes: taken from the device; more than it has where that did not suffice.
        peak_reserved_bytes: most that was taken at a time.
        peak_allocated_bytes: most handed out since `reset_peak`.
    """

    def __init__(self, expandable_segments: bool = False, capacity_bytes: int | None = None) -> None:
        self.expandable_segments = expandable_segments
        self.capacity_bytes = capacity_bytes
        self.allocated_bytes = 0
        self.reserved_bytes = 0
        self.peak_reserved_bytes = 0
        self.peak_allocated_bytes = 0
        self._small, self._large = _Pool(is_small=True), _Pool(is_small=False)
        self._segments: dict[int, Segment] = {}
        self._taken = 0
        self._addresses = Addresses()

    def allocate(self, size_bytes: int, owner: Any = True) -> Block:
        """A block for a request of at least one byte.

        Args:
            size_bytes: asked for.
            owner: kept with the block, to be seen in `segments`; not None.
        """
        assert size_bytes > 0
        assert owner is not None
        rounded_bytes = -(-size_bytes // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES
        pool = self._small if rounded_bytes <= SMALL_REQUEST_BYTES else self._large
        block = pool.take(rounded_bytes) or self._taken_from_device(pool, rounded_bytes)
        if self._splits(pool, block.size_bytes - rounded_bytes):
            pool.add(_split(block, rounded_bytes))
        block.is_free, block.owner = False, owner
        self.allocated_bytes += block.size_bytes
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)
        return block

    def free(self, block: Block) -> None:
        """Takes a block back and joins it with free neighbours."""
        assert not block.is_free
        self.allocated_bytes -= block.size_bytes
        pool = self._small if block.segment.is_small else self._large
        block.is_free, block.owner = True, None
        if block.following is not None and block.following.is_free:
            pool.discard(block.following)
            _join(block)
        if block.previous is not None and block.previous.is_free:
            block = block.previous
            pool.discard(block)
            _join(block)
        pool.add(block)

    def reset_peak(self) -> None:
        """Start a new peak from what is handed out now."""
        self.peak_allocated_bytes = self.allocated_bytes

    def segments(self) -> tuple[SegmentView, ...]:
        """Everything reserved, as it is now."""
        return tuple(
            SegmentView(
                segment.number,
                segment.size_bytes,
                segment.is_small,
                tuple(BlockView(block.size_bytes, block.owner) for block in segment.blocks()),
            )
            for segment in self._segments.values()
        )

    def _splits(self, pool: _Pool, rest_bytes: int) -> bool:
        if pool.is_small or self.expandable_segments:
            return rest_bytes >= MIN_BLOCK_BYTES
        return rest_bytes > SMALL_REQUEST_BYTES

    def _taken_from_device(self, pool: _Pool, size_bytes: int) -> Block:
        if self.expandable_segments and pool.growing is not None:
            return self._grown(pool, pool.growing, size_bytes)
        taken_bytes = _segment_bytes(pool, size_bytes)
        if self.expandable_segments:
            page_bytes = _page_bytes(pool)
            taken_bytes = -(-size_bytes // page_bytes) * page_bytes
        elif self.capacity_bytes is not None and self.reserved_bytes + taken_bytes > self.capacity_bytes:
            self._give_back()
        # One that grows has addresses for all of the device.
        address = self._addresses.take(2**50 if self.expandable_segments else taken_bytes)
        segment = Segment(self._taken, address, taken_bytes, pool.is_small)
        self._taken += 1
        self._segments[segment.number] = segment
        self._reserve(taken_bytes)
        pool.growing = segment if self.expandable_segments else None
        return segment.first

    def _grown(self, pool: _Pool, segment: Segment, size_bytes: int) -> Block:
        """The free end of a segment, made large enough by whole pages."""
        *_, last = segment.blocks()
        if last.is_free:
            pool.discard(last)
        else:
            last.following = Block(last.address + last.size_bytes, 0, segment, last)
            last = last.following
        page_bytes = _page_bytes(pool)
        taken_bytes = -(-(size_bytes - last.size_bytes) // page_bytes) * page_bytes
        last.size_bytes += taken_bytes
        segment.size_bytes += taken_bytes
        self._reserve(taken_bytes)
        return last

    def _reserve(self, taken_bytes: int) -> None:
        self.reserved_bytes += taken_bytes
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)

    def _give_back(self) -> None:
        """All segments of which nothing is handed out."""
        for pool in (self._small, self._large):
            for _, _, block in list(pool.free):
                if block.previous is None and block.following is None:
                    pool.discard(block)
                    del self._segments[block.segment.number]
                    self._addresses.give_back(block.address, block.size_bytes)
                    self.reserved_bytes -= block.size_bytes


def _segment_bytes(pool: _Pool, size_bytes: int) -> int:
    """What is taken from the device for a request."""
    if pool.is_small:
        return SMALL_SEGMENT_BYTES
    if size_bytes < OWN_SEGMENT_BYTES:
        return LARGE_SEGMENT_BYTES
    return -(-size_bytes // SEGMENT_ROUNDING_BYTES) * SEGMENT_ROUNDING_BYTES


def _page_bytes(pool: _Pool) -> int:
    return SMALL_SEGMENT_BYTES if pool.is_small else LARGE_SEGMENT_BYTES


def _split(block: Block, size_bytes: int) -> Block:
    """Cuts a block down to `size_bytes`; the rest as a block."""
    rest = Block(block.address + size_bytes, block.size_bytes - size_bytes, block.segment, block)
    rest.following = block.following
    if rest.following is not None:
        rest.following.previous = rest
    block.following, block.size_bytes = rest, size_bytes
    return rest


def _join(block: Block) -> None:
    """A block takes in the one that follows it."""
    eaten = block.following
    assert eaten is not None
    block.size_bytes += eaten.size_bytes
    block.following = eaten.following
    if block.following is not None:
        block.following.previous = block
