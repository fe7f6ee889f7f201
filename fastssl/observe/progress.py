"""A bar for work before training, shown only to those who have to wait."""

from __future__ import annotations

import time

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastssl_pipelines.names import printable

PATIENCE = 1.0  # seconds


class PatientBar:
    """Called with what is done, how many are done and of how many; a terminal shows it on stderr after a second.

    A context manager, at whose end the bar goes.
    """

    def __init__(self) -> None:
        screen = rich.console.Console(stderr=True)
        what = TextColumn("{task.description}", markup=False)
        self._bar = Progress(
            what, BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn(), console=screen, transient=True
        )
        self._task = self._bar.add_task("", total=None)
        self._visible = screen.is_terminal
        self._start = time.monotonic()

    def __enter__(self) -> PatientBar:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar.live.is_started:  # else it would end a line that nobody began
            self._bar.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        self._bar.update(self._task, description=printable(what), completed=done, total=total)
        if self._visible and time.monotonic() - self._start > PATIENCE:
            self._bar.start()
