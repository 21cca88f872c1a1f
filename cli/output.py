"""Writing the JSON document: to stdout, or to a file all at once."""

import errno
import json
import os
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

from .errors import CommandError

STDOUT = "-"


def require_writable(path: str, option: str = "--json") -> None:
    """Find out before the long work whether a file that an option names can be written.

    Raises:
        CommandError: it will not.
    """
    if path == STDOUT:
        return
    try:
        if _is_special(path):
            # Not opened: that would wait for the reader of a pipe.
            if not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        elif Path(path).is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        else:
            temporary = _temporary(Path(path).resolve())
            temporary.touch()
            temporary.unlink()
    except OSError as error:
        raise CommandError(f"{option} {path} cannot be written: {error.strerror}. Choose another file.") from error


def alone_on_stdout(path: str | None) -> AbstractContextManager[object]:
    """While it is made, whatever else is printed goes to stderr if the document goes to stdout: also what the user's
    own file prints."""
    return redirect_stdout(sys.stderr) if path == STDOUT else nullcontext()


def write_document(document: Mapping[str, Any], path: str, stdout: TextIO) -> None:
    """Write `document` as JSON; a reader of the file sees the old content or the new, never half of it.

    Args:
        document: JSON values.
        path: of the file, or "-" for `stdout`.
        stdout: the process's own, whatever `sys.stdout` is now.

    Raises:
        CommandError: the file cannot be written.
    """
    text = json.dumps(document, indent=2, allow_nan=False) + "\n"
    if path == STDOUT:
        stdout.write(text)
        stdout.flush()
        return
    try:
        if _is_special(path):
            Path(path).write_text(text, encoding="utf-8")
        else:
            _replace(Path(path).resolve(), text)
    except OSError as error:
        raise CommandError(f"--json {path} cannot be written: {error.strerror}. Choose another file.") from error


def _replace(target: Path, text: str) -> None:
    temporary = _temporary(target)
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}.tmp")


def _is_special(path: str) -> bool:
    # A device or a pipe (/dev/null) must be written to, not replaced by a file.
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)
