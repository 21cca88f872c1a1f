"""The quickest levels within a budget: as good as trying everything, and better with every byte more."""

from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from memopt.ir import Level
from memopt.plan.choice import Layer, Option, Stage, choose_levels

UNIT = 512
LEVELS: tuple[Level, ...] = ("layer", "concat", "keep")


@st.composite
def stages(draw: st.DrawFn) -> tuple[Stage, ...]:
    found = []
    count = 0
    for _ in range(draw(st.integers(1, 3))):
        layers = []
        for _ in range(draw(st.integers(0, 3))):
            kept, seconds = 0, float(draw(st.integers(0, 20)))
            options = []
            for level in LEVELS[: draw(st.integers(1, 3))]:
                options.append(Option(level, kept * UNIT, seconds))
                kept, seconds = kept + draw(st.integers(0, 5)), seconds - draw(st.integers(0, 8))
            layers.append(Layer(f"layer{count}", tuple(options)))
            count += 1
        needed = {level: UNIT * draw(st.integers(0, 8)) for level in LEVELS}
        found.append(Stage(tuple(layers), needed))
    return tuple(found)


def outcome(tried: tuple[Stage, ...], levels: dict[str, Level]) -> tuple[int, float]:
    """Most that is allocated, and the time: straight from the definitions."""
    held, seconds, most = 0, 0.0, 0
    for stage in tried:
        used = []
        for layer in stage.layers:
            (option,) = (o for o in layer.options if o.level == levels[layer.path])
            held, seconds = held + option.kept_bytes, seconds + option.seconds
            used.append(stage.needed_bytes[option.level])
        most = max(most, held + max(used, default=min(stage.needed_bytes.values())))
    return most, seconds


def best_of_all(tried: tuple[Stage, ...], budget_bytes: int) -> float | None:
    layers = [layer for stage in tried for layer in stage.layers]
    best = None
    for options in product(*(layer.options for layer in layers)):
        levels = {layer.path: option.level for layer, option in zip(layers, options, strict=True)}
        most, seconds = outcome(tried, levels)
        if most <= budget_bytes and (best is None or seconds < best):
            best = seconds
    return best


@settings(max_examples=150, deadline=None)
@given(stages(), st.integers(0, 30))
def test_no_choice_within_the_budget_is_quicker(tried: tuple[Stage, ...], units: int) -> None:
    levels = choose_levels(tried, units * UNIT)
    best = best_of_all(tried, units * UNIT)
    if levels is None:
        assert best is None
        return
    most, seconds = outcome(tried, levels)
    assert most <= units * UNIT
    assert seconds == best


@settings(max_examples=60, deadline=None)
@given(stages())
def test_more_memory_never_costs_time(tried: tuple[Stage, ...]) -> None:
    before = None
    for units in range(40):
        levels = choose_levels(tried, units * UNIT)
        assert levels is not None or before is None, "feasible with less"
        if levels is not None:
            _, seconds = outcome(tried, levels)
            assert before is None or seconds <= before
            before = seconds


def test_memory_is_spent_where_it_spares_most() -> None:
    layers = tuple(
        Layer(f"l{n}", (Option("layer", 0, 2.0 * n), Option("concat", 10 * UNIT, float(n)))) for n in range(1, 6)
    )
    levels = choose_levels((Stage(layers, dict.fromkeys(LEVELS, 0)),), 25 * UNIT)
    assert levels == {"l1": "layer", "l2": "layer", "l3": "layer", "l4": "concat", "l5": "concat"}


def test_what_a_later_region_keeps_is_gone_when_an_earlier_one_runs_backward() -> None:
    options = (Option("layer", 0, 1.0), Option("concat", 10 * UNIT, 0.0))
    first = Stage((Layer("first", options),), dict.fromkeys(LEVELS, 20 * UNIT))
    second = Stage((Layer("second", options),), dict.fromkeys(LEVELS, 0))
    assert choose_levels((first, second), 29 * UNIT) == {"first": "layer", "second": "concat"}
    assert choose_levels((first, second), 30 * UNIT) == {"first": "concat", "second": "concat"}
    assert choose_levels((first, second), 19 * UNIT) is None


def test_deep_nets_take_no_longer_than_their_length() -> None:
    layers = tuple(
        Layer(f"l{n}", (Option("layer", 0, float(n)), Option("concat", 3_000_017 + n, 0.0))) for n in range(300)
    )
    levels = choose_levels((Stage(layers, dict.fromkeys(LEVELS, 0)),), 150 * 3_000_300)
    assert levels is not None
    kept = [n for n in range(300) if levels[f"l{n}"] == "concat"]
    assert len(kept) >= 145
    assert kept == list(range(300 - len(kept), 300))
