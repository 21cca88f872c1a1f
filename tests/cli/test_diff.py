import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from memopt_cli.main import main

MIB = 2**20
Write = Callable[..., str]


@pytest.fixture
def report(tmp_path: Path) -> Write:
    def report(name: str, peak_mib: float = 100.0, **changes: Any) -> str:
        figures = {"activation_peak_bytes": int(peak_mib * MIB), "step_seconds": 0.5, "out_of_memory": False}
        document = {
            "chains": {"found": 3, "rewritten": 3},
            "equivalence": {"passed": True},
            "before": {"activation_peak_bytes": 400 * MIB},
            "after": figures,
            "predicted": {"after": {"peak_reserved_bytes": int(2 * peak_mib * MIB)}},
            **changes,
        }
        path = tmp_path / name
        path.write_text(json.dumps(document))
        return str(path)

    return report


def test_reports_stand_side_by_side(report: Write, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", report("a.json"), report("b.json", 110.0)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    text = "\n".join(lines)
    assert "measured before\nactivation peak 400.0 MiB 400.0 MiB 1.000 ×" in text
    assert "measured after\nactivation peak 100.0 MiB 110.0 MiB 1.100 ×\nstep time 500.0 ms 500.0 ms 1.000 ×" in text
    assert "predicted after\npeak reserved 200.0 MiB 220.0 MiB 1.100 ×" in text


def test_what_differs_and_what_is_missing_is_said_above(report: Write, capsys: pytest.CaptureFixture[str]) -> None:
    of = {
        "target": "a.py:Net",
        "arguments": ["depth=40", "k=12"],
        "input_shapes": [[64, 3, 32, 32]],
        "dtype": "float32",
        "device_name": "the CPU",
    }
    other = of | {
        "target": "b.py:Net",
        "arguments": [],
        "input_shapes": [[32, 3, 32, 32], [32, 5]],
        "device_name": "NVIDIA H100",
    }
    assert main(["diff", report("a.json", **of), report("b.json", **other, before={})]) == 0
    above, _, below = " ".join(capsys.readouterr().out.split()).partition("figure a.json")
    assert "The target is not the same: a.py:Net, b.py:Net." in above
    assert "The --arg is not the same: depth=40 and k=12, none." in above
    assert "The input is not the same: 64x3x32x32, 32x3x32x32 and 32x5." in above
    assert "The device is not the same: the CPU, NVIDIA H100." in above
    assert "dtype" not in above
    assert "—: a report has no such figure." in above
    assert "measured before activation peak 400.0 MiB — —" in below
    assert main(["diff", report("a.json", **of), report("b.json", **of)]) == 0
    same = capsys.readouterr().out
    assert "not the same" not in same
    assert "—" not in same


def test_other_options_are_said(report: Write, capsys: pytest.CaptureFixture[str]) -> None:
    made = [{"numerics": "auto", "recompute": "auto", "budget": b} for b in (None, "300MiB")]
    paths = [report("a.json", options=made[0]), report("b.json", options=made[1])]
    assert main(["diff", *paths]) == 0
    text = capsys.readouterr().out
    assert "The option --budget is not the same: none, 300MiB." in text
    assert "--numerics" not in text
    assert main(["diff", paths[1], report("earlier.json")]) == 0
    assert "The option" not in capsys.readouterr().out, "the other says nothing of its options"


@pytest.mark.parametrize(("peak_mib", "status"), [(104.9, 0), (105.1, 1), (50.0, 0)])
def test_growth_above_the_ratio_fails(
    report: Write, capsys: pytest.CaptureFixture[str], peak_mib: float, status: int
) -> None:
    assert main(["diff", report("a.json"), report("b.json", peak_mib), "--fail-above", "1.05"]) == status
    assert ("Above 1.05: b.json: measured activation peak is 1.051 ×" in capsys.readouterr().out) == (status == 1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"chains": {"found": 3, "rewritten": 2}}, "b.json: fewer chains are rewritten."),
        ({"equivalence": {"passed": False}}, "b.json says that the model is not equivalent."),
        ({"after": {}}, "b.json has no measured activation peak, which the first report has."),
        ({"predicted": {"after": {"out_of_memory": True}}}, "b.json: the step ran out of memory."),
        ({"after": {"out_of_memory": True}}, "b.json: the step ran out of memory."),
    ],
)
def test_what_is_no_figure_fails_too(
    report: Write, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], words: str
) -> None:
    assert main(["diff", report("a.json"), report("b.json", **changes), "--fail-above", "1.05"]) == 1
    assert words in capsys.readouterr().out


def test_a_third_report_is_compared_to_the_first(report: Write, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [report("a.json"), report("b.json", 110.0), report("c.json", 90.0)]
    assert main(["diff", *paths, "--fail-above", "1.05"]) == 1
    assert "1.100 × 0.900 ×" in " ".join(capsys.readouterr().out.split())


def test_reports_of_one_name_are_told_apart(report: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("main", "branch"):
        (tmp_path / folder).mkdir()
    assert main(["diff", report("main/report.json"), report("branch/report.json")]) == 0
    assert "figure main/report.json branch/report.json ratio" in " ".join(capsys.readouterr().out.split())


def test_four_reports_fit_a_terminal(
    report: Write, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["diff", *(report(f"r{number}.json", 100.0 * number) for number in range(1, 5))]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "activation peak 100.0 MiB 200.0 MiB 300.0 MiB 400.0 MiB" in lines
    assert "2.000 × 3.000 × 4.000 ×" in lines


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"{", "is no JSON"),
        (b"\x89", "is no JSON"),
        (b"[]", "is no report"),
        (b"{}", "is no report"),
        (b'{"after": null}', "is no report"),
        (b'{"after": {}, "schema": 99}', "has schema 99"),
    ],
)
def test_what_is_no_report(
    report: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, words: str
) -> None:
    bad = tmp_path / "bad.json"
    if content is not None:
        bad.write_bytes(content)
    assert main(["diff", report("a.json"), str(bad)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"memopt: {bad} {words}")
    assert line.endswith("optimize --json.")


def test_one_report_and_bad_ratios_are_refused(report: Write, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", report("a.json")]) == 2
    assert "two or more" in capsys.readouterr().err
    assert main(["diff", report("a.json"), report("b.json"), "--fail-above", "0"]) == 2
    assert "1.05" in capsys.readouterr().err
