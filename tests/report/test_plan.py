"""A memory budget's levels, block by block."""

import io
from dataclasses import replace

import pytest

from memopt.ir import Level, MemoryPlan, PlannedLayer
from memopt.measure import Comparison
from memopt.report import print_comparison
from memopt.report.plan import PlanRow, plan_legend, plan_rows

MIB = 2**20


def layer(block: int, level: Level) -> PlannedLayer:
    """One that can keep 2 MiB and spare 50 µs, twice that at level "keep"."""
    factor = ("layer", "concat", "keep").index(level)
    again = (2 - factor) * 5e-5
    return PlannedLayer("norm", block, level, factor * 2 * MIB, again, factor * 5e-5, again)


@pytest.fixture
def plan() -> MemoryPlan:
    """Of a model whose second block is left and entered again, as a U-shaped one's are."""
    first = [layer(1, level) for level in ("layer", "layer", "concat", "layer", "concat", "concat")]
    rest = [layer(2, "keep"), layer(0, "layer"), layer(3, "concat"), layer(2, "keep")]
    return MemoryPlan(300 * MIB, "GPU", "fast", (*first, *rest), 280 * MIB, 280 * MIB, None, 5e-4)


def test_every_block_is_said_once_in_order_with_a_row_for_each_level(plan: MemoryPlan) -> None:
    assert plan_rows(plan) == (
        PlanRow("1", "1–2, 4", "layer", "—", "—", "0.3 ms"),
        PlanRow("", "3, 5–6", "concat", "6.00 MiB", "0.2 ms", "0.2 ms"),
        PlanRow("2", "1–2", "keep", "8.00 MiB", "0.2 ms", "—"),
        PlanRow("3", "1", "concat", "2.00 MiB", "50 µs", "50 µs"),
        PlanRow("none", "1", "layer", "—", "—", "0.1 ms"),
    )


def test_the_legend_explains_the_levels_that_occur(plan: MemoryPlan) -> None:
    assert plan_legend(plan) == (
        'Level "layer" keeps the features alone, "concat" keeps the bottleneck outputs too, "keep" keeps what eager '
        "keeps. Kept is counted beside the features; times are of one step, predicted for a GPU. "
        'Time spared is against level "layer".'
    )
    assert plan_legend(replace(plan, layers=plan.layers[:1])).startswith('Level "layer" keeps the features alone. Kept')


def test_the_legend_says_why_room_is_left(plan: MemoryPlan) -> None:
    why = "Layers that keep less than there is room for would spare no time by keeping more."
    assert why not in plan_legend(plan)
    assert plan_legend(replace(plan, layers=(replace(plan.layers[0], sparable_seconds=0.0),))).endswith(why)


def test_the_report_has_the_table_and_its_legend(comparison: Comparison, plan: MemoryPlan) -> None:
    def printed(plan: MemoryPlan) -> str:
        file = io.StringIO()
        print_comparison(replace(comparison, plan=plan), "model.py:Net", file, 120)
        return file.getvalue()

    assert "dense block   chains   level" in printed(plan)
    assert plan_legend(plan).split(";")[0] in " ".join(printed(plan).split())
    assert "Kept is counted" not in printed(replace(plan, layers=()))
