"""What a memory plan says of itself."""

from dataclasses import replace

from memopt.ir import MemoryPlan, PlannedLayer

MIB = 2**20

PLAN = MemoryPlan(
    budget_bytes=300 * MIB,
    target="GPU",
    numerics="fast",
    layers=(
        PlannedLayer("block1.norm", 1, "concat", 12 * MIB, 0.0, 5.4e-5, 0.0),
        PlannedLayer("block2.norm", 2, "layer", 0, 6e-5, 0.0, 6e-5),
        PlannedLayer("block2.last", 2, "layer", 0, 2e-5, 0.0, 0.0),
        PlannedLayer("final", 0, "layer", 0, 0.0, 0.0, 0.0),
    ),
    peak_allocated_bytes=280 * MIB + 1,
    largest_peak_bytes=290 * MIB,
    peak_reserved_bytes=295 * MIB,
    seconds=8e-5,
    least_bytes=250 * MIB - 1,
)


def test_a_plan_in_a_sentence() -> None:
    assert PLAN.summary == (
        "Budget 300 MiB on a GPU, numerics fast: levels 1 × concat, 3 × layer; predicted peak allocated 280.0 MiB, "
        "reserved 295.0 MiB, 80 µs of recomputation a step. The least possible budget is 250 MiB, of which 1 % and "
        "2 MiB stay free."
    )


def test_a_plan_without_recomputation_has_no_time_for_it() -> None:
    assert "recomputation" not in replace(PLAN, seconds=0.0).summary


def test_where_workspaces_may_exceed_the_budget_it_says_so() -> None:
    assert "It may reach 301 MiB, beyond the budget" in replace(PLAN, largest_peak_bytes=300 * MIB + 1).summary


def test_a_model_that_stays_as_it_is() -> None:
    plan = replace(PLAN, stays_because="there is room", least_bytes=None, peak_reserved_bytes=None, seconds=0.0)
    assert plan.untouched
    assert plan.summary == (
        "Budget 300 MiB on a GPU, numerics fast: the model stays as it is; predicted peak allocated 280.0 MiB."
    )


def test_where_more_is_reserved_than_the_budget_it_says_what_that_costs() -> None:
    assert "cached memory" not in PLAN.summary
    assert "would have to give cached memory back" in replace(PLAN, peak_reserved_bytes=301 * MIB).summary


def test_layers_say_why_they_have_their_level() -> None:
    between = PlannedLayer("block1.last", 1, "concat", 12 * MIB, 1e-5, 5e-5, 1e-5)
    assert [layer.reason for layer in (*PLAN.layers, between)] == [
        "keeping 12.0 MiB spares 54 µs",
        "keeping more would exceed the budget",
        "keeping more would spare no time",
        "keeping more would spare no time",
        "keeping 12.0 MiB spares 50 µs; keeping more would exceed the budget",
    ]
