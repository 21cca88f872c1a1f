"""What is being done now, on a terminal; silence elsewhere."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


@contextmanager
def stage_display(stream: TextIO, *, quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """Show the current stage and its time on `stream`, unless that is no terminal or `quiet` is set.

    Yields:
        A function that takes the name of the stage that begins. The line disappears at the end.
    """
    console = Console(file=stream)
    if quiet or not console.is_terminal:
        yield lambda name: None
        return
    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    to_terminal = sys.stdout.isatty()  # else what is printed must go where it was sent
    # Few refreshes: the thread that draws competes with the step being timed.
    with Progress(
        *columns, console=console, transient=True, refresh_per_second=4, redirect_stdout=to_terminal
    ) as progress:
        task = progress.add_task("starting", total=None)

        def show(name: str) -> None:
            progress.reset(task, description=f"{name} …", total=None)

        yield show


@contextmanager
def training_display(stream: TextIO, *, epochs: int, quiet: bool = False) -> Iterator[Callable[[int, int, int], None]]:
    """Show how far training is on `stream`, unless that is no terminal or `quiet` is set.

    What is printed to a terminal meanwhile appears above the bars.

    Yields:
        A function that takes the epoch, from 0, the batches of it that are done, and how many there are.
    """
    console = Console(file=stream)
    if quiet or not console.is_terminal:
        yield lambda epoch, done, total: None
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    to_terminal = sys.stdout.isatty()  # else what is printed must go where it was sent
    with Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        refresh_per_second=4,
        redirect_stdout=to_terminal,
    ) as progress:
        whole = progress.add_task("epochs", total=epochs)
        present = progress.add_task("batches", total=None)

        def show(epoch: int, done: int, total: int) -> None:
            progress.update(whole, completed=epoch)
            progress.update(present, completed=done, total=total)

        yield show
