"""The screen through rich."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import rich.table
from rich.box import HEAVY_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from fastssl.observe.table import Cell, Table


class RichBar:
    """A transient progress bar."""

    def __init__(self, console: Console, *, counts: bool) -> None:
        text, bar = TextColumn("{task.description}", markup=False), BarColumn(bar_width=24)
        columns: list[ProgressColumn] = [bar, text]
        if counts:
            columns = [text, bar, MofNCompleteColumn(), TimeRemainingColumn()]
        self._progress = Progress(*columns, console=console, transient=True)
        self._task = self._progress.add_task("", total=None)

    def update(self, text: str, completed: int, total: int) -> None:
        self._progress.update(self._task, description=text, completed=completed, total=total)

    def start(self) -> None:
        self._progress.start()

    def stop(self) -> None:
        if self._progress.live.is_started:  # Stopping a bar that never started prints a stray newline
            self._progress.stop()


class RichScreen:
    """A rich console."""

    def __init__(self, *, stderr: bool, least_width: int) -> None:
        self._console = Console(stderr=stderr, highlight=False)
        self._console.width = max(self._console.width, least_width)
        self.is_terminal = self._console.is_terminal

    def line(self, text: str, *, wrap: bool = False) -> None:
        self._console.print(text, markup=False, soft_wrap=not wrap)

    def table(self, table: Table) -> None:
        headed = any(table.headings)
        shown = rich.table.Table(
            title=table.title or None,
            title_justify="left",
            show_header=headed,
            box=HEAVY_HEAD if table.framed else None,
            padding=(0, 1) if table.framed else (0, 1, 0, 0),
        )
        for heading, align in zip(table.headings, table.align, strict=True):
            # A truncated number would be wrong; in tables without headings, long values wrap instead
            shown.add_column(heading, justify="right" if align == "r" else "left", no_wrap=headed)
        for row in table.rows:
            shown.add_row(*map(_cell, row))
        self._console.print(shown)

    def bar(self, *, counts: bool) -> RichBar:
        return RichBar(self._console, counts=counts)

    @contextmanager
    def status(self) -> Iterator[Callable[[str], object]]:
        with self._console.status("") as status:
            yield status.update


def _cell(cell: Cell) -> Text:
    return Text(cell) if isinstance(cell, str) else Text(cell.text, style=cell.color)
