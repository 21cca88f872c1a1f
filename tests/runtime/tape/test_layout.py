"""Where the tensors of a tape lie: nothing that is alive at the same time overlaps, and little room is left over."""

from hypothesis import given
from hypothesis import strategies as st

from memopt.runtime.tape.layout import ALIGNMENT_BYTES, pack

SPANS = st.lists(
    st.tuples(st.integers(0, 30), st.integers(0, 10), st.integers(0, 4000)).map(lambda s: (s[0], s[0] + s[1], s[2])),
    max_size=25,
)


def _aligned(size_bytes: int) -> int:
    return -(-max(size_bytes, 1) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


@given(SPANS)
def test_spans_alive_together_do_not_overlap(spans: list[tuple[int, int, int]]) -> None:
    offsets, total = pack(dict(enumerate(spans)))
    for one, (first, last, size) in enumerate(spans):
        assert offsets[one] % ALIGNMENT_BYTES == 0
        assert offsets[one] + size <= total
        for other, (begin, end, extent) in enumerate(spans[:one]):
            if first <= end and begin <= last:
                apart = offsets[one] + size <= offsets[other] or offsets[other] + extent <= offsets[one]
                assert apart or not size or not extent


@given(SPANS)
def test_equal_sizes_leave_no_gap(spans: list[tuple[int, int, int]]) -> None:
    equal = {name: (first, last, 512) for name, (first, last, _) in enumerate(spans)}
    instants = {instant for first, last, _ in equal.values() for instant in (first, last)}
    most = max((sum(f <= i <= last for f, last, _ in equal.values()) for i in instants), default=0)
    assert pack(equal)[1] == 512 * most


def test_a_gap_is_used_again_and_gaps_side_by_side_are_one() -> None:
    spans = {0: (0, 1, 1024), 1: (0, 1, 1024), 2: (0, 9, 512), 3: (2, 9, 2048)}
    offsets, total = pack(spans)
    assert offsets[3] == 0
    assert total == 2560
