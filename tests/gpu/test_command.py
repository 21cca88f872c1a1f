"""On a GPU: the command measures there, and what it says holds."""

import json
from pathlib import Path

import pytest
from memopt_cli.main import main

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("numerics", "ratio"), [("auto", 0.10), ("exact", 0.15)])
def test_report_on_the_default_model(numerics: str, ratio: float, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    target = f"{ROOT / 'densenet_models' / 'bc.py'}:DenseNet"

    status = main(["optimize", target, "--numerics", numerics, "--report", "--json", str(out)])

    report = json.loads(out.read_text())
    assert status == 0
    assert report["device"] == "cuda"
    assert report["chains"]["found"] == report["chains"]["rewritten"] == 51
    assert report["equivalence"]["passed"]
    assert report["equivalence"]["numerics"] == ("exact" if numerics == "exact" else "fast")
    if numerics == "exact":
        assert report["equivalence"]["outputs_equal"]
        assert report["equivalence"]["gradients_equal"]
        assert report["equivalence"]["buffers_equal"]
    for when in ("before", "after"):
        predicted = report["predicted"][when]["activation_peak_bytes"]
        measured = report[when]["activation_peak_bytes"]
        assert abs(predicted - measured) < 0.05 * measured
    assert report["after"]["activation_peak_bytes"] <= ratio * report["before"]["activation_peak_bytes"]
