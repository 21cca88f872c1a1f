"""Benchmarks that run side by side on one GPU stand in line: they compile together and measure one at a time."""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import inf
from pathlib import Path

HELP = "a file: runs that share it measure one at a time, and compile side by side"
POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Line:
    """Who is given the same file.

    Attributes:
        path: what is locked; None for one that is alone.
        patient_until: on the monotonic clock. Who measures waits until nobody compiles, but no longer than this: a
            compiler that takes too long must not cost the others their rows.
    """

    path: Path | None = None
    patient_until: float = inf

    @property
    def alone(self) -> bool:
        """Nobody else is there."""
        return self.path is None

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """While nobody measures."""
        if self.path is None:
            yield
            return
        with self._compilers.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            yield

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """While nobody else does."""
        if self.path is None:
            yield
            return
        with self.path.open("w") as turn, self._compilers.open("w") as compilers:
            fcntl.flock(turn, fcntl.LOCK_EX)
            while not _locked(compilers.fileno()) and time.monotonic() < self.patient_until:
                time.sleep(POLL_SECONDS)
            yield

    @property
    def _compilers(self) -> Path:
        assert self.path is not None
        return self.path.with_name(f"{self.path.name}.compilers")


def _locked(file: int) -> bool:
    with suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False
