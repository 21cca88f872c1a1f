import sys
from pathlib import Path

import pytest
from memopt_cli.main import main


def test_a_page_and_pictures_are_written(tiny: str, tmp_path: Path) -> None:
    page, picture = tmp_path / "report.html", tmp_path / "step.png"
    command = ["optimize", f"{tiny}:Tiny", "--batch-size", "4", "--quiet", "--device", "cpu"]
    assert main([*command, "--html", str(page), "--timeline", str(picture)]) == 0
    assert "Allocated memory over one step" in page.read_text()
    assert "Training step, predicted for a GPU" in page.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--timeline", "step.pdf"], "End it in .html, .svg, .png"),
        (["--timeline", "/nowhere/step.svg"], "--timeline /nowhere/step.svg cannot be written"),
        (["--html", "/nowhere/report.html"], "--html /nowhere/report.html cannot be written"),
        (["--html", "-"], "--html - names no file"),
        (["--html", "./a.html", "--json", "a.html"], "--json and --html both name ./a.html"),
        (["--html", "a.html", "--timeline", "a.html"], "--html and --timeline both name a.html"),
    ],
)
def test_what_cannot_be_drawn_is_said_before_the_work(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    options: list[str], words: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["optimize", f"{tiny}:nothing", *options]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(("option", "file"), [("--timeline", "step.png"), ("--html", "report.html")])
def test_without_matplotlib_the_option_that_needs_it_is_named_before_the_work(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    option: str, file: str,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["optimize", f"{tiny}:nothing", option, str(tmp_path / file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"memopt: {option} needs matplotlib")
    assert "pip install -e '.[plot]'" in error
