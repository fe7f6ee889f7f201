"""How a bank is streamed: blocks of entries against chunks of rows.

A block's logits are [entries, rows] and the sums [features, rows]: the bank then enters both products as it lies in
memory, and sums over entries run along whole rows. Logits are in base 2, because `exp2` is cheaper than `exp`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..rows import LOG2_E, accumulation_dtype

_CPU_ROWS = 256
# Per thread: 4 MiB of float32 stay in cache between passes, and blocks are few. Threads wait for each other at every
# operation, which is expensive on a busy machine.
_CPU_LOGITS = 2**20
_DEVICE_LOGITS = 2**25  # Elsewhere a block must outweigh its launches
_MAX_BLOCK = 2**14  # Bounds the float32 copy of a block
_CENTERED = 2**10


class Bank:
    """Entries minus a center, roughly their mean, in the dtype of products with `rows`.

    A center shifts all logits of a row by the same amount, which changes no loss. But the less the entries have in
    common, the fewer digits are lost in differences of logits and of means.
    """

    def __init__(self, rows: Tensor, *parts: Tensor) -> None:
        self._parts = parts
        self._dtype = accumulation_dtype(rows.dtype)
        # Non-finite values stay in their entry: in the center they would spread to all entries
        self.center = parts[-1][:_CENTERED].to(self._dtype).mean(0).nan_to_num(0, 0, 0)
        """[C]"""

    def centered(self, entries: Tensor) -> Tensor:
        """Other entries, with this bank's center subtracted."""
        return entries.to(self._dtype) - self.center

    def whole(self, rows: Tensor) -> Tensor | None:
        """[K, C]: the entries, not centered, if they are one contiguous CPU matrix of that dtype; else None."""
        (first, *others) = self._parts
        usable = rows.is_cpu and not others and first.dtype == self._dtype and first.is_contiguous()
        return first if usable else None

    def blocks(self, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield each block with its slice of its part; `rows` are those it will be multiplied with."""
        size = _block_length(rows)
        buffer = rows.new_empty(size, rows.shape[1], dtype=self._dtype)
        for part in self._parts:
            for here in _slices(len(part), size):
                yield here, torch.sub(part[here], self.center, out=buffer[: here.stop - here.start])


class Products:
    """Products of blocks with a chunk of rows, in one buffer that every product overwrites."""

    def __init__(self, rows: Tensor) -> None:
        self._columns = rows.T.contiguous()
        self._buffer = rows.new_empty(_block_length(rows), len(rows))

    def __call__(self, block: Tensor) -> Tensor:
        """[entries, rows]"""
        return torch.mm(block, self._columns, out=self._buffer[: len(block)])


def in_base_2(rows: Tensor, temperature: float) -> Tensor:
    """Rows scaled so that their products with entries are logits in base 2."""
    return rows.to(accumulation_dtype(rows.dtype)) * (LOG2_E / temperature)


def row_chunks(rows: Tensor) -> list[slice]:
    """All rows at once, except on a CPU, where a block of logits must fit a cache."""
    return _slices(len(rows), _chunk_length(rows))


def by_chunks(rows: Tensor, compute: Callable[[slice], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Run `compute` on chunks of the rows, and concatenate what it returns."""
    parts = [compute(chunk) for chunk in row_chunks(rows)]
    return parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts, strict=True)))


def matches(entry_labels: Tensor, row_labels: Tensor) -> Tensor | None:
    """[entries, rows]: whether the labels agree; None if a cheap check shows that none do."""
    # On another device the check would wait for it
    if row_labels.is_cpu and not torch.isin(entry_labels, row_labels).any():
        return None
    return entry_labels[:, None] == row_labels


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _chunk_length(rows: Tensor) -> int:
    return _CPU_ROWS if rows.is_cpu else len(rows)


def _block_length(rows: Tensor) -> int:
    """Entries per block, for these rows or a chunk of them."""
    logits = _CPU_LOGITS * torch.get_num_threads() if rows.is_cpu else _DEVICE_LOGITS
    return max(1, min(logits // min(len(rows), _chunk_length(rows)), _MAX_BLOCK))
