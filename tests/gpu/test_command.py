"""On a GPU: the command measures there, and what it says holds."""

import json
from pathlib import Path

import pytest
from memopt_cli.main import main

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]


def test_report_on_the_default_model(tmp_path: Path) -> None:
    out = tmp_path / "report.json"

    status = main(["optimize", f"{ROOT / 'densenet_models' / 'bc.py'}:DenseNet", "--report", "--json", str(out)])

    report = json.loads(out.read_text())
    assert status == 0
    assert report["device"] == "cuda"
    assert report["chains"]["found"] == report["chains"]["rewritten"] == 51
    assert report["equivalence"]["passed"]
    assert report["equivalence"]["outputs_equal"]
    assert report["equivalence"]["gradients_equal"]
    assert report["equivalence"]["buffers_equal"]
    for when in ("before", "after"):
        predicted = report["predicted"][when]["activation_peak_bytes"]
        measured = report[when]["activation_peak_bytes"]
        assert abs(predicted - measured) < 0.05 * measured
    assert report["after"]["activation_peak_bytes"] <= 0.15 * report["before"]["activation_peak_bytes"]
