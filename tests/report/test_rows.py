from dataclasses import replace

import pytest

from memopt.ir import MemoryPlan
from memopt.measure import CATEGORIES, Comparison, Equivalence, StepFigures, Timeline
from memopt.report.rows import (
    BlockRow,
    FigureRow,
    RejectionRow,
    block_rows,
    category_rows,
    equivalence_line,
    figure_rows,
    not_paying,
    rejection_rows,
    shape_text,
)

MIB = 2**20
OUT = StepFigures(out_of_memory=True)


def test_a_row_for_each_figure_that_there_is() -> None:
    before = StepFigures(100 * MIB, 200 * MIB, 300 * MIB, 50 * MIB, 0, 2.0)
    after = StepFigures(15 * MIB, 400 * MIB, 390 * MIB, 5 * MIB, MIB, 0.5)
    assert figure_rows(before, after) == (
        FigureRow("activation peak", "100.0 MiB", "15.0 MiB", "0.150 ×"),
        FigureRow("saved for backward", "50.0 MiB", "5.00 MiB", "0.100 ×"),
        FigureRow("kept by memopt between steps", "0.0 MiB", "1.00 MiB", "—"),
        FigureRow("peak allocated", "200.0 MiB", "400.0 MiB", "2.00 ×"),
        FigureRow("peak reserved", "300.0 MiB", "390.0 MiB", "1.30 ×"),
        FigureRow("step time", "2.00 s", "500.0 ms", "0.250 ×"),
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        ((12.65, 9.08), ("13 s", "9.1 s", "0.72 ×")),
        ((3.1, 2.98), ("3.1 s", "3.0 s", "0.96 ×")),
        ((125.0, 1.0), ("120 s", "1.0 s", "0.0080 ×")),
        ((0.0994, 0.7312), ("99 ms", "730 ms", "7.4 ×")),
        ((0.001234, 0.1), ("1.2 ms", "100 ms", "81 ×")),
    ],
)
def test_a_rough_time_has_two_digits_and_says_of_how_many_steps_it_is(
    seconds: tuple[float, float], text: tuple[str, ...]
) -> None:
    before, after = (StepFigures(MIB, step_seconds=value, timed_steps=2) for value in seconds)
    assert figure_rows(before, after, rough_time=True) == (
        FigureRow("activation peak", "1.00 MiB", "1.00 MiB", "1.00 ×"),
        FigureRow("step time, median of 2", *text),
    )
    assert figure_rows(OUT, after, rough_time=True)[1] == (
        FigureRow("step time, median of 2", "out of memory", text[1], "—")
    )


def test_figures_that_neither_side_has_are_left_out() -> None:
    rows = figure_rows(StepFigures(activation_peak_bytes=MIB), None)
    assert rows == (FigureRow("activation peak", "1.00 MiB", "—", "—"),)
    assert figure_rows(None, None) == ()
    assert figure_rows(StepFigures(), StepFigures()) == ()


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, "0.0 MiB"), (1, "0.00 MiB"), (MIB // 2, "0.50 MiB"), (10 * MIB, "10.0 MiB"), (12345 * MIB, "12,345.0 MiB")],
)
def test_a_mebibyte_is_two_to_the_twenty(size_bytes: int, text: str) -> None:
    assert figure_rows(StepFigures(size_bytes), None)[0].before == text


def test_out_of_memory_is_said_and_has_no_ratio() -> None:
    rows = figure_rows(OUT, StepFigures(MIB, step_seconds=1.0))
    assert rows == (
        FigureRow("activation peak", "out of memory", "1.00 MiB", "—"),
        FigureRow("step time", "out of memory", "1.00 s", "—"),
    )
    assert figure_rows(OUT, OUT) == (FigureRow("training step", "out of memory", "out of memory", "—"),)
    assert figure_rows(OUT, None) == (FigureRow("training step", "out of memory", "—", "—"),)


