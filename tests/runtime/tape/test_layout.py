"""Where the tensors of a tape lie: nothing that is alive at the same time overlaps, and little room is left over."""

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from memopt.runtime.tape import described, record
from memopt.runtime.tape.layout import ALIGNMENT_BYTES, Span, arrange, pack
from memopt.runtime.tape.program import Make

SPANS = st.lists(
    st.builds(
        lambda first, life, size_bytes, row_bytes: Span(first, first + life, size_bytes, row_bytes),
        st.integers(0, 30),
        st.integers(0, 10),
        st.integers(0, 4000),
        st.sampled_from((1, 48, 960, 1024)),
    ),
    max_size=25,
)


@given(SPANS, st.integers(0, 2000))
def test_spans_alive_together_do_not_overlap(spans: list[Span], start_bytes: int) -> None:
    offsets, total = pack(dict(enumerate(spans)), start_bytes)
    for one, span in enumerate(spans):
        assert offsets[one] % ALIGNMENT_BYTES == 0
        assert offsets[one] % span.row_bytes == 0
        assert start_bytes <= offsets[one] <= offsets[one] + span.size_bytes <= total
        for other, earlier in enumerate(spans[:one]):
            if span.first <= earlier.last and earlier.first <= span.last:
                ends = offsets[one] + span.size_bytes, offsets[other] + earlier.size_bytes
                apart = ends[0] <= offsets[other] or ends[1] <= offsets[one]
                assert apart or not span.size_bytes or not earlier.size_bytes


@given(SPANS)
def test_equal_sizes_leave_no_gap(spans: list[Span]) -> None:
    equal = {name: Span(span.first, span.last, 512) for name, span in enumerate(spans)}
    instants = {instant for span in spans for instant in (span.first, span.last)}
    most = max((sum(s.first <= i <= s.last for s in spans) for i in instants), default=0)
    assert pack(equal)[1] == 512 * most


def test_a_gap_is_used_again_and_gaps_side_by_side_are_one() -> None:
    spans = {0: Span(0, 1, 1024), 1: Span(0, 1, 1024), 2: Span(0, 9, 512), 3: Span(2, 9, 2048)}
    offsets, total = pack(spans)
    assert offsets[3] == 0
    assert total == 2560


def test_a_matrix_begins_with_a_whole_row_of_its_storage() -> None:
    """Kernels read beyond an interval's last channel where the row goes on, which they tell by the offset."""

    def make(tensors: list[torch.Tensor]) -> Any:
        x, before = tensors[0], torch.zeros(3)
        kept, passing = torch.zeros(5, 48)[:, 3:], torch.zeros(5, 240)[:, 100:]
        large = torch.empty(2000, 144)[:, :130].copy_(x[:1, :1])
        passing.add_(large[:5, :1])
        return [passing.sum()], [before, kept.add_(1.0)]

    recording = record(make, [described(torch.zeros(7, 1))])
    layout = arrange(recording)
    checked = 0
    for action in recording.actions:
        if isinstance(action, Make) and len(action.place.size) == 2:
            _, offset_bytes = layout.location[action.place.slot]
            assert offset_bytes % (action.place.stride[0] * action.place.dtype.itemsize) == 0
            checked += offset_bytes > 0
    assert checked >= 2
