"""A memory budget: steps stay within it, more memory never costs time, numbers stay the same."""

import copy
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import memopt
from densenet_models import bc
from memopt.budget import planner
from memopt.measure import StorageTracker
from memopt.measure.step import TrainingStep
from memopt.plan.choice import Layer, Option, Stage
from tests.helpers import assert_same, dense_net, images, train_step

MIB = 2**20


def small() -> nn.Module:
    torch.manual_seed(0)
    return bc.DenseNet(depth=22)


def batch(size: int = 64) -> torch.Tensor:
    return torch.randn(size, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def within(budget: int | str, numerics: Any) -> memopt.MemoryPlan:
    comparison = memopt.compare(
        small,
        batch(),
        config=memopt.Config(numerics=numerics, memory_budget=budget),
        measure=False,
        device=torch.device("cpu"),
    )
    plan, predicted = comparison.plan, comparison.predicted_after or comparison.predicted_before
    assert plan is not None
    assert predicted is not None
    assert comparison.equivalence.passed
    assert predicted.peak_allocated_bytes == plan.peak_allocated_bytes, "what is reported is predicted by itself"
    return plan


def least(numerics: Any) -> int:
    """As the message of an impossible budget says, in bytes."""
    with pytest.raises(memopt.BudgetError, match=r"1% and 2 MiB left free.*smaller batch") as caught:
        within("1MiB", numerics)
    found = re.search(r"within is ([\d,]+) MiB", str(caught.value))
    assert found is not None
    said = int(found[1].replace(",", "")) * MIB
    assert caught.value.least_bytes is not None
    assert said - MIB < caught.value.least_bytes <= said
    return caught.value.least_bytes


@pytest.mark.parametrize(("numerics", "points"), [("exact", 5), ("fast", 3)])
def test_every_budget_is_kept_and_more_memory_never_costs_time(numerics: Any, points: int) -> None:
    lowest = least(numerics)
    highest = within(2**40, numerics).peak_allocated_bytes * 1.02 + 3 * MIB
    budgets = [int(lowest + (highest - lowest) * number / (points - 1)) for number in range(points)]
    plans = [within(budget, numerics) for budget in budgets]
    for plan, budget in zip(plans, budgets, strict=True):
        assert plan.peak_allocated_bytes <= budget
        assert plan.peak_allocated_bytes <= plan.largest_peak_bytes
        assert plan.peak_reserved_bytes is not None
        assert plan.untouched or plan.least_bytes == lowest, "a plan and a refusal name the same least"
    seconds = [plan.seconds for plan in plans]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[0] > seconds[-1]
    assert plans[0].levels != plans[-1].levels


def test_a_larger_budget_is_never_slower_where_parts_say_less_than_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step takes as a whole exceeds what its parts say by more for some choices than for others."""
    options = [(Option("layer", 0, 8.0), Option("concat", 3 * MIB, 3.0), Option("keep", 7 * MIB, 0.0))] * 8
    layers = tuple(Layer(f"layer{number}", each) for number, each in enumerate(options))
    stages = [Stage(layers, {"layer": 10 * MIB, "concat": 10 * MIB, "keep": 10 * MIB})]
    by_level = {option.level: option for option in options[0]}
    tried = 0

    def whole(self: planner._Planner, levels: dict[str, Any]) -> SimpleNamespace:
        nonlocal tried
        tried += 1
        kept = sum(by_level[level].kept_bytes for level in levels.values())
        beyond = 5 * MIB * (sum(level == "concat" for level in levels.values()) % 3)
        return SimpleNamespace(peak_bytes=10 * MIB + kept + beyond)

    monkeypatch.setattr(planner._Planner, "_rewritten", whole)
    found = {}
    budgets = range(16 * MIB, 90 * MIB, 3 * MIB // 2)
    for budget in budgets:
        own = planner._Planner(budget, small, (), None, None, memopt.measure.GPU)  # type: ignore[arg-type]
        fitting = own._fitting(stages, *planner._extremes(stages))
        if fitting is not None:
            assert fitting[1].peak_bytes <= own._usable_bytes
            found[budget] = sum(by_level[level].seconds for level in fitting[0].values())
    assert min(found) <= 18 * MIB
    assert list(found) == [budget for budget in budgets if budget >= min(found)], "a larger one is never too small"
    seconds = list(found.values())
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[0] > 50
    assert seconds[-1] == 0
    assert tried < 6 * len(found), "each took seconds in earnest"


def test_few_steps_are_predicted_where_parts_say_much_less_than_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes seconds in earnest, or tens of them for deep models."""
    sizes = {f"layer{number}": number * MIB // 8 for number in range(1, 80)}
    layers = tuple(
        Layer(path, (Option("layer", 0, (size / MIB) ** 1.2), Option("keep", size, 0.0)))
        for path, size in sizes.items()
    )
    stages = [Stage(layers, {"layer": 10 * MIB, "keep": 10 * MIB})]
    tried = 0

    def kept_bytes(levels: dict[str, Any]) -> int:
        return sum(size for path, size in sizes.items() if levels[path] == "keep")

    def whole(self: planner._Planner, levels: dict[str, Any]) -> SimpleNamespace:
        nonlocal tried
        tried += 1
        return SimpleNamespace(peak_bytes=10 * MIB + kept_bytes(levels) * 5 // 4)

    monkeypatch.setattr(planner._Planner, "_rewritten", whole)
    own = planner._Planner(300 * MIB, small, (), None, None, memopt.measure.GPU)  # type: ignore[arg-type]
    fitting = own._fitting(stages, *planner._extremes(stages))
    assert fitting is not None
    assert tried <= 12
    assert own._usable_bytes - 2 * MIB < fitting[1].peak_bytes <= own._usable_bytes


def test_a_budget_is_spent() -> None:
    plan = within(int(1.2 * least("exact")), "exact")
    assert plan.peak_allocated_bytes > 0.92 * plan.budget_bytes


@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_a_layer_that_could_spare_time_is_told_that_the_budget_is_full(numerics: Any) -> None:
    """Also where no layer has room to keep anything."""
    scarce, plenty = within(least(numerics), numerics), within("1GiB", "fast")
    reasons = {layer.reason for layer in scarce.layers if layer.level == "layer" and layer.sparable_seconds}
    assert reasons == {"keeping more would exceed the budget"}
    assert not any(layer.sparable_seconds for layer in plenty.layers)


def test_what_fits_as_it_is_stays_as_it_is() -> None:
    plan = within("100GiB", "exact")
    assert plan.untouched
    assert plan.seconds == 0
    model = small()
    memopt.apply(model, batch(4), config=memopt.Config(numerics="exact", memory_budget="100GiB"))
    assert type(model) is bc.DenseNet
    explanation = memopt.explain(model)
    assert {chain.reason for chain in explanation.chains} == {"the memory budget has room for it as it is"}
    assert any("stays as it is" in note for note in explanation.notes)


def test_a_model_without_fused_kernels_is_planned_as_it_runs() -> None:
    def groups() -> nn.Module:
        model = small()
        for name, module in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]:
            model.set_submodule(name, nn.GroupNorm(1, module.num_features))
        return model

    def planned(budget: str) -> memopt.MemoryPlan:
        return memopt.plan_memory(groups(), batch(4), config=memopt.Config(numerics="fast", memory_budget=budget))

    plan = planned("100GiB")
    assert plan.numerics == "exact"
    assert plan.untouched
    with pytest.raises(memopt.BudgetError, match="numerics exact"):
        planned("1MiB")


def test_a_model_that_fits_stays_as_it_is_where_memopt_needs_more() -> None:
    """Without a linear layer the naive step takes no workspaces of cuBLAS; memopt's kernels do."""

    def tiny() -> nn.Module:
        return nn.Sequential(dense_net().block1)

    comparison = memopt.compare(
        tiny,
        torch.randn(4, 6, 8, 8),
        config=memopt.Config(memory_budget="16MiB"),
        measure=False,
        device=torch.device("cpu"),
    )
    plan, before = comparison.plan, comparison.predicted_before
    assert plan is not None
    assert before is not None
    assert plan.untouched
    assert plan.peak_allocated_bytes == before.peak_allocated_bytes
    assert not comparison.explanation.rewritten
    assert all("with the workspaces of its kernels" in str(chain.reason) for chain in comparison.explanation.chains)
    with pytest.raises(memopt.BudgetError) as caught:
        memopt.plan_memory(tiny(), torch.randn(4, 6, 8, 8), config=memopt.Config(numerics="fast", memory_budget="1MiB"))
    least_bytes = caught.value.least_bytes
    assert least_bytes is not None
    assert plan.peak_allocated_bytes < least_bytes < 16 * MIB, "of the naive step"
    config = memopt.Config(numerics="fast", memory_budget=least_bytes)
    assert memopt.plan_memory(tiny(), torch.randn(4, 6, 8, 8), config=config).untouched


def test_at_the_least_budget_nothing_is_computed_again_in_vain() -> None:
    model, x = small(), batch(16)
    with pytest.raises(memopt.BudgetError) as caught:
        memopt.plan_memory(model, x, config=memopt.Config(numerics="fast", memory_budget="1MiB"))
    least_bytes = caught.value.least_bytes
    assert least_bytes is not None
    tight, loose = (
        memopt.plan_memory(model, x, config=memopt.Config(numerics="fast", memory_budget=least_bytes + more))
        for more in (0, 2**18)
    )
    assert tight.peak_allocated_bytes == loose.peak_allocated_bytes
    assert tight.seconds == loose.seconds


def test_a_model_without_chains_is_refused_too_little_and_stays_within_the_least() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), torch.randn(64, 3, 32, 32)
    with pytest.raises(memopt.BudgetError) as caught:
        memopt.plan_memory(model, x, config=memopt.Config(memory_budget="2MiB"))
    assert caught.value.least_bytes is not None
    plan = memopt.plan_memory(model, x, config=memopt.Config(memory_budget=caught.value.least_bytes))
    assert plan.untouched
    assert plan.layers == ()


def test_planning_without_a_budget_names_what_is_missing() -> None:
    for config in (None, memopt.Config()):
        with pytest.raises(memopt.ConfigError, match=r"config=memopt.Config\(memory_budget="):
            memopt.plan_memory(dense_net(), images(), config=config)


def test_a_lazily_applied_model_trains_alike_and_within_the_budget() -> None:
    budget = int(1.2 * least("exact"))
    naive = small()
    model = memopt.apply(copy.deepcopy(naive), config=memopt.Config(numerics="exact", memory_budget=budget))
    x = batch()
    assert_same(train_step(naive, (x,)), train_step(model, (x,)))
    levels = {chain.level for chain in memopt.explain(model).chains}
    assert "layer" in levels
    assert len(levels) > 1
    with StorageTracker() as tracker:
        step = TrainingStep(model, (x,))
        tracker.track(model, x)
        step.run()
        tracker.reset_peak()
        step.run()
    assert tracker.peak_bytes < budget


def test_every_kind_of_input_is_planned_anew() -> None:
    budget = int(1.2 * least("exact"))
    model = memopt.apply(small(), config=memopt.Config(numerics="exact", memory_budget=budget))
    notes = []
    for size in (16, 64, 16):
        model(batch(size)).sum().backward()
        notes.append(memopt.explain(model).notes)
    assert notes[0] == notes[2] != notes[1]
    with pytest.raises(memopt.BudgetError, match="DenseNet"):
        model(batch(256))


def test_planning_leaves_no_trace() -> None:
    model = dense_net()
    memopt.apply(model, config=memopt.Config(numerics="exact", memory_budget="80MiB"))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    state = torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16), StorageTracker() as tracker:
        model(images())
        assert torch.is_autocast_enabled("cpu")
    assert tracker.peak_bytes < MIB
    assert torch.equal(state, torch.get_rng_state())
    counts = [name for name in before if name.endswith("num_batches_tracked")]
    assert all(model.get_buffer(name) == before[name] + 1 for name in counts)


