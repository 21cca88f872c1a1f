import random

import pytest

from memopt.ir import MIB
from memopt.measure.allocator import CachingAllocator, SegmentView


def sizes(segment: SegmentView) -> list[tuple[int, bool]]:
    return [(block.size_bytes, block.owner is not None) for block in segment.blocks]


def test_requests_are_rounded_up_to_512_bytes() -> None:
    allocator = CachingAllocator()
    allocator.allocate(1)
    allocator.allocate(513)
    assert allocator.allocated_bytes == 512 + 1024


@pytest.mark.parametrize(
    ("request_bytes", "reserved_bytes"),
    [
        (1, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 1, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (10 * MIB + 1, 12 * MIB),
        (33 * MIB, 34 * MIB),
    ],
)
def test_what_a_request_takes_from_the_device(request_bytes: int, reserved_bytes: int) -> None:
    allocator = CachingAllocator()
    allocator.allocate(request_bytes)
    assert allocator.reserved_bytes == reserved_bytes


def test_small_requests_share_a_segment_and_large_ones_never_use_it() -> None:
    allocator = CachingAllocator()
    for _ in range(2):
        allocator.allocate(MIB)
    assert allocator.reserved_bytes == 2 * MIB
    allocator.allocate(512)
    assert allocator.reserved_bytes == 4 * MIB
    allocator.allocate(MIB + 512)
    assert allocator.reserved_bytes == 24 * MIB


def test_a_rest_of_at_most_one_mib_stays_with_a_large_block_and_counts_as_allocated() -> None:
    allocator = CachingAllocator()
    block = allocator.allocate(11 * MIB)
    assert (block.size_bytes, allocator.allocated_bytes) == (12 * MIB, 12 * MIB)
    block = allocator.allocate(11 * MIB - 512)
    assert block.size_bytes == 11 * MIB - 512
    assert sizes(allocator.segments()[1]) == [(11 * MIB - 512, True), (MIB + 512, False)]


def test_the_smallest_block_that_fits_is_taken() -> None:
    allocator = CachingAllocator()
    large, small, _ = (allocator.allocate(n * MIB) for n in (60, 40, 80))
    allocator.free(large)
    allocator.free(small)
    assert allocator.allocate(30 * MIB).segment is small.segment
    assert allocator.allocate(41 * MIB).segment is large.segment
    assert allocator.reserved_bytes == 180 * MIB


def test_of_equal_blocks_the_one_with_the_lowest_address_is_taken_which_is_the_newest() -> None:
    allocator = CachingAllocator()
    blocks = [allocator.allocate(300 * MIB) for _ in range(3)]
    for block in blocks:
        allocator.free(block)
    assert allocator.allocate(300 * MIB).segment is blocks[2].segment


def test_what_is_given_back_leaves_its_address_free() -> None:
    allocator = CachingAllocator(capacity_bytes=220 * MIB)
    first = allocator.allocate(200 * MIB)
    allocator.free(first)
    assert allocator.allocate(210 * MIB).address == first.address


def test_free_neighbours_join_but_not_across_segments() -> None:
    allocator = CachingAllocator()
    whole = allocator.allocate(60 * MIB)
    allocator.free(whole)
    parts = [allocator.allocate(20 * MIB) for _ in range(3)]
    assert allocator.reserved_bytes == 60 * MIB
    for part in (parts[0], parts[2], parts[1]):
        allocator.free(part)
    assert sizes(allocator.segments()[0]) == [(60 * MIB, False)]
    allocator.allocate(30 * MIB)
    allocator.allocate(40 * MIB)
    assert allocator.reserved_bytes == 60 * MIB + 40 * MIB


def test_growing_requests_fragment_and_expandable_segments_do_not() -> None:
    reserved_bytes = []
    for expandable in (False, True):
        allocator = CachingAllocator(expandable)
        for size in range(100, 200, 10):
            allocator.free(allocator.allocate(size * MIB))
        reserved_bytes.append(allocator.reserved_bytes)
    assert reserved_bytes == [sum(range(100, 200, 10)) * MIB, 200 * MIB]


def test_an_expandable_segment_grows_by_pages_and_prefers_a_hole_to_its_end() -> None:
    allocator = CachingAllocator(expandable_segments=True)
    first = allocator.allocate(30 * MIB)
    second = allocator.allocate(5 * MIB)
    assert allocator.reserved_bytes == 40 * MIB
    allocator.free(first)
    # The end (5 MiB) is the smaller block that fits, but could be as large as the device.
    assert allocator.allocate(4 * MIB).address == first.address
    assert allocator.allocate(30 * MIB).address == second.address + second.size_bytes
    assert allocator.reserved_bytes == 80 * MIB


def test_peak_starts_again_from_what_is_handed_out() -> None:
    allocator = CachingAllocator()
    kept, dropped = allocator.allocate(512), allocator.allocate(1024)
    allocator.free(dropped)
    assert allocator.peak_allocated_bytes == 1536
    allocator.reset_peak()
    assert allocator.peak_allocated_bytes == kept.size_bytes == 512


@pytest.mark.parametrize("expandable", [False, True])
def test_blocks_tile_their_segments_whatever_is_asked_for(expandable: bool) -> None:
    draw = random.Random(0)
    allocator = CachingAllocator(expandable)
    held = []
    for number in range(2000):
        if held and draw.random() < 0.5:
            allocator.free(held.pop(draw.randrange(len(held))))
        else:
            held.append(allocator.allocate(draw.choice((1, 3000, MIB, 3 * MIB, 12 * MIB, 47 * MIB)), number))
    segments = allocator.segments()
    blocks = [block for segment in segments for block in segment.blocks]
    assert all(sum(block.size_bytes for block in segment.blocks) == segment.size_bytes for segment in segments)
    assert sum(block.size_bytes for block in blocks) == allocator.reserved_bytes
    assert sum(block.size_bytes for block in blocks if block.owner is not None) == allocator.allocated_bytes
    assert {block.owner for block in blocks} - {None} == {block.owner for block in held}
    for segment in segments:
        pairs = zip(segment.blocks, segment.blocks[1:], strict=False)
        assert not any(one.owner is None and other.owner is None for one, other in pairs)
    for block in held:
        allocator.free(block)
    assert allocator.allocated_bytes == 0
    assert all(len(segment.blocks) == 1 for segment in allocator.segments())


def test_a_full_device_gives_free_segments_back() -> None:
    allocator = CachingAllocator(capacity_bytes=100 * MIB)
    free, kept, small = allocator.allocate(30 * MIB), allocator.allocate(40 * MIB), allocator.allocate(512)
    allocator.free(free)
    allocator.free(small)
    allocator.allocate(58 * MIB)  # 72 MiB are reserved, of which 40 are in use
    assert (allocator.reserved_bytes, allocator.peak_reserved_bytes) == (98 * MIB, 98 * MIB)
    assert [segment.size_bytes for segment in allocator.segments()] == [40 * MIB, 58 * MIB]
    assert kept.segment.number != allocator.allocate(2 * MIB).segment.number, "numbers are not given twice"
    assert allocator.reserved_bytes > 100 * MIB, "nothing was left to give back"


def test_what_is_partly_in_use_is_not_given_back() -> None:
    allocator = CachingAllocator(capacity_bytes=100 * MIB)
    whole = allocator.allocate(60 * MIB)
    allocator.free(whole)
    allocator.allocate(20 * MIB)
    allocator.allocate(50 * MIB)
    assert allocator.peak_reserved_bytes == 110 * MIB


def test_while_there_is_room_nothing_is_given_back() -> None:
    allocator, endless = CachingAllocator(capacity_bytes=200 * MIB), CachingAllocator()
    for one in (allocator, endless):
        for size in (20, 30, 40, 50, 60):
            one.free(one.allocate(size * MIB))
    assert allocator.segments() == endless.segments()
    assert allocator.reserved_bytes == 200 * MIB
