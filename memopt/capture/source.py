"""Where in the user's code an operation was written."""

import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import fx, nn

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_replayed = threading.local()

_LIBRARY_FOLDERS = (
    os.path.dirname(os.path.abspath(torch.__file__)) + os.sep,
    os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep,
)


def user_line() -> str:
    """ "file.py:line" of the innermost frame that is neither torch's nor memopt's; "" if there is none."""
    line: str = getattr(_replayed, "line", "")
    if line:
        return line
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_LIBRARY_FOLDERS) and not name.startswith("<"):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


class _Replay(fx.Interpreter):
    """Runs a graph node by node and says of each where the user wrote it."""

    def run_node(self, n: fx.Node) -> Any:
        """One node."""
        frames = _FRAME.findall(n.meta.get("stack_trace") or "")
        _replayed.line = ":".join(frames[-1]) if frames else ""
        try:
            return super().run_node(n)
        finally:
            _replayed.line = ""


class _Replayed(nn.Module):
    """A graph whose calls have the user's lines, not those of generated code."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        self.graph_module = graph

    def forward(self, *inputs: Any) -> Any:
        """Run the graph; slowly, node by node, while it is recorded."""
        if getattr(_replayed, "wanted", False):
            return _Replay(self.graph_module).run(*inputs)
        return self.graph_module(*inputs)


def replaying_sources(graph: fx.GraphModule) -> nn.Module:
    """A module that runs a graph of Dynamo's so that `user_line` knows the lines that its nodes come from."""
    return _Replayed(graph)


@contextmanager
def with_sources() -> Iterator[None]:
    """While a forward is recorded, graphs are run so that `user_line` knows their lines."""
    before = getattr(_replayed, "wanted", False)
    _replayed.wanted = True
    try:
        yield
    finally:
        _replayed.wanted = before
