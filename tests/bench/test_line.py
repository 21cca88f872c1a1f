"""Runs that share a GPU measure one at a time, and only when nobody compiles."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.bench.scripts import load


class Watched:
    """Who is at work, by name."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, ...]] = []
        self.working: list[str] = []

    def work(self, name: str, turn: Any, seconds: float = 0.05) -> None:
        with turn:
            self.working.append(name)
            self.seen.append(tuple(sorted(self.working)))
            time.sleep(seconds)
            self.working.remove(name)


@pytest.fixture(autouse=True)
def _poll_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load("line"), "POLL_SECONDS", 0.005)


def together(*jobs: Any) -> None:
    threads = [threading.Thread(target=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_all_compile_before_one_after_another_measures(tmp_path: Path) -> None:
    module, watched = load("line"), Watched()
    barrier = threading.Barrier(3)

    def job(name: str) -> None:
        line = module.Line(tmp_path / "lock")
        with line.compiling():
            barrier.wait()  # all of them at once
            time.sleep(0.02)
        watched.work(name, line.measuring())

    together(*(lambda name=name: job(name) for name in "abc"))
    assert sorted(watched.seen) == [("a",), ("b",), ("c",)]


def test_none_measures_while_another_compiles(tmp_path: Path) -> None:
    module, watched = load("line"), Watched()
    line, begun = module.Line(tmp_path / "lock"), threading.Event()

    def compiles() -> None:
        with line.compiling():
            watched.working.append("compiles")
            begun.set()
            time.sleep(0.1)
            watched.working.remove("compiles")

    def measures() -> None:
        begun.wait()
        watched.work("measures", line.measuring())

    together(compiles, measures)
    assert watched.seen == [("measures",)]


def test_patience_ends(tmp_path: Path) -> None:
    module, watched = load("line"), Watched()
    line = module.Line(tmp_path / "lock", time.monotonic() + 0.05)
    with line.compiling():
        watched.work("measures", line.measuring())
    assert watched.seen == [("measures",)]


def test_who_is_alone_waits_for_nobody() -> None:
    line = load("line").Line()
    assert line.alone
    with line.compiling(), line.measuring():
        pass
