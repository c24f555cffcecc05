"""Progress of long work, on stderr: what, how far, the rate and the time that remains.

A terminal has a bar. A log, such as that of a batch job, has a line a minute at most, as items finish.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

console = Console(stderr=True)
EVERY = 60
"""Seconds from one line in a log to the next."""
TELLING = 0.1
"""The share of the work after which it tells how long the rest takes: a first round of calls ends late and at once."""


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        if not task.speed:
            return Text("")
        return Text(f"{task.speed:.1f}/s" if task.speed >= 1 else f"{1 / task.speed:.1f} s each")


class Ticker:
    """Counts finished items of one piece of work."""

    def __init__(self, progress: Progress, task: TaskID, done: int) -> None:
        self._progress, self._task, self._done = progress, task, done
        self._what = progress.tasks[0].description
        self._began = self._told = time.monotonic()

    def step(self, count: int = 1) -> None:
        self._progress.advance(self._task, count)
        now = time.monotonic()
        if not console.is_interactive and now - self._told >= EVERY:
            self._told = now
            self._tell(self._progress.tasks[0], now - self._began)

    def note(self, text: str) -> None:
        """How the work stands, beside what it is."""
        self._progress.update(self._task, description=f"{self._what}, {text}")

    def _tell(self, task: Task, seconds: float) -> None:
        total, made = task.total or 0, task.completed - self._done
        left = ""
        if made >= TELLING * (total - self._done):
            left = f", about {seconds / made * (total - task.completed) / 60:.0f} min left"
        say(f"{task.description}: {task.completed:.0f} of {total:.0f}{left}")


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
        yield Ticker(progress, task, done)


def say(text: str) -> None:
    """One line for the person who watches."""
    console.print(text, markup=False, highlight=False)
