"""Output of lines, tables and progress bars: through rich if it is installed, else as plain lines."""

from __future__ import annotations

import importlib.util
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from fastssl.observe.table import Table, plain_lines
from fastssl_pipelines.names import printable

PATIENCE = 1.0  # Seconds


class Bar(Protocol):
    """A progress bar on a line that is overwritten, visible from `start` to `stop` and only on a terminal."""

    def update(self, text: str, completed: int, total: int) -> None: ...

    def start(self) -> None: ...

    def stop(self) -> None: ...


class Screen(Protocol):
    """stdout or stderr; text is never interpreted as markup."""

    is_terminal: bool

    def line(self, text: str, *, wrap: bool = False) -> None:
        """Print text that stays; `wrap` breaks it at words to fit the width."""

    def table(self, table: Table) -> None: ...

    def bar(self, *, counts: bool) -> Bar:
        """A bar, not yet visible; `counts` adds the count and the remaining time."""

    def status(self) -> AbstractContextManager[Callable[[str], object]]:
        """A context manager whose value is called with a text to show as the current activity."""


class NoBar:
    """A bar that shows nothing."""

    def update(self, text: str, completed: int, total: int) -> None: ...

    def start(self) -> None: ...

    def stop(self) -> None: ...


class PlainScreen:
    """Plain lines; counts as no terminal, so nothing is overwritten."""

    is_terminal = False

    def __init__(self, *, stderr: bool, least_width: int) -> None:
        self._stderr, self._width = stderr, max(80, least_width)

    def line(self, text: str, *, wrap: bool = False) -> None:
        for line in text.split("\n") if wrap else [text]:
            # Looked up at every call, since a test or caller may have replaced the stream
            print(textwrap.fill(line, self._width) if wrap else line, file=sys.stderr if self._stderr else sys.stdout)

    def table(self, table: Table) -> None:
        for line in plain_lines(table):
            self.line(line)

    def bar(self, *, counts: bool) -> NoBar:
        return NoBar()

    @contextmanager
    def status(self) -> Iterator[Callable[[str], object]]:
        yield lambda text: None


def open_screen(*, stderr: bool = False, least_width: int = 0) -> Screen:
    """The screen on stdout or stderr; `least_width`: minimum characters per line, as a pipe would cut tables to 80."""
    if importlib.util.find_spec("rich") is None:
        return PlainScreen(stderr=stderr, least_width=least_width)
    from fastssl.observe.rich_screen import RichScreen

    return RichScreen(stderr=stderr, least_width=least_width)


class DelayedProgressBar:
    """A callback (activity, completed, total) that shows a bar on a terminal's stderr after PATIENCE seconds.

    A context manager that removes the bar at its end.
    """

    def __init__(self) -> None:
        screen = open_screen(stderr=True)
        self._bar = screen.bar(counts=True)
        self._visible = screen.is_terminal
        self._start = time.monotonic()

    def __enter__(self) -> DelayedProgressBar:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def __call__(self, activity: str, completed: int, total: int) -> None:
        self._bar.update(printable(activity), completed, total)
        if self._visible and time.monotonic() - self._start > PATIENCE:
            self._bar.start()
