"""Processes with a group between them, kept for a whole test session; nothing here can wait for ever."""

import datetime
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import distributed

WORLD_SIZE = 2
START_SECONDS = 120.0
"""Importing torch twice on a busy machine."""
TASK_SECONDS = 120.0
"""Far more than any task needs, on a busy machine too."""
COLLECTIVE_SECONDS = 60.0
"""After which a collective that the other rank never joins raises."""


class Ranks:
    """Runs functions in every process and returns what each made of it; starts the processes when first needed.

    After an error in a task, or one that took too long, the processes are ended: the next task gets new ones.

    Args:
        backend: of their group.
        world_size: how many they are.
    """

    def __init__(self, backend: str = "gloo", world_size: int = WORLD_SIZE) -> None:
        self._backend = backend
        self._world_size = world_size
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call `function(rank, *arguments)` in each process; it is sent by name, so it belongs to a module."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, arguments))
        try:
            answers = [_answer(pipe, TASK_SECONDS) for pipe in self._pipes]
        except (TimeoutError, EOFError) as error:
            self.stop()
            raise AssertionError(f"{function.__name__}: a rank hung or died ({error!r})") from error
        failed = [text for ok, text in answers if not ok]
        if failed:
            self.stop()
            raise AssertionError("\n".join(failed))
        return [value for _, value in answers]

    def stop(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        context = get_context("spawn")  # a fork would inherit autograd's threads
        store = Path(tempfile.mkdtemp()) / "store"
        for rank in range(self._world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work, args=(rank, self._world_size, self._backend, str(store), theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        for pipe in self._pipes:
            _answer(pipe, START_SECONDS)


def _answer(pipe: Connection, seconds: float) -> Any:
    if not pipe.poll(seconds):
        raise TimeoutError(f"no answer in {seconds:g} s")
    return pipe.recv()


def _work(rank: int, world_size: int, backend: str, store: str, pipe: Connection) -> None:
    # The machine's name need not have an address that it can reach itself by.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # older torch has nothing else
    distributed.init_process_group(
        backend,
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=COLLECTIVE_SECONDS),
    )
    pipe.send((True, "ready"))
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(rank, *arguments)))
        except Exception:
            pipe.send((False, f"rank {rank}:\n{traceback.format_exc()}"))
