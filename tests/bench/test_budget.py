"""Budgets are planned without a GPU; each plan but the first is made for less than the one before."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from densenet_models.bc import DenseNet
from memopt import MemoryPlan
from tests.bench.scripts import load


@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_from_what_the_naive_step_takes_down_to_the_least(numerics: str, monkeypatch: pytest.MonkeyPatch) -> None:
    budget, train_step = load("budget"), load("train_step")
    work = train_step.Work(lambda: DenseNet(depth=16), (8, 3, 32, 32), ("naive",))
    monkeypatch.setitem(budget.TABLES, "tiny", work)
    monkeypatch.setattr(budget, "POINTS", 5)
    with ThreadPoolExecutor(1) as pool:
        ends = budget.naive_bytes("tiny"), budget.MIB
        highest, least = (pool.submit(budget.plan, "tiny", numerics, size_bytes) for size_bytes in ends)
        planned = [future.result() for future in budget.plans(pool, "tiny", numerics, highest, least)]
    assert all(isinstance(plan, MemoryPlan) for plan in (highest.result(), *planned))
    budgets = [plan.budget_bytes for plan in planned]
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[-1] == least.result()
    assert len(planned) == 4
    seconds = [plan.seconds for plan in planned]
    assert seconds == sorted(seconds)
