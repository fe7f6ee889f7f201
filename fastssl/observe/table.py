"""Tables, and how they look as plain text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import NamedTuple


class Colored(NamedTuple):
    """A cell in a color, if the screen has colors."""

    text: str
    color: str


Cell = str | Colored


@dataclass
class Table:
    """Rows of cells under headings; a row may have fewer cells than headings."""

    headings: Sequence[str]
    align: str
    """One letter per column: l for left, r for right."""
    title: str = ""
    framed: bool = True
    rows: list[tuple[Cell, ...]] = field(default_factory=list)

    def add_row(self, *cells: Cell) -> None:
        """Append a row."""
        self.rows.append(cells)


def plain_lines(table: Table) -> Iterator[str]:
    """The lines of a table as text: title, headings and rows, in columns two spaces apart."""
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
