"""Moments at which regions have run, for whoever watches: a prediction asks what is allocated between them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

Phase = Literal["forward", "backward"]
Watcher = Callable[[str, Phase], object]

_watchers: list[Watcher] = []


@contextmanager
def watching_regions(watcher: Watcher) -> Iterator[None]:
    """Has `watcher` told the name of each region when its forward or backward has run."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def region_has_run(name: str, phase: Phase) -> None:
    """Tells the watchers."""
    for watcher in _watchers:
        watcher(name, phase)
