"""Lanes: no two values that live at once share one, and there are no more than needed."""

from hypothesis import given
from hypothesis import strategies as st

from memopt.plan.slots import Lifetime, assign_lanes

lifetimes = st.builds(
    lambda start, length, size: Lifetime(start, start + length, size),
    st.integers(0, 30),
    st.integers(0, 10),
    st.integers(1, 1000),
)


@given(st.lists(lifetimes, max_size=25))
def test_values_alive_at_once_have_lanes_of_their_own(wanted: list[Lifetime]) -> None:
    lanes, sizes = assign_lanes(wanted)

    for i, first in enumerate(wanted):
        assert sizes[lanes[i]] >= first.size_bytes
        for j in range(i):
            overlap = first.start <= wanted[j].end and wanted[j].start <= first.end
            assert not (overlap and lanes[i] == lanes[j])


@given(st.lists(lifetimes, max_size=25))
def test_as_few_lanes_as_values_at_the_fullest_instant(wanted: list[Lifetime]) -> None:
    _, sizes = assign_lanes(wanted)

    instants = range(50)
    fullest = max((sum(w.start <= t <= w.end for w in wanted) for t in instants), default=0)
    assert len(sizes) == fullest
