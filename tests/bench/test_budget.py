"""Budgets are planned without a GPU; each plan but the first is made for less than the one before."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from densenet_models.bc import DenseNet
from tests.bench.scripts import load


@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_from_what_the_naive_step_takes_down_to_the_least(numerics: str, monkeypatch: pytest.MonkeyPatch) -> None:
    budget, train_step = load("budget"), load("train_step")
    work = train_step.Work(lambda: DenseNet(depth=16), (8, 3, 32, 32), ("naive",))
    monkeypatch.setitem(budget.TABLES, "tiny", work)
    monkeypatch.setattr(budget, "POINTS", 5)
    with ThreadPoolExecutor(1) as pool:
        planned = [future.result() for future in budget.plans(pool, "tiny", numerics)]
    assert all(isinstance(plan, budget.Plan) for plan in planned)
    budgets = [plan.budget_bytes for plan in planned[1:]]
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[-1] == budget.plan("tiny", numerics, budget.MIB)
    assert len(planned) == 5
    assert (planned[0].levels is None) == (numerics == "exact")
    assert planned[0].budget_bytes == budget.naive_bytes("tiny")
    seconds = [plan.planned_seconds for plan in planned]
    assert seconds == sorted(seconds)


def test_plans_are_made_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    budget = load("budget")
    levels = [None, {"features.norm": "layer"}]
    made = [budget.Plan("bc100-64", "fast", 3 - n, 2, 0.5, each) for n, each in enumerate(levels)]
    monkeypatch.setattr(budget, "plans", lambda pool, *job: [pool.submit(int) for _ in made])
    monkeypatch.setattr(budget, "ProcessPoolExecutor", lambda *settings: Answers(made))
    file, out = tmp_path / "plans.json", tmp_path / "out.csv"
    monkeypatch.setattr(
        "sys.argv", ["budget.py", "--only-plans", str(file), "--tables", "bc100-64", "--numerics", "fast"]
    )
    budget.main()
    seen: list[Any] = []
    facts = dict.fromkeys(budget.FIELDS, 1) | {"table": "bc100-64", "numerics": "fast"}
    monkeypatch.setattr(budget, "row", lambda plan, line: seen.append(plan) or facts)
    monkeypatch.setattr("sys.argv", ["budget.py", "--plans", str(file), "--out", str(out), "--numerics", "fast"])
    budget.main()
    assert seen == made
    assert len(out.read_text().splitlines()) == 3


class Answers(ThreadPoolExecutor):
    """A pool whose work is done already."""

    def __init__(self, answers: list[Any]) -> None:
        super().__init__(1)
        self.answers = iter(answers)

    def submit(self, *_: Any, **__: Any) -> Future[Any]:
        return super().submit(next, self.answers)
