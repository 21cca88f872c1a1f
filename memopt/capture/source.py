"""Where in the user's code an operation was written."""

import os
import sys
from types import FrameType

import torch

_LIBRARY_FOLDERS = (
    os.path.dirname(os.path.abspath(torch.__file__)) + os.sep,
    os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep,
)


def user_line() -> str:
    """ "file.py:line" of the innermost frame that is neither torch's nor memopt's; "" if there is none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_LIBRARY_FOLDERS) and not name.startswith("<"):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
