"""The screen as plain lines, for machines without rich; it is treated as no terminal, so nothing is overwritten."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import zip_longest

from fastssl.observe.table import Cell, Table


class NoBar:
    """Shows nothing."""

    def update(self, text: str, done: int, total: int) -> None: ...

    def start(self) -> None: ...

    def stop(self) -> None: ...


class PlainScreen:
    """Prints."""

    is_terminal = False

    def __init__(self, *, stderr: bool, least_width: int) -> None:
        self._stderr, self._width = stderr, max(80, least_width)

    def line(self, text: str, *, wrap: bool = False) -> None:
        for line in text.split("\n") if wrap else [text]:
            # the stream of now, which a test or a caller may have put in place of the first
            print(textwrap.fill(line, self._width) if wrap else line, file=sys.stderr if self._stderr else sys.stdout)

    def table(self, table: Table) -> None:
        for line in plain_lines(table):
            self.line(line)

    def bar(self, *, counts: bool) -> NoBar:
        return NoBar()

    @contextmanager
    def status(self) -> Iterator[Callable[[str], object]]:
        yield lambda text: None


def plain_lines(table: Table) -> Iterator[str]:
    """Title, headings of one or more lines, and rows, in columns two blanks apart."""
    headings = list(zip_longest(*(heading.split("\n") for heading in table.headings), fillvalue=""))
    lines = [*(headings if any(table.headings) else []), *(tuple(map(_text, row)) for row in table.rows)]
    columns = list(zip_longest(*lines, [""] * len(table.headings), fillvalue=""))
    widths = [max(map(len, column)) for column in columns] if lines else []
    if table.title:
        yield table.title
    for line in lines:
        cells = zip(line, widths, table.align, strict=False)
        yield "  ".join(
            text.rjust(width) if align == "r" else text.ljust(width) for text, width, align in cells
        ).rstrip()


def _text(cell: Cell) -> str:
    return cell if isinstance(cell, str) else cell.text
