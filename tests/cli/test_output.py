import io
import json
import os
from pathlib import Path

import pytest
from memopt_cli.errors import CommandError
from memopt_cli.output import require_writable, write_document


def test_a_file_is_written_whole_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")
    require_writable(str(path))
    assert path.read_text() == "old"
    write_document({"a": 1}, str(path), io.StringIO())
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_what_fails_half_way_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(CommandError, match="No space left on device"):
        write_document({"a": 1}, str(path), io.StringIO())
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_document({"a": 1}, str(tmp_path / "link"), io.StringIO())
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "file").read_text()) == {"a": 1}


def test_a_dash_is_stdout() -> None:
    stdout = io.StringIO()
    require_writable("-")
    write_document({"a": None}, "-", stdout)
    assert json.loads(stdout.getvalue()) == {"a": None}


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        require_writable(str(path))
        write_document({"a": 1}, str(path), io.StringIO())
        assert json.loads(os.read(reader, 1000)) == {"a": 1}
        assert path.is_fifo()
    finally:
        os.close(reader)


@pytest.mark.parametrize("name", ["absent/report.json", "file/report.json", ""])
def test_unwritable_paths(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CommandError, match=r"--json .* cannot be written: .*\. Choose another file"):
        require_writable(str(tmp_path / name))
