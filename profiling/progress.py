"""How long work says how far it is."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

Progress = Callable[[int, int], None]
"""Called with ``(steps done, all steps)``, from 0 done on."""


def no_progress(done: int, total: int) -> None:
    """Says nothing."""


@contextmanager
def progress_bar(description: str) -> Iterator[Progress]:
    """Draws a bar on standard error, so that standard output stays for results.

    Args:
        description: What the work is.

    Yields:
        The function that moves the bar.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
