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
    in_line = train_step.measure(make, inputs, None, memopt.remove, lock=tmp_path / "lock", compiles=True)
    assert len(made) == 5, "one to compile, one to measure"
    assert set(in_line) == set(alone)
    train_step.measure(make, inputs, None, memopt.remove, lock=tmp_path / "lock")
    assert len(made) == 6
    expected = {"activation_peak_bytes": 150, "peak_allocated_bytes": 250, "peak_reserved_bytes": 300, "kernels": 7}
    assert expected.items() <= beside.items()
    assert min(beside["step_seconds"], beside["naive_step_seconds"], alone["step_seconds"]) > 0
