"""Rows of cells, whatever shows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Colored(NamedTuple):
    """A cell in a color, where there are colors."""

    text: str
    color: str


Cell = str | Colored


@dataclass
class Table:
    """Rows of cells under headings; a row may end early."""

    headings: Sequence[str]
    align: str
    """A letter a column: l for left, r for right."""
    title: str = ""
    framed: bool = True
    rows: list[tuple[Cell, ...]] = field(default_factory=list)

    def add_row(self, *cells: Cell) -> None:
        """Below the others."""
        self.rows.append(cells)
