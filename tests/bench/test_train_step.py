"""The benchmark's own way through a variant, on a CPU: with a stand-in for the GPU's allocator and profiler."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import memopt
from densenet_models.bc import DenseNet
from memopt.rewrite import installed
from tests.bench.scripts import load


def test_all_figures_are_of_one_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    train_step = load("train_step")
    ledger = SimpleNamespace(current_bytes=100, peak_bytes=250, peak_reserved_bytes=300, reset_peak=lambda: None)
    monkeypatch.setattr(train_step, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(train_step, "CudaLedger", lambda device: ledger)
    monkeypatch.setattr(train_step, "TURNS", 2)
    monkeypatch.setattr(train_step, "profiled", lambda step: (0.25, 7))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    made: list[Any] = []

    def make(change: Any = train_step.VARIANTS["memopt exact layer"]) -> Any:
        made.append(change(DenseNet(depth=10)))
        return made[-1]

    inputs = (torch.randn(2, 3, 8, 8),)
    alone = train_step.measure(make, inputs, None, memopt.remove)
    assert len(made) == 1
    assert installed(made[0]) is None
    beside = train_step.measure(make, inputs, None, memopt.remove, lambda: make(train_step.leave))
    assert len(made) == 3
    assert set(beside) == {*alone, "naive_step_seconds"} < {*train_step.FIELDS}
    line = train_step.Line(tmp_path / "lock")
    in_line = train_step.measure(make, inputs, None, memopt.remove, line=line, compiles=True)
    assert len(made) == 4
    assert set(in_line) == set(alone)
    expected = {"activation_peak_bytes": 150, "peak_allocated_bytes": 250, "peak_reserved_bytes": 300, "kernels": 7}
    assert expected.items() <= beside.items()
    assert min(beside["step_seconds"], beside["naive_step_seconds"], alone["step_seconds"]) > 0


def test_the_first_step_waits_for_memory_that_others_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    train_step = load("train_step")
    monkeypatch.setattr(train_step, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(train_step, "MEMORY_SECONDS", 0.0)
    failing = iter([torch.OutOfMemoryError, torch.OutOfMemoryError])

    class Step(SimpleNamespace):
        steps = cleared = 0

        def run(self) -> None:
            for error in failing:
                raise error
            self.steps += 1

        def clear(self) -> None:
            self.cleared += 1

    step = Step()
    train_step._first_step(step)
    assert (step.steps, step.cleared) == (1, 2)
    failing = iter([ZeroDivisionError])
    with pytest.raises(ZeroDivisionError):
        train_step._first_step(step)
