"""What was predicted elsewhere is trained on a GPU, the small ones first; a stand-in trains here."""

import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.bench.scripts import load


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    fields = "target,input,memory_bytes,largest,variant,size,predicted_size,peak_reserved_bytes,trained,gpu"
    path = tmp_path / "limits.csv"
    path.write_text(
        f"{fields},torch,commit,date\n"
        "densenet_models.bc:DenseNet,8x3x32x32,1073741824,depth,memopt layer,100,100,1,,none,2,c,d\n"
        "densenet_models.bc:DenseNet,8x3x32x32,1073741824,batch size,checkpointed,24,24,1,,none,2,c,d\n"
    )
    return path


def test_each_row_is_trained_with_its_size_and_a_smaller_one_where_that_fails(
    rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits_within = load("limits_within")
    seen: list[tuple[str, int, int, int]] = []

    def trains(job: Any, variant: Any, memory_bytes: int, device: Any) -> bool:
        norms = sum(name.endswith("norm1") for name, _ in job.make_model().named_modules())
        seen.append((variant.label, norms, job.inputs[0].shape[0], memory_bytes))
        return len(seen) in (1, 4)

    monkeypatch.setattr(limits_within, "trains", trains)
    limits_within.fill_in(rows, time.monotonic() + 60)
    # Depths 100, 94 and 82.
    assert seen == [("checkpointed", 48, 24, 2**30), *(("memopt layer", norms, 8, 2**30) for norms in (48, 45, 39))]
    found = load("rows_table").load(rows)
    facts = ("size", "predicted_size", "peak_reserved_bytes", "trained")
    assert [tuple(row[fact] for fact in facts) for row in found] == [
        ("82", "100", "", "True"),
        ("24", "24", "1", "True"),
    ]
    assert all(row["gpu"] != "none" for row in found)


def test_nothing_is_begun_after_the_deadline(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits_within, before = load("limits_within"), rows.read_text()
    monkeypatch.setattr(limits_within, "trains", lambda *_: pytest.fail("out of time"))
    limits_within.fill_in(rows, time.monotonic() - 1)
    assert rows.read_text() == before


SMALL = """
import torch
from torch import nn


class Small(nn.Module):
    def __init__(self, depth=2):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(depth)))

    def forward(self, x):
        return self.layers(x)
"""


def test_each_answer_of_the_command_becomes_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits_within, out = load("limits_within"), tmp_path / "limits.csv"
    (tmp_path / "small.py").write_text(SMALL)
    monkeypatch.setattr(limits_within, "TARGET", f"{tmp_path}/small.py:Small")
    monkeypatch.setattr(limits_within, "OPTIONS", ("--input", "64x1024"))
    monkeypatch.setattr(sys, "argv", ["limits_within.py", "--memory", "160MiB", "--out", str(out)])
    limits_within.main()
    found = load("rows_table").load(out)
    assert [row["largest"] for row in found] == ["batch size"] * 3 + ["depth"] * 3
    assert all(int(row["size"]) > 2 and int(row["peak_reserved_bytes"]) <= 160 * 2**20 for row in found)
