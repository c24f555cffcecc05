"""Progress of long work, on stderr: what, how far, the rate and the time that remains."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

console = Console(stderr=True)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f}/s" if task.speed else "")


class Ticker:
    """Counts finished items of one piece of work."""

    def __init__(self, progress: Progress, task: int) -> None:
        self._progress, self._task = progress, task

    def step(self, count: int = 1) -> None:
        self._progress.advance(self._task, count)  # type: ignore[arg-type]


@contextmanager
def bar(what: str, total: int, done: int = 0) -> Iterator[Ticker]:
    """A progress bar over `total` items, of which `done` were finished by an earlier try."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(what, total=total, completed=done)
        yield Ticker(progress, task)


def say(text: str) -> None:
    """One line for the person who watches."""
    console.print(text, markup=False, highlight=False)
