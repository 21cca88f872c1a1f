"""What is being done now, on a terminal; silence elsewhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


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
    # Few refreshes: the thread that draws competes with the step being timed.
    with Progress(*columns, console=console, transient=True, refresh_per_second=4) as progress:
        task = progress.add_task("starting", total=None)

        def show(name: str) -> None:
            progress.reset(task, description=f"{name} …", total=None)

        yield show
