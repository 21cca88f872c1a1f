"""Which room may import which, read off the sources."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "ir": set(),
    "fake": set(),
    "capture": {"ir", "fake"},
    "find": {"ir"},
    "plan": {"ir"},
    "runtime": {"ir"},
    "rewrite": {"ir", "runtime", "capture", "find"},
    "measure": {"ir"},
    "report": {"ir", "measure"},
}
OUTSIDE = {"networkx": {"find", "plan"}, "rich": {"report"}, "triton": {"runtime"}}


def _imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return names


@pytest.mark.parametrize("room", ALLOWED)
def test_rooms_import_only_what_they_may(room: str) -> None:
    for path in (ROOT / "memopt" / room).rglob("*.py"):
        for name in _imports(path):
            parts = name.split(".")
            if parts[0] == "memopt" and len(parts) > 1 and parts[1] not in ("errors", "config", "garbage"):
                assert parts[1] in ALLOWED[room] | {room}, f"{path} imports {name}"


@pytest.mark.parametrize("package", OUTSIDE)
def test_packages_stay_in_their_rooms(package: str) -> None:
    for path in (ROOT / "memopt").rglob("*.py"):
        if package in {name.split(".")[0] for name in _imports(path)}:
            assert path.relative_to(ROOT / "memopt").parts[0] in OUTSIDE[package], path


def test_files_stay_readable() -> None:
    for folder in ("memopt", "cli", "densenet_models"):
        for path in (ROOT / folder).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 320, path
