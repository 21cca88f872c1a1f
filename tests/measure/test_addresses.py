from memopt.ir import MIB
from memopt.measure.addresses import HOLES_AT_FIRST, Addresses


def filled() -> Addresses:
    """Nothing is left of the holes at first."""
    addresses = Addresses()
    for _, size_bytes in HOLES_AT_FIRST:
        addresses.take(size_bytes)
    return addresses


def placed(*sizes_mib: int) -> list[int]:
    """Where segments of so many MiB lie, from the first on."""
    addresses = filled()
    taken = [addresses.take(size * MIB) for size in sizes_mib]
    return [(address - taken[0]) // MIB for address in taken]


def test_segments_lie_in_ranges_of_32_mib_each_below_the_ones_before() -> None:
    assert placed(300, 26, 32, 40) == [0, -32, -64, -128]


def test_a_segment_fills_the_lowest_hole_that_it_fits_in() -> None:
    # The ranges end with holes of 20, 4 and 10 MiB.
    assert placed(300, 60, 20, 22, 10, 12) == [0, -64, 300, -96, -74, -128]
    assert placed(300, 22, 10) == [0, -32, -10]


def test_what_is_given_back_is_one_hole_with_what_is_free_beside_it() -> None:
    addresses = filled()
    first, second, third = (addresses.take(20 * MIB) for _ in range(3))
    assert (first - second, second - third) == (32 * MIB, 32 * MIB)
    addresses.give_back(second, 20 * MIB)
    # Free are the end of the third's range and all of the second's, which lies above it.
    assert addresses.take(44 * MIB) == third + 20 * MIB
    assert addresses.take(44 * MIB) == third - 64 * MIB
