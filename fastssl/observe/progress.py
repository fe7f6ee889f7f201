"""A bar for work before training, shown only to those who have to wait."""

from __future__ import annotations

import time

from fastssl.observe.screen import open_screen
from fastssl_pipelines.names import printable

PATIENCE = 1.0  # seconds


class DelayedProgressBar:
    """Called with what is done, how many are done and of how many; a terminal shows it on stderr after a second.

    A context manager, at whose end the bar goes.
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

    def __call__(self, what: str, done: int, total: int) -> None:
        self._bar.update(printable(what), done, total)
        if self._visible and time.monotonic() - self._start > PATIENCE:
            self._bar.start()