@pytest.mark.parametrize("measured", [False, True])
def test_where_the_peak_is_not_lower_it_is_said(comparison: Comparison, measured: bool) -> None:
    changes = {side: StepFigures(peak_allocated_bytes=25 * MIB) for side in ("before", "predicted_before")}
    changes |= {side: StepFigures(peak_allocated_bytes=20 * MIB) for side in ("after", "predicted_after")}
    pays = replace(comparison, **changes)
    assert not_paying(pays) == ()
    after = "after" if measured else "predicted_after"
    worse = replace(pays, **{after: StepFigures(peak_allocated_bytes=25 * MIB)})
    source = "Measured on the CPU" if measured else "Predicted for a GPU"
    assert not_paying(worse) == (
        f"{source}, memopt does not pay: the peak allocated is 25.0 MiB with it and 25.0 MiB without. Leave the model "
        "as it is, or try a larger input.",
    )
    hardly = replace(pays, **{after: StepFigures(peak_allocated_bytes=25 * MIB - 20_000)})
    assert not_paying(hardly) == not_paying(worse), "where the figures look the same"
    assert not_paying(replace(worse, **{after: StepFigures(out_of_memory=True)})) == ()
    assert not_paying(replace(worse, **{after: None})) == ()
    plan = MemoryPlan(30 * MIB, "GPU", "exact", (), 25 * MIB, 25 * MIB, None, 0.0)
    assert not_paying(replace(worse, plan=plan)) == (), "a budget may be filled on purpose"
    assert not_paying(replace(worse, explanation=replace(worse.explanation, chains=()))) == ()


def test_chains_are_counted_by_block(make_chain) -> None:
    chains = [
        make_chain(0, 1, reason="lost"),
        make_chain(2, 1),
        make_chain(1, 1),
        make_chain(1, 2, reason="no"),
        replace(make_chain(1, 3, "exit"), level="concat"),
    ]
    assert block_rows(chains) == (
        BlockRow(1, layers=2, layers_rewritten=1, exits=1, exits_rewritten=1, levels=("concat", "layer")),
        BlockRow(2, layers=1, layers_rewritten=1, exits=0, exits_rewritten=0, levels=("layer",)),
        BlockRow(0, layers=1, layers_rewritten=0, exits=0, exits_rewritten=0, levels=()),
    )


def test_rejections_are_grouped_by_reason(make_chain) -> None:
    chains = [
        make_chain(1, 1, reason="rare"),
        make_chain(1, 2),
        replace(make_chain(2, 1, reason="usual"), source=""),
        replace(make_chain(2, 2, reason="usual"), source="", module=""),
        replace(make_chain(2, 3), action="rejected"),
    ]
    assert rejection_rows(chains) == (
        RejectionRow("usual", 2, "cat_2_1 (block2.layer1.norm1), cat_2_2"),
        RejectionRow("rare", 1, "cat_1_1 (model.py:53)"),
        RejectionRow("no reason given", 1, "cat_2_3 (model.py:53)"),
    )


def test_equivalence_in_a_sentence(passed: Equivalence) -> None:
    line = equivalence_line(passed)
    assert line == "Equivalent: outputs, gradients and buffers are bit-identical over 3 optimiser steps."
    excused = replace(passed, skipped=("gradient of a",))
    assert equivalence_line(excused) == (
        "Equivalent: all results that eager repeats are bit-identical over 3 optimiser steps."
    )
    failed = replace(
        passed,
        passed=False,
        gradients_equal=False,
        buffers_equal=False,
        steps=1,
        differing=("gradient of a", "gradient of b", "buffer c", "buffer d"),
    )
    assert equivalence_line(failed) == (
        "NOT EQUIVALENT: gradients and buffers differ over 1 optimiser step "
        "(gradient of a, gradient of b, buffer c and 1 more)."
    )
    unrepeated = replace(passed, passed=False, skipped=("output 0", "buffer c"))
    assert equivalence_line(unrepeated) == (
        "NOT SHOWN EQUIVALENT: eager itself does not repeat 2 results over 3 optimiser steps."
    )


def test_shapes() -> None:
    assert shape_text((64, 3, 32, 32)) == "64x3x32x32"


def test_the_categories_of_a_predicted_peak() -> None:
    def line(**sizes_mib: int) -> Timeline:
        return Timeline((tuple(sizes_mib.get(name, 0) * MIB for name in CATEGORIES),), (), 0, ())

    assert category_rows(line(activations=400, scratch=5), line(activations=100, arenas=20)) == (
        FigureRow("arenas", "0.0 MiB", "20.0 MiB", "—"),
        FigureRow("activations", "400.0 MiB", "100.0 MiB", "0.250 ×"),
        FigureRow("scratch", "5.00 MiB", "0.0 MiB", "0.000 ×"),
    )
    hardly = category_rows(line(gradients=3, activations=4000), line(gradients=8, activations=100))
    assert hardly[0] == FigureRow("gradients", "3.00 MiB", "8.00 MiB", "—")
    same = category_rows(line(parameters=3, activations=4000), line(parameters=3, activations=100))
    assert same[0] == FigureRow("parameters", "3.00 MiB", "3.00 MiB", "1.00 ×")
    assert category_rows(line(scratch=5), None) == (FigureRow("scratch", "5.00 MiB", "—", "—"),)
    assert category_rows(None, None) == ()
