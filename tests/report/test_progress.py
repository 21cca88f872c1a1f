import io

from memopt.report import stage_display


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
