import csv
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from memopt_cli.main import main

from memopt.measure.predict import predict_step


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_sweep_over_an_argument(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "picture"
    command = ["sweep", f"{tiny}:Tiny", "--arg", "layers=4:12:4", "--arg", "growth=8", "--batch-size", "8"]
    assert main([*command, "--out", str(out), "--recompute", "layer"]) == 0
    found = rows(out.with_suffix(".csv"))
    assert [(row["value"], row["variant"]) for row in found] == [
        (value, variant) for value in ("4", "8", "12") for variant in ("naive", "memopt")
    ]
    assert {(row["variable"], row["source"]) for row in found} == {("layers", "predicted")}
    naive = [int(row["activation_peak_bytes"]) for row in found if row["variant"] == "naive"]
    assert naive == sorted(naive)
    text = capsys.readouterr().out
    slope = math.log(naive[2] / naive[0]) / math.log(3)
    stated = float(text.partition("naive: the activation peak grows with layers to the power ")[2][:4])
    assert stated == pytest.approx(slope, abs=0.05)
    assert "estimated in 6 of 6 rows. The CSV file says what is allocated if they take" in " ".join(text.split())
    beyond = [int(row["largest_peak_allocated_bytes"]) - int(row["peak_allocated_bytes"]) for row in found]
    assert min(beyond) >= 0 < max(beyond)
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in out.with_suffix(".svg").read_text()


def test_measured_convolutions_have_no_bound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "measured"
    command = ["sweep", "densenet_models.bc:DenseNet", "--depth", "40:100:60", "--batch-size", "64"]
    assert main([*command, "--out", str(out)]) == 0
    assert [row["largest_peak_allocated_bytes"] for row in rows(out.with_suffix(".csv"))] == [""] * 4
    assert "estimated" not in capsys.readouterr().out


def test_a_sweep_over_the_batch_size_predicts_each(tiny: str, tmp_path: Path) -> None:
    out = tmp_path / "batch"
    assert main(["sweep", f"{tiny}:Tiny", "--batch-size", "16:48:16", "--out", str(out), "--levels"]) == 0
    found = rows(out.with_suffix(".csv"))
    assert {row["variant"] for row in found} == {"naive", "memopt concat", "memopt layer"}
    naive = [int(row["activation_peak_bytes"]) for row in found if row["variant"] == "naive"]
    namespace: dict[str, Any] = {}
    exec(Path(tiny).read_text(), namespace)
    inputs = [(torch.empty(batch, 3, 32, 32, device="meta"),) for batch in (16, 32, 48)]
    assert naive == [predict_step(namespace["Tiny"], x).activation_peak_bytes for x in inputs]


def test_the_batch_of_a_given_input_is_varied(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "input"
    command = ["sweep", f"{tiny}:Tiny", "--batch-size", "2:6:2", "--out", str(out), "--recompute", "layer"]
    assert main([*command, "--input", "64x3x16x16"]) == 0
    peaks = [int(row["activation_peak_bytes"]) for row in rows(out.with_suffix(".csv")) if row["variant"] == "naive"]
    assert main([*command, "--input", "2x3x16x16"]) == 0
    again = [int(row["activation_peak_bytes"]) for row in rows(out.with_suffix(".csv")) if row["variant"] == "naive"]
    assert peaks == again == sorted(set(peaks))
    assert f"\nWritten: {out}.csv, {out}.svg, {out}.png\n" in capsys.readouterr().out
    assert main([*command, "--input", "3,16,16"]) == 2


def test_a_function_of_the_users_is_one_more_variant(tiny: str, tmp_path: Path) -> None:
    out = tmp_path / "also"
    (tmp_path / "rival.py").write_text("def same(model):\n    return model\n")
    command = ["sweep", f"{tiny}:Tiny", "--batch-size", "2:4:2", "--out", str(out)]
    assert main([*command, "--also", f"same={tmp_path}/rival.py:same"]) == 0
    by_variant = {
        name: [row["peak_reserved_bytes"] for row in rows(out.with_suffix(".csv")) if row["variant"] == name]
        for name in ("naive", "same")
    }
    assert by_variant["naive"] == by_variant["same"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "varies one thing, not 0"),
        (["--arg", "layers=1:3:1", "--batch-size", "2:4:2"], "varies one thing, not 2"),
        (["--arg", "layers=3:1:1"], "--arg layers= '3:1:1' is not a range"),
        (
            ["--depth", "400:40:60"],
            "--depth '400:40:60' is not a range of two or more numbers. Write START:STOP:STEP with START below STOP",
        ),
        (["--batch-size", "2:4:2", "--measure"], "needs a CUDA device"),
        (["--batch-size", "2:4:2", "--also", "x"], "LABEL="),
        (["--batch-size", "2:4:2", "--also", "naive=x.py:f"], "naive is another variant's label already"),
        (["--batch-size", "2:4:2", "--also", "memopt=x.py:f"], "labels that begin with memopt are its own"),
        (["--batch-size", "2:4:2", "--also", "a=x.py:f"], "--also a: There is no file x.py"),
        (["--batch-size", "2:4:2", "--also", "a=rival.py:raises"], "rival.py:raises raised ValueError: no ("),
        (["--batch-size", "2:4:2", "--also", "a=rival.py:none"], "rival.py:none returned None. Let it return a model."),
        (["--batch-size", "many", "--arg", "layers=1:3:1"], "neither a whole number"),
        (["--batch-size", "2:4:2", "--out", "/nowhere/x"], "cannot be written"),
    ],
)
def test_what_cannot_be_swept(
    tiny: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    words: str,
) -> None:
    (tmp_path / "rival.py").write_text(
        "def raises(model):\n    raise ValueError('no')\n\n\ndef none(model):\n    return None\n"
    )
    monkeypatch.chdir(tmp_path)
    defaults = [] if "--out" in options else ["--out", str(tmp_path / "none")]
    assert main(["sweep", f"{tiny}:Tiny", "--device", "cpu", *defaults, *options]) == 2
    assert words in capsys.readouterr().err


def test_without_matplotlib_nothing_is_swept(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["sweep", f"{tiny}:Tiny", "--batch-size", "2:4:2", "--out", str(tmp_path / "none")]) == 2
    assert "memopt: sweep needs matplotlib" in capsys.readouterr().err
    assert not (tmp_path / "none.csv").exists()
