import io
import sys

import pytest

from memopt.report import print_as_found, stage_display, training_display


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_the_stage(monkeypatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with stage_display(stream) as on_stage:
        on_stage("measuring [before]")
    assert "measuring [before]" in stream.getvalue()


def test_anything_else_shows_nothing() -> None:
    stream = io.StringIO()
    with stage_display(stream) as on_stage:
        on_stage("measuring")
    assert stream.getvalue() == ""


def test_what_is_printed_meanwhile_goes_where_it_was_sent(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with stage_display(stream):
        print("an answer")
    assert capsys.readouterr().out == "an answer\n"
    assert "an answer" not in stream.getvalue()


def test_rows_printed_to_the_same_terminal_stand_above_the_stage(monkeypatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    with stage_display(terminal):
        print_as_found("title", {"what": 0, "variant": 0}, [("long", "naive")], (), sys.stdout)
    assert "starting" in terminal.getvalue()
    line = terminal.getvalue().partition("long")[0].rpartition("\x1b[2K")[2]
    assert "starting" not in line, "the stage is erased before the row"


def test_quiet_shows_nothing() -> None:
    stream = Terminal()
    with stage_display(stream, quiet=True) as on_stage:
        on_stage("measuring")
    assert stream.getvalue() == ""


def test_training_is_shown_on_a_terminal_only(monkeypatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    plain, terminal = io.StringIO(), Terminal()
    for stream in (plain, terminal):
        with training_display(stream, epochs=3) as show:
            show(1, 2, 5)
    assert plain.getvalue() == ""
    assert "epochs" in terminal.getvalue()
    assert "1/3" in terminal.getvalue()
    assert "2/5" in terminal.getvalue()


def test_quiet_training_shows_nothing() -> None:
    terminal = Terminal()
    with training_display(terminal, epochs=3, quiet=True) as show:
        show(1, 2, 5)
    assert terminal.getvalue() == ""
