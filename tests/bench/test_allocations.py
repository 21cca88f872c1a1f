"""Finding where a prediction and a GPU part; what a GPU is asked for is recorded there."""

from pathlib import Path

import pytest

from densenet_models.bc import DenseNet
from tests.bench.scripts import load


def test_differences_are_found_by_size() -> None:
    allocations = load("allocations")
    one = [(512, "a"), (1024, "b"), (2048, "c"), (512, "d")]
    other = [(512, "x"), (2048, "y"), (4096, "z"), (8192, "w")]
    assert allocations.differences(one, other) == [([(1024, "b")], []), ([(512, "d")], [(4096, "z"), (8192, "w")])]
    assert allocations.differences(one, [(4096, "x"), *one]) == [([], [(4096, "x")])]
    assert allocations.differences(one, one) == []


def test_what_is_predicted_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    allocations = load("allocations")
    work = allocations.WORKS["DenseNet-BC-100"].__class__(lambda: DenseNet(depth=10), (2, 3, 8, 8))
    monkeypatch.setitem(allocations.WORKS, "tiny", work)
    arguments = ["tiny", "exact layer", "--only-prediction", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["allocations.py", *arguments])
    allocations.main()
    rows = [line.split("\t") for line in (tmp_path / "predicted.txt").read_text().splitlines()]
    assert all(int(size) % 512 == 0 for size, _ in rows)
    assert any("workspace of cuBLAS" in origin for _, origin in rows)
    assert any(origin.startswith("aten.convolution.default  convolution.py") for _, origin in rows)
