import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from memopt.ir import Explanation
from memopt.measure import Comparison, StepFigures
from memopt.report import print_as_found, print_comparison, print_explanation, table

GOLDEN = Path(__file__).parent / "golden"


def printed(comparison: Comparison, width: int = 80) -> str:
    file = io.StringIO()
    print_comparison(comparison, "model.py:Net", file, width)
    return file.getvalue()


def golden(name: str) -> str:
    return (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("width", [80, 120])
def test_whole_report(comparison: Comparison, width: int) -> None:
    assert printed(comparison, width) == golden(f"report_{width}")


def test_title_and_file_may_be_left_out(comparison: Comparison, capsys: pytest.CaptureFixture[str]) -> None:
    print_comparison(comparison)
    out = capsys.readouterr().out
    assert out.startswith("input 64x3x32x32, float32, on the CPU\n")
    assert "after / before" in out


def test_lines_have_no_spaces_at_their_end(comparison: Comparison) -> None:
    file = io.StringIO()
    print_comparison(comparison, "model.py:Net", file, 80)
    print_explanation(comparison.explanation, "model.py:Net", file, 80)
    assert [line for line in file.getvalue().splitlines() if line != line.rstrip()] == []


def test_without_measurements(comparison: Comparison) -> None:
    text = printed(replace(comparison, before=None, after=None))
    assert "predicted for a GPU" in text
    assert "measured on" not in text


def test_without_any_figure_there_is_no_table(comparison: Comparison) -> None:
    nothing = dict.fromkeys(("before", "after", "predicted_before", "predicted_after"))
    assert "training step" not in printed(replace(comparison, **nothing))
    text = printed(replace(comparison, **nothing | {"after": comparison.after}))
    (heading,) = [line for line in text.splitlines() if line.startswith("training step")]
    assert heading.split() == ["training", "step", "after"]


def test_a_peak_that_is_not_lower_is_said_below_the_figures(comparison: Comparison) -> None:
    lines = printed(comparison, 120).splitlines()
    (place,) = [
        place for place, line in enumerate(lines) if line.startswith("Predicted for a GPU, memopt does not pay")
    ]
    assert lines[place - 2].startswith("  peak allocated")
    assert [lines[place - 1], lines[place + 2]] == ["", ""]


def test_out_of_memory_before(comparison: Comparison) -> None:
    text = printed(replace(comparison, before=StepFigures(out_of_memory=True)))
    row = next(line for line in text.splitlines() if "activation peak" in line)
    assert row.endswith("out of memory     297.0 MiB                —")


def test_time_on_a_gpu_is_not_rough(comparison: Comparison) -> None:
    text = printed(replace(comparison, device="cuda", device_name="a GPU"))
    row = next(line for line in text.splitlines() if "step time" in line)
    assert row.split() == ["step", "time", "2.50", "s", "731.2", "ms", "0.292", "×"]


def test_nothing_is_claimed_when_the_equivalence_fails(comparison: Comparison) -> None:
    failed = replace(
        comparison.equivalence,
        gradients_equal=False,
        passed=False,
        differing=("gradient of fc.weight",),
        skipped=("gradient of stem.weight",),
    )
    text = printed(replace(comparison, equivalence=failed))
    assert text == golden("not_equivalent")
    assert "×" not in text
    assert "activation peak" not in text


@pytest.mark.parametrize(("passes", "colour"), [(True, "\x1b[32mEquivalent"), (False, "\x1b[1;31mNOT SHOWN")])
def test_equivalence_is_green_or_red(
    comparison: Comparison, monkeypatch: pytest.MonkeyPatch, passes: bool, colour: str
) -> None:
    monkeypatch.setattr(
        table,
        "_console",
        lambda file, width: Console(file=file, width=width, force_terminal=True, color_system="standard"),
    )
    verdict = replace(comparison.equivalence, passed=passes)
    assert colour in printed(replace(comparison, equivalence=verdict))


def test_autocast_and_device_are_in_the_heading(comparison: Comparison) -> None:
    text = printed(replace(comparison, amp=torch.bfloat16, device_name="NVIDIA [bold]"))
    assert "input 64x3x32x32, float32, autocast bfloat16, on NVIDIA [bold]" in text


def test_explanation(comparison: Comparison) -> None:
    file = io.StringIO()
    print_explanation(comparison.explanation, "model.py:Net", file, 120)
    text = file.getvalue()
    assert "15 chains found, 10 rewritten, 5 left alone" in text
    assert "dense block 2: 5 of 9 rewritten" in text
    assert "too [bold]small[/bold]" in text
    assert "Note: One note about the model." in text


@pytest.mark.parametrize("found", [False, True])
def test_a_model_with_nothing_rewritten_claims_nothing(comparison: Comparison, found: bool) -> None:
    left = comparison.explanation.rejected if found else ()
    explanation = Explanation(False, True, False, left, ("No chain was found.",))
    text = printed(replace(comparison, explanation=explanation, notes=()))
    lines = text.splitlines()
    assert lines[:4] == [
        *printed(comparison).splitlines()[:2],
        "",
        "Nothing was rewritten: memopt leaves this model as it is.",
    ]
    assert f"{len(left)} chains found, 0 rewritten, {len(left)} left alone" in lines
    assert ("because" in text) == found
    assert "Equivalent" not in text
    assert "×" not in text.replace(lines[1], "")
    assert lines[-1] == "Note: No chain was found."


def test_blocks_without_layers_or_exits_have_a_dash(comparison: Comparison, make_chain) -> None:
    explanation = replace(comparison.explanation, chains=(make_chain(1, 1, "exit"), make_chain(2, 1)))
    rows = [line.split() for line in printed(replace(comparison, explanation=explanation)).splitlines()]
    assert ["1", "—", "1", "of", "1", "layer"] in rows
    assert ["2", "1", "of", "1", "—", "layer"] in rows


def test_explanation_of_a_model_with_nothing_to_rewrite() -> None:
    file = io.StringIO()
    print_explanation(Explanation(False, True, False, (), ("No chain was found.",)), "model.py:Net", file, 80)
    assert file.getvalue() == (
        "model.py:Net\n\nNothing was rewritten: memopt leaves this model as it is.\n\n"
        "0 chains found, 0 rewritten, 0 left alone\n\nNote: No chain was found.\n"
    )


def test_rows_that_take_long_to_find_are_printed_one_by_one() -> None:
    file = io.StringIO()
    before: list[str] = []

    def rows() -> Iterator[tuple[str, str, str]]:
        for size in ("8", "1,024,000"):
            before.append(file.getvalue())
            yield "batch", "naive", size

    print_as_found("[net]", {"": 5, "variant": 0, "fits": 5}, rows(), ["A note."], file)

    assert before[1].startswith(before[0])
    assert file.getvalue() == (
        "[net]\n\n        variant    fits\n───────────────────────\n"
        "batch   naive         8\nbatch   naive     1,024\n                   ,000\n\nA note.\n"
    )
    assert before[1].endswith("8\n")
