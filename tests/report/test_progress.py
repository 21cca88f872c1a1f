import io

from memopt.report import stage_display, training_display


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
