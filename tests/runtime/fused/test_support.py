"""Where fused kernels run, and the reason where they do not."""

import importlib.util

import pytest
import torch

from memopt.runtime.fused.support import unsupported


def test_a_cpu_runs_the_references() -> None:
    assert unsupported(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("capability", "reason"),
    [((9, 0), None), ((8, 0), None), ((7, 5), "fused kernels need compute capability 8.0, and this GPU has 7.5")],
)
def test_gpus_by_capability(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], reason: str | None) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert unsupported(torch.device("cuda", 0)) == reason


def test_other_devices_and_a_missing_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    assert unsupported(torch.device("mps")) == "there are no fused kernels for mps"
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert unsupported(torch.device("cuda", 0)) == "there are no fused kernels for ROCm"
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert unsupported(torch.device("cuda", 0)) == "Triton is not installed"