def test_layers_of_parts_are_planned_too() -> None:
    class Observed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = small()
            self.inner.register_forward_hook(lambda module, args, output: None)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    budget = int(1.2 * least("exact"))
    model = memopt.apply(Observed(), config=memopt.Config(numerics="exact", memory_budget=budget))
    model(batch())
    chains = memopt.explain(model).rewritten
    assert all(chain.module.startswith("inner.") for chain in chains)
    assert len({chain.level for chain in chains}) > 1
    assert all(chain.reason for chain in chains)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"memory_budget": "much"}, "is not a size"),
        ({"memory_budget": 0}, "more than nothing"),
        ({"memory_budget": 6}, "6 would be 6 bytes.*6GiB"),
        ({"memory_budget": "6"}, "6 would be 6 bytes.*6GiB"),
        ({"memory_budget": "1GiB", "recompute": "layer"}, "chooses the recompute levels"),
    ],
)
def test_bad_budgets_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(memopt.ConfigError, match=message):
        memopt.Config(**fields)


def test_what_cannot_be_predicted_is_refused() -> None:
    class Peeking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = small()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) * (2.0 if x.sum().item() > 0 else 1.0)

    model = memopt.apply(Peeking(), config=memopt.Config(memory_budget="1GiB"))
    with pytest.raises(memopt.BudgetError, match="No levels can be chosen"):
        model(batch(4))
