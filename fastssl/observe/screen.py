"""What a terminal shows, lines, tables and bars: by rich or, where it is not installed, as plain lines."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from fastssl.observe.table import Table


class Bar(Protocol):
    """Work that goes on, in a line that is overwritten; it is there from `start` to `stop`, on a terminal alone."""

    def update(self, text: str, done: int, total: int) -> None: ...

    def start(self) -> None: ...

    def stop(self) -> None: ...


class Screen(Protocol):
    """stdout or stderr; names are shown as they are, whatever brackets they have."""

    is_terminal: bool

    def line(self, text: str, *, wrap: bool = False) -> None:
        """Text that stays; with `wrap`, words too many for the width go into lines of their own."""

    def table(self, table: Table) -> None: ...

    def bar(self, *, counts: bool) -> Bar:
        """With `counts`, it also tells how many are done and how long the others take."""

    def status(self) -> AbstractContextManager[Callable[[str], object]]:
        """Inside the `with` block a call says what is done now."""


def open_screen(*, stderr: bool = False, least_width: int = 0) -> Screen:
    """stdout, or stderr; `least_width`: characters a line that tables take at least, as a pipe would cut them to 80."""
    if importlib.util.find_spec("rich") is None:
        from fastssl.observe.plain_screen import PlainScreen

        return PlainScreen(stderr=stderr, least_width=least_width)
    from fastssl.observe.rich_screen import RichScreen

    return RichScreen(stderr=stderr, least_width=least_width)
